"""Sections 2.4 and 2.5: operations, storage and communication of NG+, K-FAC and Shampoo for one layer.

Formulas in a layer's m, n and κ; a multiply-add is two operations, p = min(m, n) and q = max(m, n). K-FAC and Shampoo
are as the paper writes them, an embedding's rows × rows factor included, which nobody forms.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

# Operations of a symmetric eigendecomposition with vectors, 9p³ (Golub and Van Loan, 8.3), and of V f(Λ) Vᵀ.
ROOT_OPERATIONS = 11


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """A layer's matrix: `groups` matrices of m × n (the bias counted in n), κ positions a sample.

    Attributes:
        name: of the layer.
        m: outputs; for an embedding, its width.
        n: inputs, with a bias's column of ones; for an embedding, its rows.
        kappa: positions at which a sample meets the weight, all uses together, on average and rounded.
        groups: of a convolution.
        lookups: those of the κ positions that look a row up: their inputs are one-hot and multiply nothing.
        input_gradient: whether backpropagation goes on to the layer's input.
    """

    name: str
    m: int
    n: int
    kappa: int
    groups: int = 1
    lookups: int = 0
    input_gradient: bool = True

    @property
    def embedding(self) -> bool:
        """Whether rows are looked up in the matrix and nothing else."""
        return self.lookups == self.kappa

    @property
    def short(self) -> int:
        """The smaller side p = min(m, n), the size of NG+'s matrix."""
        return min(self.m, self.n)

    @property
    def long(self) -> int:
        """The larger side q = max(m, n)."""
        return max(self.m, self.n)

    @property
    def parameters(self) -> int:
        """Entries of the weight and its bias."""
        return self.groups * self.m * self.n


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Operations, and elements kept or sent by one method for one layer.

    Attributes:
        build: operations of the curvature from a batch, at a curvature step.
        invert: operations of the inverses or roots, at a curvature step.
        apply: operations of the direction, at every step.
        store: elements kept between steps (one matrix a factor; a method may keep its inverse as well).
        send: elements a device contributes at a curvature step beyond the gradient.
    """

    build: int
    invert: int
    apply: int
    store: int
    send: int


def dense(layer: LayerShape) -> int:
    """Positions that multiply by the weight."""
    return layer.kappa - layer.lookups


def forming(layer: LayerShape, side: int) -> int:
    """Operations a sample to form G_i (2κmn) and its product on `side` (2 side² · other).

    Args:
        layer: its shape.
        side: length of the side that is kept.

    Returns:
        Multiply-adds as two.
    """
    return 2 * dense(layer) * layer.m * layer.n + 2 * side**2 * (layer.m * layer.n // side)


def through_gram(layer: LayerShape) -> int:
    """Operations a sample of g(aᵀa)gᵀ: 2κ²q + 2κ²p + 2κp²; the Gram matrix of what is looked up costs none.

    Args:
        layer: its shape.

    Returns:
        Multiply-adds as two.
    """
    gram = 2 * dense(layer) ** 2 * layer.long
    return gram + 2 * layer.kappa**2 * layer.short + 2 * layer.kappa * layer.short**2


def ngplus_cost(layer: LayerShape, batch: int) -> Cost:
    """(4)-(6) on the smaller side by the cheaper way, with the kept inverse applied by one product.

    Args:
        layer: its shape.
        batch: samples in a batch.

    Returns:
        Operations of each part, and elements kept and sent.
    """
    p, q, groups = layer.short, layer.long, layer.groups
    return Cost(
        build=groups * batch * min(through_gram(layer), forming(layer, p)),
        invert=groups * p**3,
        apply=groups * 2 * p**2 * count_nonzero_columns(layer, q, batch),
        store=groups * p**2,
        send=groups * p**2,
    )


def rows_cost(layer: LayerShape, batch: int) -> Cost:
    """NG+ with ``samples="rows"``: every position is a sample of its own, κ = 1."""
    one = replace(layer, kappa=1, lookups=int(layer.embedding))
    return replace(ngplus_cost(layer, batch), build=ngplus_cost(one, batch * layer.kappa).build)


def count_nonzero_columns(layer: LayerShape, long: int, batch: int) -> int:
    """Columns of the gradient that are not zero: all, or an embedding's looked-up rows."""
    return min(long, batch * layer.kappa) if layer.embedding else long


def released_cost(layer: LayerShape, batch: int) -> Cost:
    """The authors' published construction for convolutions: always L (m×m), every G_i formed, unless looked up.

    Args:
        layer: its shape.
        batch: samples in a batch.

    Returns:
        Operations of each part, and elements kept and sent.
    """
    m, n, groups = layer.m, layer.n, layer.groups
    sample = through_gram(layer) if layer.embedding else forming(layer, m)
    return Cost(
        build=groups * batch * sample,
        invert=groups * m**3,
        apply=groups * 2 * m**2 * n,
        store=groups * m**2,
        send=groups * m**2,
    )


def kfac_cost(layer: LayerShape, batch: int) -> Cost:
    """Σ a aᵀ and Σ g gᵀ over the batch's positions, two inverses, two products; nothing halved by symmetry.

    Args:
        layer: its shape.
        batch: samples in a batch.

    Returns:
        Operations of each part, and elements kept and sent.
    """
    m, n, groups = layer.m, layer.n, layer.groups
    return Cost(
        build=groups * batch * layer.kappa * 2 * (m**2 + n**2),
        invert=groups * (m**3 + n**3),
        apply=groups * 2 * m * n * (m + n),
        store=groups * (m**2 + n**2),
        send=groups * (m**2 + n**2),
    )


def shampoo_cost(layer: LayerShape, batch: int) -> Cost:
    """G Gᵀ and GᵀG of the batch's gradient, two inverse fourth roots; the gradient is sent anyway."""
    m, n, groups = layer.m, layer.n, layer.groups
    return Cost(
        build=groups * 2 * m * n * (m + n),
        invert=groups * ROOT_OPERATIONS * (m**3 + n**3),
        apply=groups * 2 * m * n * (m + n),
        store=groups * (m**2 + n**2),
        send=0,
    )


COSTS: dict[str, Callable[[LayerShape, int], Cost]] = {
    "ngplus": ngplus_cost,
    "ngplus_rows": rows_cost,
    "ngplus_released": released_cost,
    "kfac": kfac_cost,
    "shampoo": shampoo_cost,
}


def model_operations(layers: Sequence[LayerShape], batch: int) -> int:
    """Forward and backward of the layers' products: 2κmn each for the output, the weight and, if needed, the input.

    Args:
        layers: of the model.
        batch: samples in a batch.

    Returns:
        Multiply-adds as two.
    """
    products = ((2 + layer.input_gradient) * layer.groups * dense(layer) * layer.m * layer.n for layer in layers)
    return 2 * batch * sum(products)
