"""A layer whose gradient has other sources than the captured uses goes to the base, with a warning that names it."""

import copy
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from ngplus import NGPlus
from ngplus.capture.captured_uses import CHANGED
from ngplus.comparison.completeness import Comparison, read_values
from ngplus.comparison.matrix_entries import MatrixEntries, Spread
from ngplus.comparison.matrix_sums import MatrixSums
from ngplus.comparison.sampling import sample_entries
from ngplus.comparison.table_entries import TableEntries
from ngplus.factors.dense import Dense
from ngplus.factors.embedding import Bags, OneHot
from ngplus.factors.im2col import Patches
from ngplus.factors.pair import FactorPair
from ngplus.layers import find_layers
from tests.ngplus import oracle
from tests.ngplus.cases import points, recorded_warnings, seed_cpu

DAMPING = 0.3
REASON = "has a gradient that is not the sum of its captured uses"


class Fused(torch.autograd.Function):
    """x Wᵀ, of which nothing is captured."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).T @ x.flatten(0, -2)


class Language(nn.Module):
    """A table, a layer and a head that is the table or not."""

    def __init__(self, fused=False, width=5):
        super().__init__()
        seed_cpu(0)
        self.table = nn.Embedding(11, width)
        self.layer = nn.Linear(width, width)
        self.fused = fused
        self.double()

    def forward(self, index):
        hidden = self.layer(self.table(index)).tanh()
        return Fused.apply(hidden, self.table.weight) if self.fused else hidden


def fast_weights(model, index):
    """One step of MAML's inner loop, whose gradient goes to the slow weights."""
    inner = model(index).square().mean()
    names = dict(model.named_parameters())
    gradients = torch.autograd.grad(inner, names.values(), create_graph=True)
    fast = {name: p - 0.1 * g for (name, p), g in zip(names.items(), gradients, strict=True)}
    return inner + functional_call(model, fast, (index,)).sin().mean()


PARTIAL = {
    "a head in the loop": (Language, lambda m, x: oracle.energy(m(x) @ m.table.weight.T), {"table.weight"}),
    "a head fused with its loss": (lambda: Language(fused=True), lambda m, x: oracle.energy(m(x)), {"table.weight"}),
    "a lookup of one row in the loop": (
        Language,
        lambda m, x: oracle.energy(m(x)) + F.embedding(x[:1, :1], m.table.weight).square().sum(),
        {"table.weight"},
    ),
    "a penalty": (
        Language,
        lambda m, x: oracle.energy(m(x)) + 0.1 * m.layer.weight.square().sum(),
        {"layer.weight"},
    ),
    "a penalty on one row": (
        lambda: Language(width=64),
        lambda m, x: oracle.energy(m(x)) + 10 * m.layer.weight[50].square().sum(),
        {"layer.weight"},
    ),
    "a penalty on one column": (
        lambda: Language(width=64),
        lambda m, x: oracle.energy(m(x)) + 10 * m.layer.weight[:, 50].square().sum(),
        {"layer.weight"},
    ),
    "fast weights": (Language, fast_weights, {"table.weight", "layer.weight"}),
    "a function of the functional interface": (
        Language,
        lambda m, x: oracle.energy(m(x)) + torch.func.vmap(lambda v: m.layer.weight @ v)(points(3, 5, seed=1)).sum(),
        {"layer.weight"},
    ),
}


def step(model, loss, x, pieces=1, **options):
    """One step; returns the optimizer, the gradients before it and the warnings."""
    optimizer = NGPlus(model, lr=1e-12, damping=DAMPING, update_every=1, **options)
    for part in x.chunk(pieces):
        loss(model, part).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    with recorded_warnings() as caught:
        optimizer.step()
    return optimizer, before, caught


@pytest.mark.parametrize("case", PARTIAL)
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_with_uses_that_are_not_captured_goes_to_the_base(case, pieces, dtype):
    build, loss, partial = PARTIAL[case]
    if dtype == torch.float32 and "functional" in case:
        pytest.skip("its points are float64")
    model, index = build().to(dtype), torch.randint(11, (6, 4))
    optimizer, before, messages = step(model, loss, index, pieces)
    assert set(optimizer.curvature) == {"table.weight", "layer.weight"} - partial
    assert len(messages) == 1
    assert REASON in messages[0]
    for name in partial:
        assert name in messages[0]
        assert torch.equal(dict(model.named_parameters())[name].grad, before[name])


BIAS_REASON = "has a bias whose gradient is not the sum of its captured uses"


def biased_models():
    return {
        "linear": (nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), "2"),
        "wide": (nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3000)), "2"),
        "convolution": (nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 6, 3)), "1"),
        "grouped": (nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 1), nn.Conv1d(4, 6, 3, groups=2)), "2"),
    }


@pytest.mark.parametrize("name", biased_models())
@pytest.mark.parametrize("use", ["none", "added to the output", "penalty", "frozen bias"])
def test_a_bias_that_is_used_in_the_loop_too_leaves_its_layer_to_the_base(name, use):
    model, last = biased_models()[name]
    model = model.double()
    layer = model.get_submodule(last)
    if use == "frozen bias":
        layer.bias.requires_grad_(False)
    optimizer = NGPlus(model, lr=1e-12, damping=DAMPING, update_every=1)
    x = points(8, 5)
    output = model(x)
    if use == "added to the output":
        output = output + (layer.bias if output.dim() == 2 else layer.bias[:, None])
    loss = output.square().sum() / 8 + (layer.bias.square().sum() if use == "penalty" else 0)
    loss.backward()
    before = layer.bias.grad
    with recorded_warnings() as caught:
        optimizer.step()
    if use in ("none", "frozen bias"):
        assert caught == []
        assert f"{last}.weight" in optimizer.curvature
    else:
        (message,) = caught
        assert message.startswith(f"{last}.weight {BIAS_REASON}")
        assert f"{last}.weight" not in optimizer.curvature
        assert torch.equal(layer.bias.grad, before)


def test_the_biases_of_attention_are_compared_each_in_its_part():
    model = nn.MultiheadAttention(4, 2, kdim=3, vdim=5).double()
    optimizer = NGPlus(model, lr=1e-12, damping=DAMPING, update_every=1)
    output, _ = model(points(3, 6, 4), points(3, 6, 3), points(3, 6, 5), need_weights=False)
    (output.square().sum() / 6 + model.in_proj_bias[8:].exp().sum()).backward()
    with pytest.warns(UserWarning, match=f"^v_proj_weight {BIAS_REASON}"):
        optimizer.step()
    assert set(optimizer.curvature) == {"q_proj_weight", "k_proj_weight", "out_proj.weight"}


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("penalty_first", [False, True])
def test_a_backward_of_its_own_for_an_uncaptured_use_counts_before_and_after_the_models(penalty_first, zeros):
    model, index = Language(), torch.randint(11, (6, 4))
    optimizer = NGPlus(model, lr=1e-12, damping=DAMPING, update_every=1)
    if zeros:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    for penalty in (penalty_first, not penalty_first):
        (model.layer.weight.square().sum() if penalty else oracle.energy(model(index))).backward()
    before = model.layer.weight.grad.clone()
    with pytest.warns(UserWarning, match=f"^layer.weight {REASON}"):
        optimizer.step()
    assert set(optimizer.curvature) == {"table.weight"}
    assert torch.equal(model.layer.weight.grad, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 3])
def test_gradients_whose_rows_add_up_to_zero_are_no_other_source(classes, dtype):
    """As those of a softmax do, so that their sums are made of rounding alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 12), nn.Tanh(), nn.Linear(12, classes)).to(dtype)
    optimizer = NGPlus(model, lr=1e-3, damping=DAMPING, update_every=1)
    for _ in range(40):
        optimizer.zero_grad()
        x, y = torch.randn(4, 32).to(dtype), torch.randint(classes, (4,))
        F.cross_entropy(model(x), y).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
    assert len(optimizer.curvature) == 2


def test_a_partial_capture_is_accepted_with_the_option_for_it():
    build, loss, _ = PARTIAL["a penalty"]
    optimizer, _, messages = step(build(), loss, torch.randint(11, (6, 4)), partial_capture="accept")
    assert set(optimizer.curvature) == {"table.weight", "layer.weight"}
    assert not messages


def test_a_layer_that_is_complete_again_has_its_curvature_again():
    model, index = Language(), torch.randint(11, (6, 4))
    optimizer = NGPlus(model, lr=1e-12, damping=DAMPING, update_every=1)
    for penalty in (0.1, 0.0):
        optimizer.zero_grad()
        (oracle.energy(model(index)) + penalty * model.layer.weight.square().sum()).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if penalty else "error")
            optimizer.step()
        assert ("layer.weight" in optimizer.curvature) == (not penalty)


def clipped(model, _optimizer):
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def masked(model, _optimizer):
    for parameter in model.parameters():
        parameter.grad = parameter.grad * (torch.rand_like(parameter) < 0.5)


def discarded(model, optimizer):
    """A backward of other samples before, whose gradients went; and clipping."""
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    oracle.energy(model(torch.randint(11, (6, 4)))).backward()
    optimizer.zero_grad()
    del gradients
    oracle.energy(model(torch.randint(11, (6, 4)))).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


@pytest.mark.parametrize("between", [clipped, masked, discarded])
def test_changing_gradients_after_backward_is_not_reported_as_another_source(between):
    model, index = Language(), torch.randint(11, (6, 4))
    optimizer = NGPlus(model, lr=1e-12, damping=DAMPING, update_every=1)
    oracle.energy(model(index)).backward()
    between(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert len(optimizer.curvature) == 2


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_hooks_of_the_weight_see_the_gradient_after_the_comparison(scale):
    model, index = Language(), torch.randint(11, (6, 4))
    model.layer.weight.register_hook(lambda gradient: scale * gradient.sign())
    optimizer, _, messages = step(model, lambda m, x: oracle.energy(m(x)), index)
    assert len(optimizer.curvature) == 2
    assert not messages


def test_weights_are_left_without_hooks_and_can_be_copied_meanwhile():
    model, index = Language(), torch.randint(11, (6, 4))
    optimizer = NGPlus(model, lr=1e-12, damping=DAMPING, update_every=2)
    own = model.layer.weight.register_hook(lambda gradient: None)
    loss = oracle.energy(model(index))
    assert len(model.layer.weight._backward_hooks) == 2
    copy.deepcopy(model)
    loss.backward()
    optimizer.step()
    assert list(model.layer.weight._backward_hooks) == [own.id]
    assert model.table.weight._backward_hooks is None


TASKS = {
    "one graph": lambda model, x: model(x),
    "a forward each": lambda model, x: [model(x)[0], model(x)[1]],
}


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        seed_cpu(0)
        self.trunk, self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        hidden = self.trunk(x).tanh()
        return [self.a(hidden), self.b(hidden)]


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("forget", ["optimizer", "model"])
def test_gradients_put_together_by_hand_leave_all_layers_to_the_base_with_one_warning(tasks, in_place, forget):
    model, x = TwoHeads(), points(6, 4)
    optimizer = NGPlus(model, lr=1e-12, damping=DAMPING, update_every=1)
    merged = {p: torch.zeros_like(p) for p in model.parameters()}
    for output in TASKS[tasks](model, x):
        (optimizer if forget == "optimizer" else model).zero_grad()
        oracle.energy(output).backward(retain_graph=True)
        for parameter, total in merged.items():
            if parameter.grad is not None:
                total += parameter.grad
    for parameter, total in merged.items():
        if in_place and parameter.grad is not None:
            parameter.grad.copy_(total)
        else:
            parameter.grad = total.clone()
    with pytest.warns(UserWarning, match="put together by hand from several backward passes") as caught:
        optimizer.step()
    assert len(caught) == 1
    assert not optimizer.curvature
    assert all(torch.equal(parameter.grad, total) for parameter, total in merged.items())


LAYERS = {
    "linear": nn.Linear(6, 5),
    "one row": nn.Linear(6, 1),
    "one column": nn.Linear(1, 6),
    "wide": nn.Linear(300, 200),
    "convolution": nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=(1, 2)),
    "groups": nn.Conv1d(6, 9, 3, groups=3),
    "depthwise": nn.Conv2d(12, 12, 3, groups=12, padding=1),
    "table": nn.Embedding(7, 5),
    "long table": nn.Embedding(5000, 3),
}


def part_of(module, samples=4, positions=3):
    """A use of a layer with random factors, and the gradient that it makes."""
    seed_cpu(0)
    weight = module.weight
    if isinstance(module, nn.Embedding):
        index = torch.randint(len(weight), (samples, positions))
        columns = points(samples, 1, weight.shape[1], positions)
        part = FactorPair(OneHot(index, len(weight), torch.float64), Dense(columns))
    elif isinstance(module, nn.Linear):
        part = FactorPair(
            Dense(points(samples, 1, weight.shape[0], positions)), Dense(points(samples, 1, weight.shape[1], positions))
        )
    else:
        images = points(samples, module.in_channels, *[7] * (weight.dim() - 2))
        zeros = tuple((p, p) for p in module.padding)
        columns = Patches(images, module.kernel_size, module.stride, module.dilation, zeros, module.groups)
        part = FactorPair(
            Dense(points(samples, module.groups, len(weight) // module.groups, columns.positions)), columns
        )
    gradient = torch.einsum("bgmk,bgnk->gmn", part.rows.dense(), part.columns.dense()).reshape(weight.shape)
    return part, gradient


def use_entries(entries, part):
    return entries.of_use(entries.reduce_rows(part), part)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("output_size", [0, 10**6])
def test_the_compared_entries_of_uses_and_of_the_gradient_agree(name, seed, output_size):
    module = copy.deepcopy(LAYERS[name]).double()
    (layer,) = find_layers(module)
    part, gradient = part_of(module)
    entries = sample_entries(layer, layer.shape(None), output_size, random.Random(seed))
    found = use_entries(entries, part)
    assert found.place == 0
    torch.testing.assert_close(found.values, entries.of_gradient(gradient))
    small = MatrixSums if isinstance(module, nn.Linear) and not output_size else MatrixEntries
    assert type(entries) is (TableEntries if isinstance(module, nn.Embedding) else small)
    torch.testing.assert_close(entries.of_gradient(gradient.to_sparse(1)), entries.of_gradient(gradient))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("output_size", [0, 10**6])
def test_what_is_added_to_a_gradient_is_found(name, seed, output_size):
    module = copy.deepcopy(LAYERS[name]).double()
    (layer,) = find_layers(module)
    part, gradient = part_of(module)
    for extra, complete in ((0.0, True), (1e-12, True), (1e-5, False), (float("nan"), True)):
        entries = sample_entries(layer, layer.shape(None), output_size, random.Random(seed))
        comparison = Comparison(entries)
        comparison.add_use(comparison.reduce_rows(part), part, torch.float64)
        comparison.add_gradient(gradient * (1 + extra))
        values = read_values([comparison.vectors(None)])[0]
        assert comparison.is_complete(values) == (complete or not entries.of_gradient(gradient).any())


def test_what_a_single_sample_adds_to_a_small_layer_hardly_ever_hides():
    """Of rank one, and as large as what is captured; compared in bfloat16 one vector for the rows would miss 90."""
    (layer,) = find_layers(nn.Linear(4, 5))
    dice, missed = random.Random(0), 0
    seed_cpu(0)
    for _ in range(2000):
        entries = sample_entries(layer, layer.shape(None), 1, dice)
        parts = [FactorPair(Dense(torch.randn(1, 1, 5, 1)), Dense(torch.randn(1, 1, 4, 1))) for _ in "ab"]
        comparison = Comparison(entries)
        comparison.add_use(comparison.reduce_rows(parts[0]), parts[0], torch.bfloat16)
        comparison.add_gradient(sum(part.rows.entries[0, 0] @ part.columns.entries[0, 0].T for part in parts))
        missed += comparison.is_complete(read_values([comparison.vectors(None)])[0])
    assert missed <= 30, missed


@pytest.mark.parametrize("output_size", [0, 10**6])
def test_slices_of_a_weight_are_compared_at_their_place(output_size):
    layer = find_layers(nn.MultiheadAttention(4, 2).double())[0]
    entries = sample_entries(layer, layer.shape(None), output_size, random.Random(3))
    gradient = torch.zeros(12, 4, dtype=torch.float64)
    total = torch.zeros(entries.count, dtype=torch.float64)
    for first in (0, 4, 8):
        rows, columns = points(5, 1, 4, 2), points(5, 1, 4, 2) + first
        gradient[first : first + 4] = torch.einsum("bgmk,bgnk->mn", rows, columns)
        found = use_entries(entries, FactorPair(Dense(rows, first_row=first, full_size=12), Dense(columns)))
        total[found.place : found.place + len(found.values)] += found.values
    torch.testing.assert_close(total, entries.of_gradient(gradient))


@pytest.mark.parametrize("output_size", [0, 10**6])
def test_a_table_that_is_a_linear_layers_weight_too_is_compared_row_by_row(output_size):
    layer = find_layers(nn.Linear(5, 9).double())[0]
    entries = sample_entries(layer, layer.shape(None), output_size, random.Random(0))
    index, columns = torch.randint(9, (4, 3)), points(4, 1, 5, 3)
    row_sparse = OneHot(index, 9, torch.float64)
    gradient = torch.einsum("bgmk,bgnk->mn", row_sparse.dense(), columns)
    torch.testing.assert_close(
        use_entries(entries, FactorPair(row_sparse, Dense(columns))).values, entries.of_gradient(gradient)
    )
    bags = Bags(index.flatten(), torch.arange(4).repeat_interleave(3), points(12), 4, 9)
    gradient = torch.einsum("bgmk,bgnk->mn", bags.dense(), columns[..., :1])
    found = use_entries(entries, FactorPair(bags, Dense(columns[..., :1])))
    torch.testing.assert_close(found.values, entries.of_gradient(gradient))


@pytest.mark.parametrize("size", [1, 2, 7, 8, 30])
def test_spread_rows_are_found_in_every_large_slice(size):
    for seed in range(5):
        spread = Spread.sample(size, min(8, size), random.Random(seed))
        numbers = list(range(size))[spread.as_slice]
        assert len(numbers) == min(8, size)
        for first in range(size):
            for length in range(size - first + 1):
                inside, skipped = spread.inside(first, length)
                found = list(range(first, first + length))[inside]
                assert found == [n for n in numbers if first <= n < first + length]
                assert not found or numbers[skipped] == found[0]


def scaled(model):
    for parameter in model.parameters():
        parameter.grad.mul_(0.5)


def zeroed(model):
    model.zero_grad(set_to_none=False)


def clipped_far(model):
    nn.utils.clip_grad_norm_(model.parameters(), 1e9)


@pytest.mark.parametrize(
    ("between", "reason"),
    [(scaled, CHANGED), (lambda m: clipped(m, None), CHANGED), (zeroed, None), (clipped_far, None)],
)
@pytest.mark.parametrize("index", [(4, 3), (2, 2, 2)])
def test_gradients_that_are_changed_between_backward_passes_leave_their_layers_to_the_base(index, between, reason):
    model, batches = Language(), [torch.randint(11, (size, 4)) for size in index]
    optimizer = NGPlus(model, lr=1e-12, damping=DAMPING, update_every=1)
    for number, batch in enumerate(batches):
        if number == 1:
            between(model)
        oracle.energy(model(batch)).backward()
    clipped(model, None)
    with recorded_warnings() as messages:
        optimizer.step()
    assert [reason in message for message in messages] == ([True] if reason else [])
    assert len(optimizer.curvature) == (0 if reason else 2)


def test_a_hook_that_scales_every_gradient_of_a_weight_is_no_change_between_backward_passes():
    model = Language()
    optimizer = NGPlus(model, lr=1e-12, damping=DAMPING, update_every=1)
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: 0.5 * gradient)
    for _ in range(2):
        oracle.energy(model(torch.randint(11, (6, 4)))).backward()
    with recorded_warnings() as messages:
        optimizer.step()
    assert messages == []
    assert len(optimizer.curvature) == 2


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4)])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_hook_on_a_layers_output_that_scales_its_gradient_is_a_part_of_the_loss(shape, in_place):
    """As reinforcement learning has them, to scale the gradient of a state or of a value."""

    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            seed_cpu(0)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            y = self.first(x)
            if y.requires_grad:
                y.register_hook(lambda gradient: 0.5 * gradient)
            return self.second(y.tanh_() if in_place else y.tanh())

    oracle.check(Halved().double(), points(*shape))


class Stack(nn.Module):
    """A stack of matrices."""

    def __init__(self, groups=4, rows=8, columns=8):
        super().__init__()
        seed_cpu(0)
        self.w = nn.Parameter(torch.randn(groups, rows, columns) * 0.3)

    def forward(self, x):
        return torch.einsum("bgk,gik->bgi", x, self.w)


PENALTIES = {
    "a column": lambda w: w[:, :, 0],
    "a row of each": lambda w: w[:, 1],
    "one matrix": lambda w: w[2],
    "an entry": lambda w: w[1, 2, 3],
}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("shape", [(3, 3, 4), (4, 8, 8), (8, 16, 16)])
def test_a_use_of_a_part_of_a_small_stack_of_matrices_is_found(shape, name):
    model = Stack(*shape).double()
    optimizer = NGPlus(model, lr=1e-12, damping=DAMPING, update_every=1)
    part = PENALTIES[name](model.w)
    (oracle.energy(model(points(5, shape[0], shape[2]))) / 5 + part.square().sum()).backward()
    with pytest.warns(UserWarning, match=f"^w {REASON}"):
        optimizer.step()
    assert optimizer.curvature == {}


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Conv1d(6, 16, 3),
        lambda: nn.Conv2d(8, 16, 3, groups=4, bias=False),
        lambda: nn.Conv2d(4, 8, 3, padding="same", padding_mode="circular"),
        lambda: nn.ConvTranspose1d(6, 8, 3),
        lambda: nn.Linear(40, 2000),
        lambda: nn.Bilinear(3, 4, 5),
    ],
)
def test_a_layer_that_was_found_to_have_other_uses_does_not_come_back_while_it_has_them(build):
    """All of its gradient is compared from then on; without the other use it has its curvature again."""
    model = nn.Sequential(build())
    layer = model[0]
    optimizer = NGPlus(model, lr=1e-12, damping=DAMPING, update_every=1)
    inputs = [(3,), (4,)] if isinstance(layer, nn.Bilinear) else [(40,)]
    if not isinstance(layer, nn.Linear | nn.Bilinear):
        inputs = [(layer.in_channels, *[7] * (layer.weight.dim() - 2))]
    has_curvature = []
    for step in range(40):
        x = [torch.randn(5, *shape) for shape in inputs]
        y = layer(*x) if len(x) > 1 else model(*x)
        other = layer.weight[0].square().sum() if step < 30 else 0.0
        (y.square().mean() + other).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        optimizer.zero_grad()
        has_curvature.append(bool(optimizer.curvature))
    found = has_curvature.index(False)
    assert not any(has_curvature[found:30])
    assert all(has_curvature[30:])


ZERO_INPUTS = {
    "linear": (lambda: nn.Linear(4, 3), (2, 4)),
    "convolution": (lambda: nn.Conv2d(2, 3, 3), (2, 2, 5, 5)),
}


@pytest.mark.parametrize("name", ZERO_INPUTS)
def test_micro_batches_of_zeros_are_not_taken_for_gradients_that_are_gone(name):
    """The weight's gradient is zero there and the bias's is not, as in a recurrent layer's first step."""
    make, shape = ZERO_INPUTS[name]
    seed_cpu(0)
    model, x = make().double(), torch.zeros(*shape, dtype=torch.float64)
    expected = oracle.directions(oracle.energy_gradients(model, torch.cat([x, x])), DAMPING)
    optimizer = NGPlus(model, lr=1e-9, damping=DAMPING, update_every=1)
    with recorded_warnings() as messages:
        for _ in range(2):
            (oracle.energy(model(x)) / 4).backward()
        optimizer.step()
    assert not messages
    assert oracle.error(model, expected) <= 1e-10


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_micro_batches_of_a_cell_without_a_state_match_the_oracle(cell):
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            seed_cpu(0)
            self.cell = cell(4, 3).double()

        def forward(self, x):
            out = self.cell(x)
            return out[0] if isinstance(out, tuple) else out

    model, x = First(), points(4, 4)
    expected = oracle.directions(oracle.energy_gradients(model, x), DAMPING)
    optimizer = NGPlus(model, lr=1e-9, damping=DAMPING, update_every=1)
    for micro in (x[:1], x[1:]):
        (oracle.energy(model(micro)) / 4).backward()
    optimizer.step()
    assert oracle.error(model, expected) <= 1e-10
