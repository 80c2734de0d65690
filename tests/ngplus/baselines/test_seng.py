import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngplus.baselines import SENG, Shampoo
from ngplus.baselines import sample_gradients as forms
from ngplus.factors.dense import Dense
from ngplus.factors.im2col import Patches
from ngplus.factors.pair import FactorPair
from ngplus.layers import MatrixShape
from ngplus.tuning import Tuning
from tests.ngplus import oracle
from tests.ngplus.allocations import peak_elements
from tests.ngplus.cases import training_step


def dense_directions(gradients: dict, damping: float, used: int | None = None) -> dict:
    """(λI + FFᵀ)⁻¹g of every layer with F written out, from its samples' gradients."""
    directions = {}
    for matrix, samples in gradients.items():
        Fisher = sum(torch.outer(G.flatten(), G.flatten()) for G in samples[:used]) / len(samples[:used])
        g = sum(samples) / len(samples)
        damped = Fisher + damping * torch.eye(len(Fisher))
        directions[matrix] = torch.linalg.solve(damped, g.flatten()).view_as(g)
    return directions


def check(model: nn.Module, *inputs: Tensor, damping: float = 0.3, **options) -> SENG:
    expected = dense_directions(
        oracle.sample_gradients(model, oracle.sample_losses(*inputs)), damping, options.get("max_samples")
    )
    optimizer = SENG(model, lr=1e-9, damping=damping, **options)
    training_step(model, optimizer, *inputs)
    assert oracle.error(model, expected) < 1e-10
    return optimizer


class Sequence(nn.Module):
    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3, sparse=sparse)
        self.twice = nn.Linear(3, 3)
        self.last = nn.Linear(3, 2, bias=False)

    def forward(self, index: Tensor) -> Tensor:
        return self.last(self.twice(self.twice(self.table(index)).tanh()).tanh())


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 5, 5),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(20, 3),
    )


def kept(optimizer: SENG) -> dict[str, type]:
    return {name: type(state.preconditioner.gradients) for name, state in optimizer.curvature.items()}


@pytest.mark.parametrize("options", [{}, {"max_samples": 3}])
def test_convolutions_and_linear_layers_are_the_dense_fisher_matrix(options):
    optimizer = check(convolutional(), torch.randn(5, 2, 6, 6), **options)
    assert kept(optimizer) == {"0.weight": forms.Written, "2.weight": forms.Factored, "5.weight": forms.Factored}


def test_tables_and_a_layer_used_twice_on_sequences():
    optimizer = check(Sequence(), torch.randint(7, (5, 2)))
    assert kept(optimizer)["table.weight"] is forms.LookedUp


def test_sequences_longer_than_a_layer_is_wide_are_written_out():
    optimizer = check(Sequence(), torch.randint(7, (4, 6)))
    assert kept(optimizer)["twice.weight"] is forms.Written


def test_attention_with_packed_projections():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, query, memory):
            return self.attention(query, memory, memory)[0]

    check(Attention(), torch.randn(5, 3, 4), torch.randn(5, 2, 4))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)

    def forward(self, index):
        return F.linear(self.table(index).tanh(), self.table.weight)


def test_a_table_that_is_a_matrix_too():
    check(Tied(), torch.randint(5, (4, 2)))


def test_uses_as_table_and_as_matrix_are_samples_of_their_own_where_every_row_is():
    model, index = Tied(), torch.randint(5, (4,))
    hidden = model.table(index).detach().requires_grad_()
    output = F.linear(hidden.tanh(), model.table.weight.detach()).requires_grad_()
    oracle.energy(output).backward(inputs=[output, hidden])
    uses = [torch.outer(g, h.tanh()) for g, h in zip(output.grad, hidden.detach(), strict=True)]
    uses += [torch.outer(F.one_hot(i, 5).double(), g) for i, g in zip(index, hidden.grad, strict=True)]
    # With a mean over 4, and 8 samples captured, each counts as 8/4 times its own gradient.
    Fisher = sum(torch.outer(2 * G.flatten(), 2 * G.flatten()) for G in uses) / 8 + 0.3 * torch.eye(15)
    expected = torch.linalg.solve(Fisher, sum(uses).flatten() / 4).view(5, 3)
    optimizer = SENG(model, lr=1e-9, damping=0.3, samples="rows")
    training_step(model, optimizer, index)
    assert kept(optimizer)["table.weight"] is forms.Factored
    torch.testing.assert_close(model.table.weight.grad, expected)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_of_unequal_length(mode):
    model = nn.Sequential(nn.EmbeddingBag(6, 3, mode=mode, padding_idx=0), nn.Tanh())
    index = torch.tensor([[1, 2, 1], [3, 0, 0], [5, 5, 4], [2, 3, 0]])
    check(model, index)


def test_every_row_a_sample():
    model = nn.Linear(4, 3)
    x = torch.randn(5, 2, 4)
    gradients = oracle.row_gradients(model, lambda m: oracle.energy(m(x)) / 5)
    expected = dense_directions(gradients, 0.3)
    training_step(model, SENG(model, lr=1e-9, damping=0.3, samples="rows"), x)
    assert oracle.error(model, expected) < 1e-10


@pytest.mark.parametrize("make", [convolutional, Sequence])
def test_micro_batches_of_unequal_length_are_one_batch(make):
    model = make()
    if make is Sequence:
        batches = [torch.randint(7, (2, 2)), torch.randint(7, (2, 1)), torch.randint(7, (2, 6))]
    else:
        batches = list(torch.randn(3, 2, 2, 6, 6))
    losses = [loss for batch in batches for loss in oracle.sample_losses(batch)]
    expected = dense_directions(oracle.sample_gradients(model, losses), 0.3)
    optimizer = SENG(model, lr=1e-9, damping=0.3)
    for batch in batches:
        (oracle.batch_loss(batch)(model) / 3).backward()
    optimizer.step()
    assert oracle.error(model, expected) < 1e-10


def test_samples_are_kept_between_curvature_steps():
    model = nn.Linear(4, 3)
    optimizer = SENG(model, lr=0.1, damping=0.3, update_every=2)
    for step in range(4):
        x = torch.randn(6, 4)
        gradients = oracle.sample_gradients(model, oracle.sample_losses(x))
        ((matrix, samples),) = gradients.items()
        if step % 2 == 0:
            Fisher = sum(torch.outer(G.flatten(), G.flatten()) for G in samples) / 6 + 0.3 * torch.eye(15)
        g = sum(samples) / 6
        expected = torch.linalg.solve(Fisher, g.flatten()).view_as(g)
        training_step(model, optimizer, x)
        assert oracle.error(model, {matrix: expected}) < 1e-10


def test_what_is_kept_is_a_copy():
    model = nn.Linear(4, 3)
    x = torch.randn(6, 4)
    optimizer = SENG(model, lr=1e-9, damping=0.3, update_every=2)
    training_step(model, optimizer, x)
    before = [tensor.clone() for tensor in optimizer.curvature["weight"].tensors()]
    x.zero_()
    assert all(torch.equal(a, b) for a, b in zip(optimizer.curvature["weight"].tensors(), before, strict=True))


def test_a_sparse_gradient_comes_back_sparse():
    index = torch.randint(6, (3, 2))
    one, other = Sequence(), Sequence(sparse=True)
    other.load_state_dict(one.state_dict())
    optimizers = [SENG(model, lr=1e-9, damping=0.3, update_every=5) for model in (one, other)]
    for batch in (index, torch.full((3, 2), 5)):  # rows that the second batch did not look up move too
        for model, optimizer in zip((one, other), optimizers, strict=True):
            training_step(model, optimizer, batch)
        gradient = other.table.weight.grad
        assert gradient.is_sparse
        torch.testing.assert_close(gradient.to_dense(), one.table.weight.grad, rtol=1e-9, atol=1e-12)


def sketched_direction(optimizer: SENG, samples: list[Tensor], g: Tensor, damping: float) -> Tensor:
    """The least-squares problem with Ω written out, for the entries that the optimizer drew."""
    (state,) = optimizer.curvature.values()
    sampled = state.preconditioner.sampled
    Omega = torch.zeros(len(sampled), g.numel())
    Omega[torch.arange(len(sampled)), sampled] = (g.numel() / len(sampled)) ** 0.5
    U = torch.stack([G.flatten() for G in samples], dim=1) / len(samples) ** 0.5
    N = U.shape[1]
    system = torch.cat([Omega @ U, damping**0.5 * torch.eye(N)])
    y = torch.linalg.lstsq(system, torch.cat([Omega @ g.flatten(), torch.zeros(N)])[:, None]).solution[:, 0]
    return ((g.flatten() - U @ y) / damping).view_as(g)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Linear(6, 4), torch.randn(5, 6)),
        (nn.Conv2d(4, 4, 3, groups=2), torch.randn(5, 4, 4, 4)),
        (nn.Conv2d(2, 3, 2), torch.randn(5, 2, 6, 6)),
        (nn.Embedding(6, 4), torch.randint(6, (5, 3))),
    ],
    ids=["linear", "grouped", "written", "table"],
)
def test_sketched_coefficients_solve_the_sketched_problem(model, x):
    model, x = model.double(), x.double() if x.is_floating_point() else x
    ((matrix, samples),) = oracle.sample_gradients(model, oracle.sample_losses(x)).items()
    damping = float(sum(G.square().sum() for G in samples)) / len(samples) / 10
    optimizer = SENG(model, lr=1e-9, damping=damping, sketch_size=11)
    training_step(model, optimizer, x)
    expected = sketched_direction(optimizer, samples, sum(samples) / len(samples), damping)
    assert oracle.error(model, {matrix: expected}) < 1e-10


def test_the_gram_matrix_is_the_same_by_either_way():
    for groups, N, kappa, m, n in [(1, 6, 1, 9, 8), (2, 5, 6, 7, 9), (1, 40, 5, 6, 30)]:
        factored = forms.Factored(torch.randn(groups, N, kappa, m), torch.randn(groups, N, kappa, n))
        written = factored.write_out(m)
        torch.testing.assert_close(factored.gram(), written.gram())
        sampled = torch.randint(groups * m * n, (20,))
        shape = MatrixShape(groups=groups, rows=m, columns=n)
        torch.testing.assert_close(factored.entries(sampled, shape), written.entries(sampled, shape))
        G = torch.randn(groups, m, n)
        torch.testing.assert_close(factored.inner(G), written.inner(G))


def test_the_gram_matrix_in_chunks(set_tuning):
    set_tuning(curvature_chunk_cpu=64)
    check(convolutional(), torch.randn(5, 2, 6, 6))
    check(Sequence(), torch.randint(7, (5, 2)))


def test_gradients_that_are_written_out_take_a_few_chunks_besides_themselves():
    """Unfolded whole, an image would be 56 chunks."""
    limit = 2**13
    tuning = Tuning(curvature_chunk_cpu=limit)
    patches = Patches(torch.randn(3, 8, 81, 79), (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), 1)
    outputs = Dense(torch.randn(3, 1, 8, patches.positions))
    made = []
    peak = peak_elements(lambda: made.append(forms.gather([FactorPair(outputs, patches)], 1, tuning)))
    expected = (outputs.dense() @ patches.dense().mT).flatten(1)
    torch.testing.assert_close(made[0].gradients, expected, rtol=1e-4, atol=1e-3)
    assert peak <= 4 * limit + 4 * expected.numel()


def test_a_saved_state_and_a_pickled_copy_go_on_to_the_bit():
    torch.set_default_dtype(torch.float32)
    for options in ({}, {"sketch_size": 20}):
        model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(8, 3))
        optimizer = SENG(model, lr=0.1, damping=0.1, update_every=2, momentum=0.9, **options)
        batches = torch.randint(7, (6, 8, 2))
        for x in batches[:3]:
            training_step(model, optimizer, x)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        other = copy.deepcopy(model)
        resumed = SENG(other, lr=1.0, damping=1.0, update_every=2, momentum=0.1, **options)
        resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        copied = pickle.loads(pickle.dumps(optimizer))
        for x in batches[3:]:
            for one, stepper in ((model, optimizer), (other, resumed), (copied._model, copied)):
                training_step(one, stepper, x)
        for a, b, c in zip(model.parameters(), other.parameters(), copied._model.parameters(), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


def test_a_loss_that_is_not_finite_changes_nothing():
    model = nn.Linear(4, 3)
    optimizer = SENG(model, lr=0.1, update_every=1)
    training_step(model, optimizer, torch.randn(6, 4))
    before = model.weight.clone()
    training_step(model, optimizer, torch.full((6, 4), torch.nan))
    assert torch.equal(model.weight, before)
    assert optimizer.skipped_steps == 1


def test_it_trains_a_small_network():
    x, y = torch.randn(64, 2, 6, 6), torch.randint(3, (64,))
    model = convolutional()
    optimizer = SENG(model, lr=0.02, damping=0.1, update_every=5, momentum=0.9)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_states_of_other_optimizers_are_refused():
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="this is no state of SENG"):
        SENG(model).load_state_dict(Shampoo(model).state_dict())


def test_several_processes_are_refused(monkeypatch):
    model = nn.Linear(4, 3)
    optimizer = SENG(model)
    monkeypatch.setattr("ngplus.baselines.seng.world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="it does not train in several together"):
        training_step(model, optimizer, torch.randn(6, 4))


def test_what_is_out_of_range_is_refused_by_name():
    with pytest.raises(ValueError, match="sketch_size must be an integer ≥ 1 or None, got 0"):
        SENG(nn.Linear(2, 2), sketch_size=0)


def test_its_repr_names_its_options_and_matrices():
    model = nn.Linear(4, 3)
    optimizer = SENG(model, damping=0.25, max_samples=9)
    assert "SENG(1 layers, update_every=200," in repr(optimizer)
    training_step(model, optimizer, torch.randn(6, 4))
    assert repr(optimizer.curvature["weight"]).startswith("SENGState(matrix 3×5, damping 0.25, 1 updates")
