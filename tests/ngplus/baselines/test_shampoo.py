import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngplus.baselines import KFAC, Shampoo


class Tensors(nn.Module):
    """Parameters of zero to four dimensions, with a gradient of one's choice."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"scalar": (), "vector": (5,), "matrix": (4, 3), "cube": (2, 3, 4), "kernel": (3, 2, 2, 1)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))


def give(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def power(matrix: Tensor, exponent: float) -> Tensor:
    U, S, _ = torch.linalg.svd(matrix)
    return U @ S.pow(exponent).diag() @ U.T


class Plain:
    """Shampoo of one tensor with every matrix written out: L₁ ⊗ L₂ ⊗ … on the gradient as a vector."""

    def __init__(self, shape, damping: float, ema: float | None = None, max_side: int = 100) -> None:
        self.shape, self.damping, self.ema = shape, damping, ema
        self.kept = [size <= max_side for size in shape]
        self.L: list[Tensor | None] = [None] * len(shape)
        self.product = None

    def gather(self, G: Tensor) -> None:
        for side, size in enumerate(self.shape):
            rows = [G.select(side, i).flatten() for i in range(size)]
            new = torch.stack([torch.stack([a @ b for b in rows]) for a in rows])
            if self.L[side] is None:
                self.L[side] = new
            else:
                self.L[side] = (
                    self.L[side] + new if self.ema is None else self.ema * self.L[side] + (1 - self.ema) * new
                )

    def make_roots(self) -> None:
        self.product = torch.ones(1, 1)
        for L, kept in zip(self.L, self.kept, strict=True):
            eye = torch.eye(len(L))
            root = power(L + self.damping * eye, -1 / (2 * sum(self.kept))) if kept else eye
            self.product = torch.kron(self.product, root)

    def direction(self, G: Tensor) -> Tensor:
        return (self.product @ G.flatten()).view_as(G)


@pytest.mark.parametrize("ema", [None, 0.8])
def test_directions_are_the_products_of_roots_written_out_and_roots_are_kept_between_updates(ema):
    model = Tensors()
    optimizer = Shampoo(model, lr=1e-9, damping=1e-3, update_every=6, ema=ema)
    plain = {name: Plain(p.shape, 1e-3, ema) for name, p in model.named_parameters() if p.dim()}
    for step in range(14):
        gradients = give(model, step)
        optimizer.step()
        for name, oracle in plain.items():
            oracle.gather(gradients[name])
            if step in (0, 1, 2, 4, 6, 12):
                oracle.make_roots()
            expected = oracle.direction(gradients[name])
            torch.testing.assert_close(model.get_parameter(name).grad, expected, rtol=1e-8, atol=1e-12)
        assert torch.equal(model.scalar.grad, gradients["scalar"])


def test_pytorch_optimizers_shampoo_makes_the_same_steps_where_roots_are_made_on_every_step():
    from pytorch_optimizer import Shampoo as Theirs

    one, other = Tensors(), Tensors()
    for model in (one, other):
        del model.scalar
    other.load_state_dict(one.state_dict())
    ours = Shampoo(one, lr=0.1, damping=1e-4, update_every=1)
    theirs = Theirs(other.parameters(), lr=0.1, matrix_eps=1e-4, preconditioning_compute_steps=1)
    for step in range(5):
        give(one, step)
        give(other, step)
        ours.step()
        theirs.step()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_a_long_side_is_left_as_it_is_and_the_others_take_its_share():
    model = nn.Linear(6, 3, bias=False)
    optimizer = Shampoo(model, lr=1e-9, damping=1e-3, max_side=4)
    plain = Plain((3, 6), 1e-3, max_side=4)
    for step in range(3):
        gradients = give(model, step)
        optimizer.step()
        plain.gather(gradients["weight"])
        plain.make_roots()
        torch.testing.assert_close(model.weight.grad, plain.direction(gradients["weight"]), rtol=1e-8, atol=1e-12)


def test_a_tensor_without_a_short_side_goes_to_the_base():
    model = nn.Linear(6, 7)
    optimizer = Shampoo(model, lr=0.5, max_side=4)
    before = copy.deepcopy(model)
    gradients = give(model, 0)
    optimizer.step()
    assert torch.equal(model.weight, before.weight - 0.5 * gradients["weight"])
    assert not optimizer.curvature


def test_grafting_keeps_the_length_of_each_gradient():
    model, other = Tensors(), Tensors()
    grafted = Shampoo(model, lr=1e-9, grafting="sgd")
    plain = Shampoo(other, lr=1e-9)
    for step in range(2):
        gradients = give(model, step)
        give(other, step)
        grafted.step()
        plain.step()
    for name, parameter in model.named_parameters():
        D, G = other.get_parameter(name).grad, gradients[name]
        torch.testing.assert_close(parameter.grad, D * (G.norm() / D.norm()), rtol=1e-9, atol=0.0)


def test_grafting_a_gradient_of_zeros_gives_zeros():
    model = nn.Linear(3, 2)
    optimizer = Shampoo(model, lr=0.1, grafting="sgd")
    give(model, 0)
    optimizer.step()
    before = model.weight.clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(model.weight, before)


def test_a_gradient_that_is_not_finite_changes_neither_parameters_nor_matrices():
    model = nn.Linear(3, 2)
    optimizer = Shampoo(model, lr=0.1, update_every=1, ema=0.5)
    give(model, 0)
    optimizer.step()
    weight, L = model.weight.clone(), [m.clone() for m in optimizer.curvature["weight"].average]
    give(model, 1)
    model.weight.grad[0, 0] = torch.inf
    optimizer.step()
    assert torch.equal(model.weight, weight)
    assert all(torch.equal(a, b) for a, b in zip(optimizer.curvature["weight"].average, L, strict=True))
    assert optimizer.skipped_steps == 1


def test_a_first_gradient_that_is_not_finite_leaves_the_tensor_to_the_next_step():
    model = nn.Linear(3, 2, bias=False)
    optimizer = Shampoo(model, lr=0.1, damping=1e-3, update_every=5)
    model.weight.grad = torch.full_like(model.weight, torch.nan)
    optimizer.step()
    gradients = give(model, 1)
    optimizer.step()
    plain = Plain((2, 3), 1e-3)
    plain.gather(gradients["weight"])
    plain.make_roots()
    torch.testing.assert_close(model.weight.grad, plain.direction(gradients["weight"]), rtol=1e-8, atol=1e-12)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4))


def cross_entropy_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def test_it_trains_a_small_network():
    x, y = torch.randn(64, 2, 6, 6), torch.randint(4, (64,))
    model = network()
    optimizer = Shampoo(model, lr=0.1, update_every=5, grafting="sgd", momentum=0.9)
    losses = [cross_entropy_step(model, optimizer, x, y) for _ in range(40)]
    assert losses[-1] < 0.1 * losses[0]


def test_a_saved_state_and_a_pickled_copy_go_on_to_the_bit():
    torch.set_default_dtype(torch.float32)
    x, y = torch.randn(7, 8, 2, 6, 6), torch.randint(4, (7, 8))
    model = network()
    optimizer = Shampoo(model, lr=0.1, update_every=3, momentum=0.9)
    for step in range(4):
        cross_entropy_step(model, optimizer, x[step], y[step])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    other = copy.deepcopy(model)
    resumed = Shampoo(other, lr=1.0, update_every=3, momentum=0.1)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    copied = pickle.loads(pickle.dumps(optimizer))
    for step in range(4, 7):
        for one, stepper in ((model, optimizer), (other, resumed), (copied._model, copied)):
            cross_entropy_step(one, stepper, x[step], y[step])
    for a, b, c in zip(model.parameters(), other.parameters(), copied._model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("ema", [None, 0.5])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_model_whose_precision_changes_goes_on_in_the_new_one(dtypes, ema):
    models = [nn.Linear(4, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[0].to(dtypes[0])
    changing, steady = (Shampoo(model, lr=0.1, damping=0.1, update_every=1, ema=ema) for model in models)
    for seed in range(4):
        models[0].to(dtypes[seed > 1])
        for model, optimizer in zip(models, (changing, steady), strict=True):
            gradients = give(models[1], seed)
            for name, parameter in model.named_parameters():
                parameter.grad = gradients[name].to(parameter.dtype)
            optimizer.step()
    assert all(tensor.dtype == dtypes[1] for state in changing.curvature.values() for tensor in state.tensors())
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_states_of_other_optimizers_are_refused():
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="this is no state of Shampoo"):
        Shampoo(model).load_state_dict(KFAC(model).state_dict())


def test_a_module_of_any_kind_is_preconditioned_without_a_warning(recwarn):
    model = nn.LSTM(3, 2)
    optimizer = Shampoo(model, lr=0.1)
    give(model, 0)
    optimizer.step()
    assert set(optimizer.curvature) == {name for name, _ in model.named_parameters()}
    assert not recwarn.list
    assert "ShampooState(sides {0: 8, 1: 3}" in repr(optimizer.curvature)


def test_a_sparse_gradient_is_refused_by_name():
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = Shampoo(model, lr=0.1)
    model(torch.tensor([0, 1])).sum().backward()
    with pytest.raises(TypeError, match="the gradient of weight is sparse"):
        optimizer.step()


def test_groups_have_their_own_damping():
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "damping": 10.0}]
    optimizer = Shampoo(model, lr=1e-9, damping=1e-3, params=groups)
    give(model, 0)
    model[1].weight.grad = model[0].weight.grad.clone()
    G = model[0].weight.grad.clone()
    optimizer.step()
    for layer, damping in zip(model, (1e-3, 10.0), strict=True):
        plain = Plain((2, 3), damping)
        plain.gather(G)
        plain.make_roots()
        torch.testing.assert_close(layer.weight.grad, plain.direction(G), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema": 1.0}, r"ema must be in \[0, 1\), or None for the sum, got 1.0"),
        ({"ema": True}, "ema must be a number"),
        ({"max_side": 0}, "max_side must be an integer ≥ 1, got 0"),
        ({"grafting": "adam"}, "grafting must be one of 'none', 'sgd', got 'adam'"),
        ({"damping": -1.0}, "damping must be a finite number > 0"),
        ({"update_every": 0}, "update_every must be an integer ≥ 1"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Shampoo(nn.Linear(2, 2), **options)
