"""How a layer becomes a matrix: which parameters form it.

A layer's matrix is m × n = out × (in / groups · kernel), one for each group of a convolution, with the bias as
one more column. For an embedding it is table rows × dimensions, for a transposed convolution, which stores its weight
the other way around, in / groups × (out / groups · kernel), for a bilinear layer out × (in₁ · in₂).

A bare parameter is a matrix too, whoever uses it. Dimensions of size one do not count. One of two others is m × n, one
of three is a batch of matrices, as `torch.bmm` takes it, and one of more is first × rest. Where only one dimension is
left, the parameter is a vector (a class token, a scale for each channel) and no layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

Side = Literal["left", "right"]


@dataclass(frozen=True, kw_only=True)
class MatrixShape:
    """What is built for a layer.

    Attributes:
        groups: number of independent m×n matrices (a grouped convolution's groups).
        rows: m.
        columns: n, the bias's column counted.
        block_size: p of (18); None for whole matrices.
        chosen_side: whose matrix is built, in place of the smaller one's; None for that.
    """

    groups: int
    rows: int
    columns: int
    block_size: int | None = None
    chosen_side: Side | None = None

    @property
    def side(self) -> Side:
        """The smaller side: (4) where m ≤ n, else (5)."""
        return self.chosen_side or ("left" if self.rows <= self.columns else "right")

    @property
    def short(self) -> int:
        """Side length p of L or R."""
        return self.rows if self.side == "left" else self.columns

    @property
    def long(self) -> int:
        """The other side q."""
        return self.columns if self.side == "left" else self.rows

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of whole diagonal blocks of a matrix, and the size of the one that is left over."""
        return divmod(self.short, self._size)

    @property
    def _size(self) -> int:
        """Of a whole block, which is no longer than the matrix."""
        return min(self.block_size or self.short, self.short)

    @property
    def stack_shapes(self) -> list[tuple[int, int, int]]:
        """Shapes of the batches of blocks: all whole blocks of all groups, then the left-over ones."""
        count, rest = self.blocks
        size = self._size
        shapes = [(self.groups * count, size, size)] if count else []
        return [*shapes, (self.groups, rest, rest)] if rest else shapes


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
SUPPORTED = (
    nn.Linear,
    *CONVOLUTIONS,
    *TRANSPOSED_CONVOLUTIONS,
    *EMBEDDINGS,
    nn.MultiheadAttention,
    *RECURRENT,
    nn.Bilinear,
)

# GPT-2's linear layer, x W + b with W of in × out, known by name: torch alone is needed here.
TRANSPOSED_LINEAR = "transformers.pytorch_utils.Conv1D"

# Their parameters have no matrix form that (2) speaks of; they go to the base optimizer without a warning.
VECTORS = (
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.PReLU,
)


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight matrix of a model: a description that does not change.

    Attributes:
        name: of the weight in ``model.named_parameters()``.
        weight: the parameter.
        bias: the bias that is the matrix's last column, or None.
        bias_start: where this layer's bias begins in ``bias`` (attention packs three into one).
        groups: of a convolution, else 1.
        batch_dim: the sample dimension of a linear layer's input.
        knows_samples: whether it is a part of an `nn.MultiheadAttention` or of a recurrent layer, which know theirs.
        row_sparse: whether a gradient may have many rows of zeros: that of an embedding, or of an unknown module.
        flattens: whether its module multiplies (rows, features), whatever the shape of its input.
        bare: whether its weight is a parameter that no supported module has as its weight.
        batched: whether the weight's dimensions that are not of size one are those of a batch of matrices.
    """

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    bias_start: int = 0
    groups: int = 1
    batch_dim: int = 0
    knows_samples: bool = False
    row_sparse: bool = False
    flattens: bool = False
    bare: bool = False
    batched: bool = False

    def without_bias(self) -> Layer:
        """The layer of the weight alone."""
        return replace(self, bias=None)

    def describe(self) -> str:
        """What must be the same on all processes, in words."""
        bias = " with a trained bias" if self.trained_bias is not None else ""
        return f"{self.name} {tuple(self.weight.shape)} {self.weight.dtype}{bias}"

    def equals(self, other: Layer) -> bool:
        """Whether both describe the same parameters in the same way."""
        return self.weight is other.weight and self.bias is other.bias and self._settings == other._settings

    @property
    def _settings(self) -> tuple[Any, ...]:
        flags = self.knows_samples, self.row_sparse, self.flattens, self.bare, self.batched
        return self.name, self.bias_start, self.groups, self.batch_dim, *flags

    @property
    def module(self) -> str:
        """Name of the module that the weight is a parameter of."""
        return self.name.rpartition(".")[0]

    def shape(self, block_size: int | None) -> MatrixShape:
        """Shape of the layer's matrix now, the bias counted if it is trained."""
        groups, rows, columns = self.matrix
        columns += self.trained_bias is not None
        return MatrixShape(groups=groups, rows=rows, columns=columns, block_size=block_size)

    def possible_shapes(self, block_size: int | None) -> list[MatrixShape]:
        """`shape`, and with the bias counted where that is frozen with its weight.

        As long as neither has a gradient, such a layer keeps the matrix that it has had, and its curvature with it.
        """
        shape = self.shape(block_size)
        frozen = not self.weight.requires_grad and self.weight.grad is None
        if self.bias is None or self.trained_bias is not None or not frozen:
            return [shape]
        return [shape, replace(shape, columns=shape.columns + 1)]

    @property
    def matrix(self) -> tuple[int, int, int]:
        """Groups, rows and columns of the weight, which is stored in this order."""
        shape = self.weight.shape
        if not self.batched:
            return self.groups, shape[0] // self.groups, math.prod(shape[1:])
        sizes = [size for size in shape if size != 1]
        groups, rows = (sizes[0], sizes[1]) if len(sizes) == 3 else (1, sizes[0])
        return groups, rows, self.weight.numel() // (groups * rows)

    @property
    def rows_each(self) -> int:
        """How many rows of its matrices each index of the weight's first dimension has."""
        groups, rows, _ = self.matrix
        return groups * rows // len(self.weight)

    @property
    def trained_bias(self) -> nn.Parameter | None:
        """The bias, unless it is frozen; one that was frozen after it got a gradient is trained with it."""
        bias = self.bias
        return bias if bias is not None and (bias.requires_grad or bias.grad is not None) else None

    @property
    def bias_slice(self) -> slice:
        """This layer's part of ``bias``."""
        return slice(self.bias_start, self.bias_start + self.weight.shape[0])


def find_layers(model: nn.Module, batch_dim: int | Mapping[str, int] = 0, *, every_matrix: bool = False) -> list[Layer]:
    """Find the layers of a model that NG+ can precondition, each weight once however many modules share it.

    A complex weight, one without entries, or one of a scripted module is no layer. A bias that modules of different
    weights share is no column of any matrix: its gradient is that of all its uses.

    Args:
        model: the model.
        batch_dim: see `NGPlus`.
        every_matrix: whether parameters of other modules are taken too, behind those of supported ones.

    Returns:
        The layers, in the order of the model's modules.
    """
    modules = [(prefix, each) for prefix, each in model.named_modules() if not isinstance(each, torch.jit.ScriptModule)]
    every = [layer for prefix, module in modules for layer in _module_layers(prefix, module)]
    if every_matrix:
        every += [layer for prefix, module in modules for layer in _bare_layers(prefix, module)]
    found = [layer for layer in every if _is_matrix(layer.weight)]
    shared = _find_shared_biases(found)
    layers: dict[int, Layer] = {}
    for layer in found:
        bias = None if id(layer.bias) in shared else layer.bias
        known = layers.get(id(layer.weight))
        if known is None:
            found_dim = _find_batch_dim(batch_dim, layer.module)
            layers[id(layer.weight)] = replace(layer, bias=bias, batch_dim=found_dim)
        elif known.bias is None:
            layers[id(layer.weight)] = replace(known, bias=bias, bias_start=layer.bias_start)
    return list(layers.values())


def _find_shared_biases(layers: Sequence[Layer]) -> set[int]:
    """The ids of the biases of which some entry is used with different weights."""
    users: dict[int, list[Layer]] = {}
    for layer in layers:
        if layer.bias is not None:
            users.setdefault(id(layer.bias), []).append(layer)
    pairs = [pair for together in users.values() for pair in itertools.combinations(together, 2)]
    return {
        id(one.bias)
        for one, other in pairs
        if one.weight is not other.weight
        and max(one.bias_start, other.bias_start) < min(one.bias_slice.stop, other.bias_slice.stop)
    }


def find_parameter_layers(groups: Iterable[Mapping[str, Any]]) -> list[Layer]:
    """Take every real parameter of two or more dimensions as a matrix out × rest, where there is no model.

    Args:
        groups: parameter groups.

    Returns:
        The layers, in the order of the parameters.
    """
    layers = []
    for number, group in enumerate(groups):
        names = group.get("param_names", [f"group {number} parameter {i}" for i in range(len(group["params"]))])
        layers += [
            Layer(name, parameter, None, row_sparse=parameter.dim() == 2)
            for name, parameter in zip(names, group["params"], strict=True)
            if parameter.dim() > 1 and _is_matrix(parameter)
        ]
    return layers


def _is_matrix(weight: Tensor) -> bool:
    return weight.numel() > 0 and not weight.is_complex()


def _is_vector(parameter: Tensor) -> bool:
    """Whether at most one dimension is of another size than one."""
    return sum(size != 1 for size in parameter.shape) < 2


def find_unsupported_matrices(model: nn.Module, covered: Iterable[Layer]) -> dict[str, nn.Parameter]:
    """Find the trained matrices of a model that no layer covers.

    Args:
        model: the model.
        covered: the layers that are found in it.

    Returns:
        Each by ``name (kind of its module)``.
    """
    known = {id(layer.weight) for layer in covered}
    return {
        f"{prefix}{'.' if prefix else ''}{name} ({type(module).__name__})": parameter
        for prefix, module in model.named_modules()
        if not isinstance(module, VECTORS)
        for name, parameter in module._parameters.items()
        if parameter is not None
        and not _is_vector(parameter)
        and parameter.numel()
        and parameter.requires_grad
        and id(parameter) not in known
    }


def _find_batch_dim(batch_dim: int | Mapping[str, int], module: str) -> int:
    """The entry of the longest module name that ``module`` is or is inside of, else of the first pattern that fits.

    0 where there is none.
    """
    if not isinstance(batch_dim, Mapping):
        return batch_dim
    above = [name for name in batch_dim if name in ("", module) or module.startswith(name + ".")]
    if above:
        return batch_dim[max(above, key=len)]
    return next((dim for pattern, dim in batch_dim.items() if fnmatchcase(module, pattern)), 0)


def _module_layers(prefix: str, module: nn.Module) -> Iterator[Layer]:
    def named(parameter: str) -> str:
        return f"{prefix}.{parameter}" if prefix else parameter

    own = module._parameters  # a parametrized weight (weight_norm, say) is not among them
    bias = own.get("bias")
    if isinstance(module, nn.MultiheadAttention):
        yield from _attention_layers(named, module)
    elif isinstance(module, RECURRENT):
        yield from _recurrent_layers(named, module)
    elif isinstance(module, SUPPORTED) and (weight := own.get("weight")) is not None:
        groups = getattr(module, "groups", 1)
        of_attention = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)  # what it calls out_proj
        row_sparse = isinstance(module, EMBEDDINGS)
        if isinstance(module, TRANSPOSED_CONVOLUTIONS):  # its bias would be one more row
            bias = None
        yield Layer(named("weight"), weight, bias, groups=groups, knows_samples=of_attention, row_sparse=row_sparse)
    elif is_transposed_linear(module) and (weight := own.get("weight")) is not None:
        yield Layer(named("weight"), weight, None, flattens=True)  # its bias would be one more row, which no layer has


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is GPT-2's linear layer of transformers.

    Args:
        module: any.

    Returns:
        Whether it is, by its name.
    """
    return any(f"{kind.__module__}.{kind.__qualname__}" == TRANSPOSED_LINEAR for kind in type(module).__mro__)


def _attention_layers(named: Callable[[str], str], module: nn.MultiheadAttention) -> Iterator[Layer]:
    bias = module._parameters.get("in_proj_bias")
    names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    projections = [(name, module._parameters.get(name)) for name in names]
    start = 0
    for name, weight in projections:
        if weight is not None:
            yield Layer(named(name), weight, bias, bias_start=start, knows_samples=True)
            start += weight.shape[0]


def _recurrent_layers(named: Callable[[str], str], module: nn.Module) -> Iterator[Layer]:
    """W_ih, W_hh and W_hr of every layer and direction, the first two with the bias of the same name."""
    own = module._parameters
    for name, weight in own.items():
        if name.startswith("weight_") and weight is not None:
            bias = own.get(name.replace("weight", "bias"))
            yield Layer(named(name), weight, bias, knows_samples=True)


def _bare_layers(prefix: str, module: nn.Module) -> Iterator[Layer]:
    """The module's own matrices, whether supported layers have them or not.

    What weight_norm and the like make a supported module's weight of is out × rest, as the weight is.
    """
    if isinstance(module, VECTORS):
        return
    of_weight = isinstance(module, (*SUPPORTED, nn.utils.parametrize.ParametrizationList))
    for name, parameter in module._parameters.items():
        if parameter is not None and not _is_vector(parameter):
            full_name = f"{prefix}.{name}" if prefix else name
            yield Layer(full_name, parameter, None, bare=True, batched=not of_weight)


def rekey_layers[T](values: Mapping[Layer, T], layers: Iterable[Layer]) -> dict[Layer, T]:
    """``values`` by the layers of ``layers`` with the same weights; those of other weights are dropped."""
    by_weight = {id(layer.weight): value for layer, value in values.items()}
    return {layer: by_weight[id(layer.weight)] for layer in layers if id(layer.weight) in by_weight}


def stored_values(gradient: Tensor) -> Tensor:
    """The stored elements of a gradient, in its own memory: of a sparse one its rows."""
    return gradient._values() if gradient.is_sparse else gradient


def to_row_sparse(gradient: Tensor) -> Tensor:
    """A gradient that is sparse in several dimensions as one that is so in its first alone; others as they are."""
    if not gradient.is_sparse or gradient.sparse_dim() == 1:
        return gradient
    return gradient.to_dense().to_sparse(1)


def to_matrix(layer: Layer, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """View a weight-shaped tensor as matrices, or copy it where it cannot be viewed.

    Args:
        layer: whose matrices they are.
        tensor: of the shape of its weight.
        dtype: of the matrices.

    Returns:
        (groups, m, n without the bias's column).
    """
    G = tensor if tensor.dtype == dtype else tensor.to(dtype)
    return G.reshape(layer.matrix)


__all__ = [
    "SUPPORTED",
    "Layer",
    "MatrixShape",
    "Side",
    "find_layers",
    "find_parameter_layers",
    "find_unsupported_matrices",
    "is_transposed_linear",
    "rekey_layers",
    "stored_values",
    "to_matrix",
    "to_row_sparse",
]
