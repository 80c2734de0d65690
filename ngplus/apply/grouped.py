"""Small matrices across layers: their directions (6) with as few calls as can be.

The product of two small matrices takes less time than the calls around it, and a model may have dozens: the tables of a
DLRM, the 1×1 convolutions of a mobile network, the blocks of (18). Those of equal shape are one product. Of the
others each is one of its own, but they are written back, and checked for NaN, together.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ngplus.guards.finite_check import FiniteCheck
from ngplus.layers import Layer, MatrixShape, stored_values
from ngplus.solvers.preconditioner import Preconditioner
from ngplus.tuning import DEFAULT, Tuning


@dataclass(frozen=True, eq=False)
class PreconditionedLayer:
    """A layer whose gradient is to be preconditioned.

    Attributes:
        layer: it has a gradient.
        preconditioner: its (λI + L)⁻¹ or (λI + R)⁻¹.
        shape: of its matrix.
    """

    layer: Layer
    preconditioner: Preconditioner
    shape: MatrixShape


class EqualShapes:
    """Members of equal shape, whose directions are one product.

    Args:
        members: two at least.
        inverses: of all of them, (layers · blocks, p, p); each member's own is a view of it: none is stored twice.
        tuning: of which directions the memory is kept.
    """

    def __init__(self, members: Sequence[PreconditionedLayer], inverses: Tensor, tuning: Tuning = DEFAULT) -> None:
        self.members = members
        weights = [member.layer.weight for member in members]
        biases = [bias for member in members if (bias := member.layer.trained_bias) is not None]
        left = members[0].shape.side == "left"
        self._products = [
            _StackedProduct(each, inverses, left, tuning.kept_direction) for each in (weights, biases) if each
        ]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those whose gradients are replaced."""
        return [parameter for product in self._products for parameter in product.parameters]

    @property
    def is_tiny(self) -> bool:
        """Whether the gradients have so few elements that a look at each would take longer than to stack them."""
        return all(product.is_tiny for product in self._products)

    def stack(self) -> bool:
        """Stack gradients that are tiny, for `precondition_`.

        Returns:
            Whether they are still what this was made for; else nothing has changed.
        """
        return all(product.stack() for product in self._products)

    def precondition_(self, check: FiniteCheck) -> None:
        """Replace the gradients by their directions in place, and add these to ``check``."""
        for product in self._products:
            product.replace_(check)


class _StackedProduct:
    """Gradients of equal shape, which are multiplied as one stack.

    Of the tiniest the memory of the directions is kept, and all views of it: making those takes longer than the
    product. So does a look at each gradient, which the stack of them makes needless: its form tells what they are.

    Args:
        parameters: whose gradients they are.
        inverses: (layers · blocks, p, p).
        left: whether they are multiplied from the left.
        kept_up_to: elements of a direction up to which its memory is kept.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], inverses: Tensor, left: bool, kept_up_to: int) -> None:
        self.parameters = parameters
        self._ids = frozenset(map(id, parameters))
        self._inverses = inverses
        self._left = left
        gradients = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
        self._is_sparse = any(gradient.is_sparse for gradient in gradients)
        self._form = (len(parameters), *gradients[0].shape), inverses.dtype, torch.strided
        self.is_tiny = gradients[0].numel() <= kept_up_to and not self._is_sparse
        self._directions: tuple[Tensor, tuple[Tensor, ...]] | None = None
        self._stacked: tuple[list[Tensor], Tensor] | None = None

    def stack(self) -> bool:
        """See `EqualShapes.stack`."""
        gradients = [parameter.grad for parameter in self.parameters]
        try:
            G = torch.stack(gradients)  # type: ignore[arg-type]
        except (TypeError, RuntimeError):  # one is missing, or is of another shape, layout or device
            return False
        self._stacked = gradients, G  # type: ignore[assignment]
        return (G.shape, G.dtype, G.layout) == self._form and G.device == self._inverses.device

    def replace_(self, check: FiniteCheck) -> None:
        """See `EqualShapes.precondition_`."""
        inverses = self._inverses
        gradients, G = self._stacked or self._collect()
        self._stacked = None
        if self._left:
            factors = inverses, G.view(*inverses.shape[:2], -1)  # times (layers · blocks, p, q)
        else:
            factors = G.view(len(inverses), -1, inverses.shape[1]), inverses  # (layers, q, p) times
        if self._directions is None:
            D = torch.bmm(*factors)
            directions = D.view(G.shape).unbind()
            self._directions = (D, directions) if self.is_tiny else None
        else:
            D, directions = self._directions
            torch.bmm(*factors, out=D)
        torch._foreach_copy_(gradients, directions)
        check.add(D)
        check.checked |= self._ids

    def _collect(self) -> tuple[list[Tensor], Tensor]:
        """The gradients, of sparse ones the rows, and the stack of them."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if self._is_sparse:
            gradients = [stored_values(gradient) for gradient in gradients]
        return gradients, torch.stack(gradients)


@dataclass(frozen=True, eq=False)
class GroupedProduct:
    """The product of one member of a `MixedShapes`, and the memory of its direction.

    Attributes:
        layer: of the member.
        inverse: (λI + L)⁻¹, (p, p).
        left: whether it is multiplied from the left.
        product: the matrix's direction; on the right with the column of a bias, if there is one.
        column: on the left the direction of a bias, if there is one.
    """

    layer: Layer
    inverse: Tensor
    left: bool
    product: Tensor
    column: Tensor | None

    def multiply_(self) -> list[Tensor]:
        """Write the direction into ``product`` and ``column``.

        Returns:
            The gradients, of the weight and, if there is one, of the bias.
        """
        gradients = _gradients(self.layer)
        G = gradients[0]
        if G.dim() != 2:
            side = len(self.inverse)
            G = G.view(side, -1) if self.left else G.view(-1, side - (len(gradients) - 1))
        if self.left:
            torch.mm(self.inverse, G, out=self.product)
            if self.column is not None:
                torch.mv(self.inverse, gradients[1], out=self.column)
        else:
            GB = G if len(gradients) == 1 else torch.cat([G, gradients[1].unsqueeze(1)], dim=1)
            torch.mm(GB, self.inverse, out=self.product)
        return gradients

    def directions(self) -> list[Tensor]:
        """What belongs in the gradients that `multiply_` returns, in their shapes."""
        shapes = [gradient.shape for gradient in _gradients(self.layer)]
        if len(shapes) == 1:
            return [self.product.view(shapes[0])]
        if self.column is not None:
            return [self.product.view(shapes[0]), self.column]
        return [self.product[:, :-1].view(shapes[0]), self.product[:, -1]]


def _gradients(layer: Layer) -> list[Tensor]:
    """Of its weight and, if that is trained, its bias, which must have one; of a sparse one the rows."""
    weight, bias = layer.weight.grad, layer.trained_bias
    assert weight is not None
    if bias is None:
        return [stored_values(weight)]
    assert bias.grad is not None
    return [stored_values(weight), bias.grad]


def _make_product(member: PreconditionedLayer, place: Tensor) -> GroupedProduct:
    """One with its direction in ``place``, of as many elements as its gradients."""
    layer, inverse, left = member.layer, member.preconditioner.main[0], member.shape.side == "left"
    if not left:
        return GroupedProduct(layer, inverse, left, place.view(-1, len(inverse)), None)
    places = torch.split(place, [gradient.numel() for gradient in _gradients(layer)])
    column = places[1] if len(places) > 1 else None
    return GroupedProduct(layer, inverse, left, places[0].view(len(inverse), -1), column)


class MixedShapes:
    """Members of whatever shapes: a product each, and the rest at once for all.

    Args:
        members: one at least, with gradients as `precondition_` will find them.
    """

    def __init__(self, members: Sequence[PreconditionedLayer]) -> None:
        self.members = members
        sizes = [sum(gradient.numel() for gradient in _gradients(member.layer)) for member in members]
        # Kept, as are all views of it: making them takes about as long as the products do.
        self._buffer = members[0].preconditioner.main.new_empty(sum(sizes))
        places = torch.split(self._buffer, sizes)
        self._products = [_make_product(member, place) for member, place in zip(members, places, strict=True)]
        self._directions = [direction for product in self._products for direction in product.directions()]
        layers = [member.layer for member in members]
        self._parameters = {id(p) for layer in layers for p in (layer.weight, layer.trained_bias) if p is not None}

    def precondition_(self, check: FiniteCheck) -> None:
        """Replace the gradients by their directions in place, and add these to ``check``."""
        gradients = [gradient for product in self._products for gradient in product.multiply_()]
        torch._foreach_copy_(gradients, self._directions)
        check.add(self._buffer)
        check.checked |= self._parameters


def group_small(
    members: Sequence[PreconditionedLayer], tuning: Tuning = DEFAULT
) -> tuple[list[EqualShapes | MixedShapes], list[PreconditionedLayer]]:
    """Group the layers with small gradients. Their inverses become views of one tensor a group.

    Args:
        members: layers that have a gradient.
        tuning: up to which size a gradient is small.

    Returns:
        Those that are preconditioned together, and the others.
    """
    small = [member for member in members if _is_small(member, tuning)]
    equal = [together for together in _group_by(small, _equal_shapes_key) if len(together) > 1]
    mixed = _group_by(_without(small, equal), _mixed_shapes_key)
    stacked = [_stack_inverses_(together, tuning) for together in equal]
    return [*stacked, *map(MixedShapes, mixed)], _without(members, [*equal, *mixed])


def _without(
    members: Sequence[PreconditionedLayer], taken: Sequence[Sequence[PreconditionedLayer]]
) -> list[PreconditionedLayer]:
    ids = {id(member) for together in taken for member in together}
    return [member for member in members if id(member) not in ids]


def _group_by(
    members: Sequence[PreconditionedLayer], key_of: Callable[[PreconditionedLayer], Hashable]
) -> list[list[PreconditionedLayer]]:
    """Those of equal keys together; without those that have none."""
    together: dict[Hashable, list[PreconditionedLayer]] = {}
    for member in members:
        if (key := key_of(member)) is not None:
            together.setdefault(key, []).append(member)
    return list(together.values())


_SHAPE, _IS_SPARSE = operator.attrgetter("shape"), operator.attrgetter("is_sparse")
_KINDS = operator.attrgetter("dtype"), operator.attrgetter("device"), operator.attrgetter("layout")


def gradient_forms(parameters: Sequence[nn.Parameter]) -> list[Hashable]:
    """What decides how gradients are preconditioned: while it stays the same for all layers, so do their groups.

    Args:
        parameters: weights and biases of layers.

    Returns:
        A list that is equal to another one where nothing has changed between.
    """
    # Nothing here but the first line is Python code that runs once a parameter, since there may be thousands.
    gradients = [parameter.grad for parameter in parameters]
    found = [gradient for gradient in gradients if gradient is not None]
    forms: list[Hashable] = [frozenset(map(kind, found)) for kind in _KINDS]
    forms += map(_SHAPE, found)
    if any(map(_IS_SPARSE, found)):
        forms += [gradient._nnz() if gradient.is_sparse else gradient.is_contiguous() for gradient in found]
    else:
        forms += map(Tensor.is_contiguous, found)  # which a weight that changes its memory format changes
    if len(found) < len(parameters):
        forms += [p.requires_grad if g is None else None for p, g in zip(parameters, gradients, strict=True)]
    return forms


def _stack_inverses_(members: Sequence[PreconditionedLayer], tuning: Tuning) -> EqualShapes:
    inverses = torch.cat([member.preconditioner.main for member in members])
    parts = torch.split(inverses, [len(member.preconditioner.main) for member in members])
    for member, part in zip(members, parts, strict=True):
        member.preconditioner.set_matrices_(part)
    return EqualShapes(members, inverses, tuning)


def _is_small(member: PreconditionedLayer, tuning: Tuning) -> bool:
    """Whether its gradients have few elements and are contiguous, to be multiplied by one stack of matrices."""
    layer, matrices = member.layer, member.preconditioner.matrices
    if layer.weight.grad is None or matrices is None:
        return False
    values, sparse, dtype = stored_values(layer.weight.grad), layer.weight.grad.is_sparse, matrices.dtype
    bias = layer.trained_bias
    column = None if bias is None else bias.grad
    own_bias = bias is None or (column is not None and column.dtype == dtype and len(column) == len(layer.weight))
    plain = values.layout == torch.strided and values.dtype == dtype and values.is_contiguous()
    in_rows = not sparse or (member.shape.side == "right" and bias is None and values.dim() == 2)
    return values.numel() <= tuning.grouped_below and own_bias and plain and in_rows


def _equal_shapes_key(member: PreconditionedLayer) -> Hashable:
    """Equal for members of one `EqualShapes`; None for one that none takes."""
    layer, main, left = member.layer, member.preconditioner.main, member.shape.side == "left"
    assert layer.weight.grad is not None
    has_bias = layer.trained_bias is not None
    if not left and (has_bias or len(main) > 1):
        return None
    return stored_values(layer.weight.grad).shape, main.shape, left, has_bias, main.dtype, main.device


def _mixed_shapes_key(member: PreconditionedLayer) -> Hashable:
    """Equal for members of one `MixedShapes`; None for one that none takes."""
    main = member.preconditioner.main
    return (main.dtype, main.device) if len(main) == 1 else None


__all__ = ["EqualShapes", "MixedShapes", "PreconditionedLayer", "gradient_forms", "group_small"]
