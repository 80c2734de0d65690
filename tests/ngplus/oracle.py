"""NG+ made the slow way: one sample at a time through plain autograd, in float64, with dense L or R and dense solves.

Nothing of `ngplus` is used here but `NGPlus` itself, in `descend`, which makes the step that is to be judged.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ngplus import NGPlus

Loss = Callable[[nn.Module], Tensor]
"""The loss of one sample, as a function of the model."""


@dataclass(frozen=True)
class Matrix:
    """Parameters that form one matrix m × n, or ``groups`` of them, of ``rows`` rows, if not as many as fit."""

    weight: str
    bias: str | None = None
    groups: int = 1
    bias_start: int = 0
    rows: int | None = None


def matrices(model: nn.Module) -> list[Matrix]:
    """The matrices of a model, each weight once, with the first bias that comes with it; frozen ones do not count."""
    found: dict[int, Matrix] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def add(weight: str, bias: str, groups: int = 1, bias_start: int = 0) -> None:
        if (kept := parameters.get(weight)) is None or not kept.requires_grad:
            return
        trained = bias in parameters and parameters[bias].requires_grad
        known = found.setdefault(id(kept), Matrix(weight, bias if trained else None, groups, bias_start))
        if known.bias is None and trained:
            found[id(kept)] = replace(known, bias=bias, bias_start=bias_start)

    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            add(f"{prefix}in_proj_weight", f"{prefix}in_proj_bias")
            for place, which in enumerate("qkv"):
                add(f"{prefix}{which}_proj_weight", f"{prefix}in_proj_bias", bias_start=place * module.embed_dim)
        elif isinstance(module, nn.Linear | nn.Embedding | nn.EmbeddingBag):
            add(f"{prefix}weight", f"{prefix}bias")
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            add(f"{prefix}weight", f"{prefix}bias", module.groups)
        elif isinstance(module, nn.modules.conv._ConvTransposeNd):
            add(f"{prefix}weight", "", module.groups)
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
            for own in [own for own in module._parameters if own.startswith("weight")]:
                add(f"{prefix}{own}", f"{prefix}{own.replace('weight', 'bias')}")
        elif type(module).__name__ == "Conv1D":  # of transformers: in × out, its bias apart
            add(f"{prefix}weight", "")
    for name, module in model.named_modules():
        if isinstance(module, NORMS):
            continue
        for own, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and not parameter.is_complex():
                _add_bare(found, module, f"{name}.{own}" if name else own, parameter)
    return list(found.values())


NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU)


def _add_bare(found: dict[int, Matrix], module: nn.Module, name: str, parameter: Tensor) -> None:
    """A parameter that is no module's weight: m × n, a batch of them, or first × rest; ones do not count."""
    sizes = [size for size in parameter.shape if size != 1]
    if len(sizes) < 2:
        return
    bias = f"{name.removesuffix('weight')}bias" if isinstance(module, nn.Bilinear) and module.bias is not None else None
    as_weight = isinstance(
        module, nn.Bilinear | nn.Linear | nn.modules.conv._ConvNd | nn.utils.parametrize.ParametrizationList
    )
    if len(sizes) == 3 and not as_weight:
        found.setdefault(id(parameter), Matrix(name, None, groups=sizes[0], rows=sizes[1]))
    else:
        found.setdefault(id(parameter), Matrix(name, bias, rows=sizes[0]))


def gradient_matrix(model: nn.Module, matrix: Matrix) -> Tensor:
    """The gradient that is there as (groups, m, n), zeros where there is none."""
    return _gradient_matrix(dict(model.named_parameters(remove_duplicate=False)), matrix)


def _gradient_matrix(parameters: dict[str, nn.Parameter], matrix: Matrix) -> Tensor:
    weight = parameters[matrix.weight]
    grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.to_dense()
    G = grad.double().reshape(matrix.groups, matrix.rows or weight.shape[0] // matrix.groups, -1)
    if matrix.bias is None:
        return G
    bias = parameters[matrix.bias]
    column = torch.zeros_like(bias) if bias.grad is None else bias.grad
    column = column[matrix.bias_start : matrix.bias_start + weight.shape[0]].double()
    return torch.cat([G, column.reshape(matrix.groups, -1, 1)], dim=2)


def sample_gradients(model: nn.Module, losses: Sequence[Loss]) -> dict[Matrix, list[Tensor]]:
    """𝒢ᵢ of every matrix, one backward a sample, in float64."""
    return _sample_gradients(copy.deepcopy(model).double(), losses)[0]


def _sample_gradients(
    model: nn.Module, losses: Sequence[Loss]
) -> tuple[dict[Matrix, list[Tensor]], dict[nn.Parameter, Tensor]]:
    """𝒢ᵢ of every matrix of a float64 model, and of every parameter that has one the gradient of the mean loss."""
    gradients: dict[Matrix, list[Tensor]] = {matrix: [] for matrix in matrices(model)}
    means: dict[nn.Parameter, Tensor] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for loss in losses:
        model.zero_grad()
        loss(model).backward()
        for matrix, samples in gradients.items():
            samples.append(_gradient_matrix(parameters, matrix))
        for parameter in model.parameters():
            if parameter.grad is not None:
                share = parameter.grad.to_dense() / len(losses)
                means[parameter] = means[parameter] + share if parameter in means else share
    return gradients, means


def row_gradients(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> dict[Matrix, list[Tensor]]:
    """The gradient of every single position of every layer, N times its share in the gradient of the loss ``run``.

    Each position's comes from plain autograd through the layer alone, with the gradient of its output masked down to
    that position.
    """
    exact = copy.deepcopy(model).double()
    modules = dict(exact.named_modules())
    uses: dict[str, list[tuple[tuple, Tensor]]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple, output: Tensor) -> None:
            output.retain_grad()
            uses.setdefault(name, []).append((args, output))

        return hook

    known = matrices(exact)
    names = {matrix: matrix.weight.rpartition(".")[0] for matrix in known}
    handles = [modules[name].register_forward_hook(record(name)) for name in names.values()]
    run(exact).backward()
    for handle in handles:
        handle.remove()
    return {matrix: _rows(exact, modules[name], matrix, uses[name]) for matrix, name in names.items()}


def _rows(model: nn.Module, module: nn.Module, matrix: Matrix, uses: list[tuple[tuple, Tensor]]) -> list[Tensor]:
    channels = 1 if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else -1
    rows = []
    for args, output in uses:
        args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        for position in itertools.product(*(range(n) for n in output.movedim(channels, 0)[0].shape)):
            mask = torch.zeros_like(output)
            mask.movedim(channels, -1)[position] = 1
            model.zero_grad()
            module(*args).backward(output.grad * mask)
            rows.append(gradient_matrix(model, matrix))
    return [row * len(rows) for row in rows]


def second_moment(samples: Sequence[Tensor]) -> Tensor:
    """L of (4) where m ≤ n, R of (5) elsewhere, for each group."""
    _, m, n = samples[0].shape
    products = [G @ G.mT if m <= n else G.mT @ G for G in samples]
    return sum(products) / len(products)


def only_blocks(moment: Tensor, size: int | None) -> Tensor:
    """The diagonal blocks of (18), zeros elsewhere."""
    if size is None:
        return moment
    block = torch.arange(moment.shape[-1]) // size
    return moment * (block[:, None] == block)


def direction(moment: Tensor, G: Tensor, damping: float) -> Tensor:
    """(λI + L)⁻¹G or G(λI + R)⁻¹, equation (6), by dense solves group after group."""
    damped = moment + damping * torch.eye(moment.shape[-1], dtype=torch.float64)
    if G.shape[1] <= G.shape[2]:
        return torch.stack([torch.linalg.solve(L, g) for L, g in zip(damped, G, strict=True)])
    return torch.stack([torch.linalg.solve(R, g.mT).mT for R, g in zip(damped, G, strict=True)])


def directions(
    gradients: dict[Matrix, list[Tensor]], damping: float, block_size: int | None = None, used: int | None = None
) -> dict[Matrix, Tensor]:
    """The direction of every matrix from its samples' gradients, of which ``used`` make its curvature."""
    return {
        matrix: direction(only_blocks(second_moment(samples[:used]), block_size), sum(samples) / len(samples), damping)
        for matrix, samples in gradients.items()
    }


def descend(model: nn.Module, loss: Loss, **options) -> NGPlus:
    """One NG+ step at learning rate 1e-9; what is left in ``.grad`` is the direction."""
    optimizer = NGPlus(model, lr=1e-9, **{"update_every": 1, **options})
    loss(model).backward()
    optimizer.step()
    return optimizer


def error(model: nn.Module, expected: dict[Matrix, Tensor]) -> float:
    """Largest relative error of any matrix's direction."""
    assert expected
    return max(
        float((gradient_matrix(model, matrix) - D).norm() / D.norm().clamp_min(1e-12)) for matrix, D in expected.items()
    )


def energy(output) -> Tensor:
    """A loss without targets: a sum over everything in the output."""
    outputs = output if isinstance(output, tuple) else (output,)
    return sum((o.sin() + 0.5 * o.square()).sum() for o in outputs if o is not None)


def sample_losses(*inputs, batch_dim: int = 0) -> list[Loss]:
    """The energy of each sample of a batch of inputs."""
    batch = inputs[0].shape[batch_dim]
    return [lambda m, i=i: energy(m(*sample(inputs, i, batch_dim))) for i in range(batch)]


def batch_loss(*inputs, batch_dim: int = 0) -> Loss:
    """The mean energy of a batch of inputs."""
    return lambda m: energy(m(*inputs)) / inputs[0].shape[batch_dim]


def energy_gradients(model: nn.Module, *inputs: Tensor) -> dict[Matrix, list[Tensor]]:
    """𝒢ᵢ of every matrix for the energy of each sample of a batch of inputs."""
    return sample_gradients(model, sample_losses(*inputs))


def sample(inputs: Sequence, number: int, batch_dim: int = 0) -> list:
    """One sample of a batch of inputs."""
    return [x.narrow(batch_dim, number, 1) if isinstance(x, Tensor) else x for x in inputs]


def doubled(inputs: Sequence) -> list:
    """Floating-point inputs in float64."""
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def check(model, *inputs, batch_dim=0, samples="batch", damping=0.3, **options) -> NGPlus:
    """One step on the mean energy of a batch of inputs, judged against the oracle to the tolerance of its dtype."""
    dtype = next(model.parameters()).dtype
    batch = inputs[0].shape[batch_dim]
    exact = doubled(inputs)
    if samples == "rows":
        gradients = row_gradients(model, lambda m: energy(m(*exact)) / batch)
    else:
        parts = [sample(exact, i, batch_dim) for i in range(batch)]
        gradients = sample_gradients(model, [lambda m, x=x: energy(m(*x)) for x in parts])
    optimizer = descend(
        model, lambda m: energy(m(*inputs)) / batch, damping=damping, samples=samples, batch_dim=batch_dim, **options
    )
    expected = directions(gradients, damping, options.get("block_size"), options.get("max_samples"))
    assert error(model, expected) <= TOLERANCE[dtype]
    return optimizer


@dataclass
class PlainLoop:
    """NG+ over plain SGD as a loop on a float64 model: multi-step inverses, EMA (11), blocks (18).

    A matrix without a gradient on a curvature step gets its curvature on the next step that has one.
    """

    model: nn.Module
    lr: float
    damping: float
    update_every: int = 1
    ema: float = 0.0
    block_size: int | None = None
    averages: dict[Matrix, Tensor] = field(default_factory=dict)
    steps: int = 0

    def step(self, losses: Sequence[Loss]) -> None:
        """One step on the mean of the samples' losses."""
        gradients, means = _sample_gradients(self.model, losses)
        if self.steps % self.update_every == 0:
            for matrix, samples in gradients.items():
                self._average(matrix, second_moment(samples))
        self.steps += 1
        for parameter in self.model.parameters():
            parameter.grad = means.get(parameter)
        for matrix, samples in gradients.items():
            moment = only_blocks(self.averages[matrix], self.block_size)
            self._put(matrix, direction(moment, sum(samples) / len(samples), self.damping))
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= self.lr * parameter.grad

    def _average(self, matrix: Matrix, moment: Tensor) -> None:
        before = self.averages.get(matrix)
        self.averages[matrix] = moment if before is None else self.ema * before + (1 - self.ema) * moment

    def _put(self, matrix: Matrix, D: Tensor) -> None:
        """The direction in place of the gradient."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        weight = parameters[matrix.weight]
        if weight.grad is None:
            return
        if matrix.bias is not None:
            rows = slice(matrix.bias_start, matrix.bias_start + weight.shape[0])
            parameters[matrix.bias].grad[rows] = D[:, :, -1].flatten()
            D = D[:, :, :-1]
        weight.grad = D.reshape(weight.shape)
