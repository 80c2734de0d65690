import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngplus import NGPlus
from ngplus.baselines import KFAC
from ngplus.baselines.kronecker import sum_outer_products
from ngplus.factors.im2col import Patches
from ngplus.tuning import Tuning
from tests.ngplus.allocations import peak_elements
from tests.ngplus.cases import parameters_equal, seed_cpu, training_step


def sample_losses(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Losses of single samples whose mean is trained on."""
    outputs = model(*inputs)
    return [output.sin().sum() + 0.5 * output.square().sum() for output in outputs]


def record(model: nn.Module, module: nn.Module, *inputs: Tensor) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """For each sample, the inputs of a module at each of its positions and the gradients of that sample's own loss."""
    calls = []

    def hook(_: nn.Module, args: tuple, output: Tensor) -> None:
        output.retain_grad()
        calls.append((args[0].detach(), output))

    handle = module.register_forward_hook(hook)
    a, g = [], []
    for i in range(len(inputs[0])):
        calls.clear()
        model.zero_grad()
        sample_losses(model, *(x[i : i + 1] for x in inputs))[0].backward()
        a.append([v for source, _ in calls for v in vectors_in(module, source)])
        g.append([v for _, output in calls for v in vectors_out(module, output.grad)])
    handle.remove()
    return a, g


def vectors_in(module: nn.Module, source: Tensor) -> list[Tensor]:
    if isinstance(module, nn.Conv2d):
        columns = F.unfold(source, module.kernel_size, padding=module.padding, stride=module.stride)[0].T
    elif isinstance(module, nn.Embedding):
        columns = F.one_hot(source[0].flatten(), module.num_embeddings).double()
    else:
        columns = source[0].reshape(-1, source.shape[-1])
    if getattr(module, "bias", None) is not None:
        columns = torch.cat([columns, torch.ones(len(columns), 1).double()], dim=1)
    return list(columns)


def vectors_out(module: nn.Module, gradient: Tensor) -> list[Tensor]:
    gradient = (
        gradient[0].flatten(1).T if isinstance(module, nn.Conv2d) else gradient[0].reshape(-1, gradient.shape[-1])
    )
    return list(gradient)


def factors(model: nn.Module, module: nn.Module, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    a, g = record(model, module, *inputs)
    A = sum(torch.outer(v, v) for sample in a for v in sample) / len(a)
    B = sum(torch.outer(v, v) / len(sample) for sample in g for v in sample) / len(g)
    return A, B


def dense_direction(A: Tensor, B: Tensor, G: Tensor, damping: float, pi: float) -> Tensor:
    """G as a vector, row after row, times the inverse of the Kronecker product written out."""
    A = A + pi * math.sqrt(damping) * torch.eye(len(A))
    B = B + math.sqrt(damping) / pi * torch.eye(len(B))
    return torch.linalg.solve(torch.kron(B, A), G.flatten()).view_as(G)


def trace_norm(A: Tensor, B: Tensor) -> float:
    return math.sqrt((A.trace() / len(A)) / (B.trace() / len(B)))


def matrix(module: nn.Module) -> Tensor:
    """The gradient that is there as a matrix, the bias as its last column."""
    G = module.weight.grad.to_dense().flatten(1)
    return G if getattr(module, "bias", None) is None else torch.cat([G, module.bias.grad[:, None]], dim=1)


def check(model: nn.Module, *inputs: Tensor, split: str = "trace", damping: float = 0.3) -> None:
    """One step's directions against the dense formula, for every layer."""
    optimizer = KFAC(model, lr=1e-9, damping=damping, split=split)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)]
    expected = []
    for layer in layers:
        A, B = factors(model, layer, *inputs)
        model.zero_grad()
        torch.stack(sample_losses(model, *inputs)).mean().backward()
        G, pi = matrix(layer), trace_norm(A, B) if split == "trace" else 1.0
        table = isinstance(layer, nn.Embedding)
        expected.append(dense_direction(B, A, G, damping, 1 / pi) if table else dense_direction(A, B, G, damping, pi))
    training_step(model, optimizer, *inputs)
    for layer, D in zip(layers, expected, strict=True):
        torch.testing.assert_close(matrix(layer), D, rtol=1e-9, atol=1e-12)


class Sequence(nn.Module):
    """Tokens through one layer twice; an index of padding stays out of the table's gradient but is looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.twice = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3, bias=False)

    def forward(self, index: Tensor) -> Tensor:
        hidden = self.twice(self.twice(self.table(index)).tanh())
        return self.last(hidden.tanh()).mean(1)


def convolutional(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=2, bias=bias),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(27, 4, bias=bias),
    )


@pytest.mark.parametrize("split", ["trace", "equal"])
def test_convolution_and_linear_are_the_kronecker_product_written_out(split):
    check(convolutional(), torch.randn(6, 2, 6, 6), split=split)


@pytest.mark.parametrize("split", ["trace", "equal"])
def test_a_table_and_a_layer_used_twice_on_sequences(split):
    check(Sequence(), torch.randint(7, (5, 3)), split=split)


def test_each_group_of_a_convolution_has_its_own_pair_of_factors():
    model = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Flatten())
    x = torch.randn(5, 4, 3, 3)
    layer = model[0]
    halves = []
    for half in range(2):
        part = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten())
        part[0].weight.data, part[0].bias.data = layer.weight.data[3 * half :][:3], layer.bias.data[3 * half :][:3]
        A, B = factors(part, part[0], x[:, 2 * half :][:, :2])
        halves.append((part, A, B))
    As, Bs = [A for _, A, _ in halves], [B for _, _, B in halves]
    mean = [torch.stack([m.trace() / len(m) for m in ms]).mean() for ms in (As, Bs)]
    pi = math.sqrt(mean[0] / mean[1])
    expected = []
    for half, (part, A, B) in enumerate(halves):
        part.zero_grad()
        torch.stack(sample_losses(part, x[:, 2 * half :][:, :2])).mean().backward()
        expected.append(dense_direction(A, B, matrix(part[0]), 0.3, pi))
    training_step(model, KFAC(model, lr=1e-9, damping=0.3), x)
    torch.testing.assert_close(matrix(layer), torch.cat(expected), rtol=1e-9, atol=1e-12)


def test_a_longer_side_than_allowed_keeps_the_diagonal_of_its_factor():
    model = nn.Linear(6, 3)
    x = torch.randn(8, 6)
    A, B = factors(model, model, x)
    A = A.diagonal().diag()
    model.zero_grad()
    torch.stack(sample_losses(model, x)).mean().backward()
    expected = dense_direction(A, B, matrix(model), 0.3, trace_norm(A, B))
    training_step(model, KFAC(model, lr=1e-9, damping=0.3, max_side=6), x)
    torch.testing.assert_close(matrix(model), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("limit", [1, 100, 2**30])
@pytest.mark.parametrize("groups", [1, 3])
def test_factors_of_large_images_are_summed_in_parts(groups, limit):
    tuning = Tuning(curvature_chunk_cpu=limit)
    seed_cpu(0)
    patches = Patches(torch.randn(2, 6, 9, 7, dtype=torch.float64), (3, 2), (2, 1), (1, 1), ((1, 1), (0, 1)), groups)
    columns = patches.dense().permute(1, 2, 0, 3).flatten(2)
    torch.testing.assert_close(sum_outer_products(patches, 100, groups, tuning), columns @ columns.mT)
    torch.testing.assert_close(
        sum_outer_products(patches, 1, groups, tuning), columns.square().sum(dim=2).view(-1, 1, 1)
    )


def test_a_factor_takes_a_few_chunks_besides_itself():
    """Unfolded whole it would be 112 chunks."""
    limit = 2**13
    tuning = Tuning(curvature_chunk_cpu=limit)
    patches = Patches(torch.randn(2, 8, 81, 79), (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), 1)
    assert peak_elements(lambda: sum_outer_products(patches, 100, 1, tuning)) <= 4 * limit + 4 * patches.size**2


def test_factors_are_averaged_from_the_first_on_and_kept_between_curvature_steps():
    model = nn.Linear(4, 3)
    optimizer = KFAC(model, lr=0.1, damping=0.3, update_every=2, ema=0.75)
    averages = None
    for step in range(5):
        x = torch.randn(6, 4)
        if step % 2 == 0:
            new = factors(model, model, x)
            averages = new if averages is None else [0.75 * o + 0.25 * n for o, n in zip(averages, new, strict=True)]
        model.zero_grad()
        torch.stack(sample_losses(model, x)).mean().backward()
        expected = dense_direction(*averages, matrix(model), 0.3, trace_norm(*averages))
        training_step(model, optimizer, x)
        torch.testing.assert_close(matrix(model), expected, rtol=1e-9, atol=1e-12)


def test_the_sum_of_losses_has_the_curvature_of_their_mean():
    x = torch.randn(6, 4)
    one = nn.Linear(4, 3)
    other = copy.deepcopy(one)
    training_step(one, KFAC(one, lr=1e-9, damping=0.3), x)
    optimizer = KFAC(other, lr=1e-9, damping=0.3, loss_reduction="sum")
    torch.stack(sample_losses(other, x)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(other.weight.grad, 6 * one.weight.grad, rtol=1e-9, atol=0.0)


def test_micro_batches_are_one_batch():
    x = torch.randn(6, 2, 6, 6)
    one = convolutional()
    other = copy.deepcopy(one)
    training_step(one, KFAC(one, lr=1e-9, damping=0.3), x)
    optimizer = KFAC(other, lr=1e-9, damping=0.3)
    for micro in x.split(3):
        (torch.stack(sample_losses(other, micro)).mean() / 2).backward()
    optimizer.step()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-12)


# Of torch, about how asdfghjkl uses it.
@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
def test_asdfghjkl_gives_the_same_directions():
    """Without biases, which it treats apart from the matrix."""
    from asdl import FISHER_EMP, KfacGradientMaker, PreconditioningConfig

    model = convolutional(bias=False)
    x, y = torch.randn(8, 2, 6, 6), torch.randint(4, (8,))
    other = copy.deepcopy(model)
    maker = KfacGradientMaker(other, PreconditioningConfig(data_size=8, damping=0.05), fisher_type=FISHER_EMP)
    dummy = maker.setup_model_call(other, x)
    maker.setup_loss_call(F.cross_entropy, dummy, y)
    maker.forward_and_backward()
    optimizer = KFAC(model, lr=1e-9, damping=0.05)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("members", [1, 3])
def test_bags_have_the_diagonal_of_their_factor(members):
    model = nn.Sequential(nn.EmbeddingBag(5, 3, mode="sum"), nn.Tanh())
    index = torch.randint(5, (6, members))
    a = F.one_hot(index, 5).double().sum(1)
    output = model[0](index).detach().requires_grad_()
    (g,) = torch.autograd.grad(sum(o.tanh().sin().sum() + 0.5 * o.tanh().square().sum() for o in output), output)
    A, B = (a.T @ a / 6).diagonal().diag(), g.T @ g / 6
    torch.stack(sample_losses(model, index)).mean().backward()
    expected = dense_direction(B, A, model[0].weight.grad, 0.3, trace_norm(B, A))
    training_step(model, KFAC(model, lr=1e-9, damping=0.3), index)
    torch.testing.assert_close(model[0].weight.grad, expected, rtol=1e-9, atol=1e-12)


def test_a_sparse_gradient_stays_sparse():
    index = torch.randint(7, (5, 3))
    one = nn.Sequential(nn.Embedding(7, 4), nn.Flatten())
    other = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten())
    other.load_state_dict(one.state_dict())
    for model in (one, other):
        training_step(model, KFAC(model, lr=1e-9, damping=0.3), index)
    assert other[0].weight.grad.is_sparse
    torch.testing.assert_close(other[0].weight.grad.to_dense(), one[0].weight.grad, rtol=1e-9, atol=1e-12)


def test_a_table_that_is_a_matrix_too_goes_to_the_base_with_a_warning():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.middle = nn.Linear(4, 4)

        def forward(self, index: Tensor) -> Tensor:
            return F.linear(self.middle(self.table(index)), self.table.weight)

    model = Tied()
    index = torch.randint(7, (5,))
    torch.stack(sample_losses(model, index)).mean().backward()
    before = model.table.weight.grad.clone()
    with pytest.warns(
        UserWarning, match=r"table\.weight is looked up as a table and multiplied as a matrix, for which"
    ):
        training_step(model, KFAC(model, lr=1e-9), index)
    assert torch.equal(model.table.weight.grad, before)


def test_a_grouping_leaves_rows_out_of_both_factors():
    x = torch.randn(6, 4)
    one = nn.Linear(4, 3)
    other = copy.deepcopy(one)
    training_step(one, KFAC(one, lr=1e-9, damping=0.3), x[:4])
    optimizer = KFAC(other, lr=1e-9, damping=0.3)
    optimizer.sample_index = torch.tensor([0, 0, 1, 1, -1, -1])
    (sum(sample_losses(other, x)[:4]) / 4).backward()
    optimizer.step()
    torch.testing.assert_close(other.weight.grad, one.weight.grad, rtol=1e-9, atol=1e-12)


def test_a_saved_state_goes_on_to_the_bit():
    torch.set_default_dtype(torch.float32)
    model = convolutional()
    optimizer = KFAC(model, torch.optim.Adam, lr=0.01, damping=0.1, update_every=2)
    batches = torch.randn(6, 8, 2, 6, 6)
    for x in batches[:3]:
        training_step(model, optimizer, x)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    other = copy.deepcopy(model)
    resumed = KFAC(other, torch.optim.Adam, lr=1.0, damping=1.0, update_every=2)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for x in batches[3:]:
        training_step(model, optimizer, x)
        training_step(other, resumed, x)
    assert parameters_equal(model, other)


@pytest.mark.parametrize("sides", [(8192, 3), (3, 8192)])
def test_a_state_with_factors_of_another_form_starts_a_new_average(sides):
    """At ``max_side`` 3 the factor of the five columns is its diagonal."""
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    before = KFAC(model, lr=1e-9, update_every=1, max_side=sides[0])
    training_step(model, before, torch.randn(6, 4))
    fresh = copy.deepcopy(model)
    loaded = KFAC(model, lr=1e-9, update_every=1, max_side=sides[1])
    loaded.load_state_dict(before.state_dict())
    training_step(model, loaded, x)
    training_step(fresh, KFAC(fresh, lr=1e-9, update_every=1, max_side=sides[1]), x)
    torch.testing.assert_close(model.weight.grad, fresh.weight.grad, rtol=1e-7, atol=1e-9)


def test_a_pickled_copy_goes_on_to_the_bit():
    model = nn.Linear(4, 3)
    optimizer = KFAC(model, lr=0.1, max_side=5, update_every=2)
    x = torch.randn(3, 6, 4)
    training_step(model, optimizer, x[0])
    copied = pickle.loads(pickle.dumps(optimizer))
    for batch in x[1:]:
        training_step(model, optimizer, batch)
        training_step(copied._model, copied, batch)
    assert torch.equal(model.weight, copied._model.weight)


def test_states_of_other_optimizers_are_refused():
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="this is no state of KFAC"):
        KFAC(model, lr=0.1).load_state_dict(NGPlus(model).state_dict())


def test_a_loss_that_is_not_finite_changes_nothing():
    model = nn.Linear(4, 3)
    optimizer = KFAC(model, lr=0.1)
    training_step(model, optimizer, torch.randn(6, 4))
    before = model.weight.clone()
    training_step(model, optimizer, torch.full((6, 4), torch.nan))
    assert torch.equal(model.weight, before)
    assert optimizer.skipped_steps == 1


def test_it_trains_a_small_network_faster_than_its_base():
    x = torch.randn(64, 2, 6, 6)
    y = torch.randint(4, (64,))

    def loss_after(make) -> float:
        seed_cpu(1)
        model = convolutional()
        optimizer = make(model)
        for _ in range(25):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        return loss.item()

    plain = min(loss_after(lambda m, lr=lr: torch.optim.SGD(m.parameters(), lr=lr)) for lr in (0.03, 0.1, 0.3, 1.0))
    assert loss_after(lambda m: KFAC(m, lr=0.2, damping=0.01, update_every=5)) < 0.5 * plain


def test_times_and_schedules_are_ngs():
    model = nn.Linear(4, 3)
    optimizer = KFAC(model, lr=0.1, damping=0.5, momentum=0.9)
    optimizer.track_times()
    training_step(model, optimizer, torch.randn(6, 4))
    assert min(optimizer.times.curvature, optimizer.times.inverse, optimizer.times.apply) > 0
    (group,) = optimizer.param_groups
    assert (group["lr"], group["damping"], group["momentum"]) == (0.1, 0.5, 0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "pi"}, "split must be one of 'trace', 'equal', got 'pi'"),
        ({"max_side": 0}, "max_side must be an integer ≥ 1, got 0"),
        ({"damping": 0.0}, "damping must be a finite number > 0"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\)"),
        ({"nesterov_": True}, "nesterov_ is an option of neither KFAC nor its base SGD"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        KFAC(nn.Linear(2, 2), **options)


def test_parameters_alone_are_refused():
    with pytest.raises(TypeError, match="KFAC finds its layers in a model"):
        KFAC(nn.Linear(2, 2).parameters())


def test_its_repr_names_its_options_and_matrices():
    model = nn.Linear(2, 2)
    optimizer = KFAC(model, split="equal")
    assert repr(optimizer).startswith("KFAC(1 layers, update_every=100,")
    training_step(model, optimizer, torch.randn(3, 2))
    assert "2×3" in repr(optimizer.curvature["weight"])
