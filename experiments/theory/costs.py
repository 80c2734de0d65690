"""Sections 2.4 and 2.5: operations, storage and communication of NG+, K-FAC and Shampoo, a layer at a time.

Counted from a model's own layers (m, n, κ by forward hooks; a multiply-add is two operations), with p =
min(m, n) and q = max(m, n). The paper's sentences are then checked against the table, and the inverse and the
inverse fourth root are timed, so that the counts can be compared with seconds.

    python -m experiments.theory.costs --out results/theory/costs
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from experiments.theory.drawing import figure
from experiments.theory.findings import Verdict, write_rows, write_verdicts
from experiments.theory.model_shapes import PAPER_MODELS

# Operations of a symmetric eigendecomposition with vectors, 9p³ (Golub and Van Loan, 8.3), and of V f(Λ) Vᵀ.
ROOT_OPERATIONS = 11
METHODS = ("ngplus", "ngplus_released", "kfac", "shampoo")


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """A layer's matrix: `groups` matrices of m × n (the bias counted in n), κ positions a sample.

    An embedding's matrix is dimensions × rows, its inputs are one-hot: n is never multiplied by in a build.
    """

    name: str
    m: int
    n: int
    kappa: int
    groups: int = 1
    embedding: bool = False

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
    """Operations and numbers kept or sent by one method for one layer.

    Attributes:
        build: operations of the curvature from a batch, at a curvature step.
        invert: operations of the inverses or roots, at a curvature step.
        apply: operations of the direction, at every step.
        store: numbers kept between steps (one matrix a factor; a method may keep its inverse beside it).
        send: numbers a device contributes at a curvature step beyond the gradient.
    """

    build: int
    invert: int
    apply: int
    store: int
    send: int


def module_shapes(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Iterator[LayerShape]:
    """The matrices of one module from one call of it."""
    batch = inputs[0].shape[0]
    if isinstance(module, nn.Linear):
        n = module.in_features + (module.bias is not None)
        yield LayerShape(name=name, m=module.out_features, n=n, kappa=output[..., 0].numel() // batch)
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        out, groups = module.weight.shape[0], module.groups
        n = module.weight[0].numel() + (module.bias is not None)
        yield LayerShape(name=name, m=out // groups, n=n, kappa=output[0, 0].numel(), groups=groups)
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        rows, width = module.weight.shape
        yield LayerShape(name=name, m=width, n=rows, kappa=inputs[0].numel() // batch, embedding=True)
    elif isinstance(module, nn.MultiheadAttention):
        width = module.embed_dim
        query, key = (x.shape[:-1].numel() // batch for x in inputs[:2])
        for part, kappa in (("q", query), ("k", key), ("v", key), ("out", query)):
            yield LayerShape(name=f"{name}.{part}", m=width, n=width + 1, kappa=kappa)


def layer_shapes(model: nn.Module, *inputs: Tensor) -> list[LayerShape]:
    """Every supported layer of a model in the order of one forward pass on an example input.

    Attention's own ``out_proj`` is reported with its module. A layer used twice is reported twice.

    Example:
        >>> layer_shapes(nn.Sequential(nn.Linear(3, 2)), torch.ones(4, 3))
        [LayerShape(name='0', m=2, n=4, kappa=1, groups=1, embedding=False)]
    """
    found: list[LayerShape] = []
    handles = []
    for name, module in model.named_modules():

        def watch(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            found.extend(module_shapes(name, module, (*args, *kwargs.values()), output))

        handles.append(module.register_forward_hook(watch, with_kwargs=True))
    try:
        model.train()(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def forming(layer: LayerShape, side: int) -> int:
    """Operations a sample to form G_i (2κmn) and its product on `side` (2 side² · other)."""
    return 2 * layer.kappa * layer.m * layer.n + 2 * side**2 * (layer.m * layer.n // side)


def through_gram(layer: LayerShape) -> int:
    """Operations a sample of g(aᵀa)gᵀ: 2κ²q + 2κ²p + 2κp²; a one-hot input's Gram matrix costs none."""
    gram = 0 if layer.embedding else 2 * layer.kappa**2 * layer.long
    return gram + 2 * layer.kappa**2 * layer.short + 2 * layer.kappa * layer.short**2


def ngplus_cost(layer: LayerShape, batch: int) -> Cost:
    """(4)-(6) on the smaller side by the cheaper way, with the kept inverse applied by one product."""
    p, q, groups = layer.short, layer.long, layer.groups
    ways = [through_gram(layer)] if layer.embedding else [through_gram(layer), forming(layer, p)]
    return Cost(
        build=groups * batch * min(ways),
        invert=groups * p**3,
        apply=groups * 2 * p**2 * touched(layer, q, batch),
        store=groups * p**2,
        send=groups * p**2,
    )


def touched(layer: LayerShape, long: int, batch: int) -> int:
    """Columns of the gradient that are not zero: all, or an embedding's looked-up rows."""
    return min(long, batch * layer.kappa) if layer.embedding else long


def released_cost(layer: LayerShape, batch: int) -> Cost:
    """The authors' published construction: always L (m×m), every G_i formed."""
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

    As the paper writes it, an embedding's rows × rows factor included, which nobody forms.
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
    """G Gᵀ and GᵀG of the batch's gradient, two inverse fourth roots; the gradient is sent anyway.

    As the paper writes it, an embedding's rows × rows factor included, which nobody forms.
    """
    m, n, groups = layer.m, layer.n, layer.groups
    return Cost(
        build=groups * 2 * m * n * (m + n),
        invert=groups * ROOT_OPERATIONS * (m**3 + n**3),
        apply=groups * 2 * m * n * (m + n),
        store=groups * (m**2 + n**2),
        send=0,
    )


COSTS: dict[str, Callable[[LayerShape, int], Cost]] = dict(
    zip(METHODS, (ngplus_cost, released_cost, kfac_cost, shampoo_cost), strict=True)
)


def model_operations(layers: Sequence[LayerShape], batch: int) -> int:
    """Forward and backward of the counted layers; the first needs no gradient of its input."""
    dense = [layer for layer in layers if not layer.embedding]
    products = [2 * layer.groups * layer.kappa * layer.m * layer.n for layer in dense]
    return batch * (3 * sum(products) - (products[0] if len(dense) == len(layers) else 0))


def cost_row(layer: LayerShape, batch: int) -> dict[str, Any]:
    """A layer's shape and every method's costs, as one row."""
    row: dict[str, Any] = asdict(layer)
    for method, cost in COSTS.items():
        row |= {f"{method}_{name}": value for name, value in asdict(cost(layer, batch)).items()}
    return row


def total_row(model: str, layers: Sequence[LayerShape], batch: int) -> dict[str, Any]:
    """A model's sums, its parameters and the operations of one forward and backward."""
    rows = [cost_row(layer, batch) for layer in layers]
    sums = {key: sum(row[key] for row in rows) for key in rows[0] if key.startswith(METHODS)}
    return {
        "model": model,
        "batch": batch,
        "layers": len(layers),
        "parameters": sum(layer.parameters for layer in layers),
        "forward_backward": model_operations(layers, batch),
    } | sums


def paper_layers(name: str) -> tuple[list[LayerShape], int]:
    """The layers of one of the paper's models, and its batch."""
    with torch.device("meta"):
        model, inputs, batch = PAPER_MODELS[name]()
        return layer_shapes(model, *inputs), batch


def verdicts(layers: Sequence[LayerShape], totals: Sequence[dict[str, Any]], seconds: float) -> list[Verdict]:
    """The sentences of section 2.4 beside the counts, over the layers of all models.

    Args:
        layers: of every model.
        totals: a row a model.
        seconds: measured inverse fourth root over inverse, at the largest size timed.
    """

    def ratio(part: str) -> str:
        values = (f"{row['model']} {row[f'kfac_{part}'] / row[f'ngplus_{part}']:.3g}" for row in totals)
        return ", ".join(values)

    square = [layer for layer in layers if layer.m == layer.n]
    build_more = [row["kfac_build"] > 2 * row["ngplus_build"] for row in totals]
    twice = all(row[f"kfac_{part}"] > 2 * row[f"ngplus_{part}"] for row in totals for part in ("invert", "apply"))
    smaller = sum(layer.short**2 < layer.m * layer.n for layer in layers)
    return [
        Verdict(
            claim="2.4: K-FAC's inverses and products cost more than twice NG+'s",
            paper="more than twice",
            ours=f"inverse: {ratio('invert')}; apply: {ratio('apply')}",
            verdict="reproduced" if twice else "not reproduced",
            why=f"(m³+n³)/p³ ≥ 2 and (m+n)/p ≥ 2 for every shape, equal to 2 for the {len(square)} square ones",
            dataset="layer shapes",
        ),
        Verdict(
            claim="2.4: the same for building the matrices",
            paper="more than twice (not said of the build alone)",
            ours=ratio("build"),
            verdict="reproduced" if all(build_more) else "not reproduced",
            why="per-sample matrices of layers with many positions cost more to form than K-FAC's factors",
            dataset="layer shapes",
        ),
        Verdict(
            claim="2.4: storage and communication of one matrix, min{m², n²}",
            paper="smaller than a tensor of the gradient's size",
            ours=f"{smaller} of {len(layers)} layers smaller, {len(square)} equal",
            verdict="reproduced" if smaller + len(square) == len(layers) else "not reproduced",
            why="p² ≤ pq; the released construction keeps m² instead, larger than the gradient for "
            f"{sum(layer.m > layer.n for layer in layers)} layers",
            dataset="layer shapes",
        ),
        Verdict(
            claim="2.4: Shampoo's inverse fourth roots cost much more than an inverse",
            paper="much more",
            ours=f"counted {ROOT_OPERATIONS}×, measured {seconds:.3g}× by eigendecomposition",
            verdict="reproduced" if seconds > 2 else "not reproduced",
            why="one matrix of the largest size timed; Shampoo needs it for both sides",
            dataset="random positive definite matrices",
        ),
    ]


def inverse(matrix: Tensor) -> Tensor:
    """By Cholesky, p³ operations."""
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def inverse_fourth_root(matrix: Tensor) -> Tensor:
    """By eigendecomposition, `ROOT_OPERATIONS` p³."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**-0.25) @ vectors.mT


def median_seconds(function: Callable[[Tensor], Tensor], matrix: Tensor, repeats: int = 5) -> float:
    """Median time of a call, the first not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function(matrix)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measured_rows(sizes: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """Seconds of an inverse and of an inverse fourth root on this machine, float32."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for size in sizes:
        root = torch.randn(size, 2 * size, generator=generator)
        matrix = root @ root.mT / (2 * size) + 0.1 * torch.eye(size)
        seconds = [median_seconds(function, matrix) for function in (inverse, inverse_fourth_root)]
        rows.append(
            {
                "size": size,
                "inverse_s": seconds[0],
                "inverse_fourth_root_s": seconds[1],
                "ratio": seconds[1] / seconds[0],
                "counted_ratio": ROOT_OPERATIONS,
                "threads": torch.get_num_threads(),
            }
        )
    return rows


def draw(totals: Sequence[dict[str, Any]], folder: Path) -> None:
    """Each method's operations beside a step's, and its storage beside the parameters, a panel each."""
    panels = {
        "build": ("building the curvature", "forward_backward", "share of forward + backward"),
        "invert": ("inverses or roots", "forward_backward", "share of forward + backward"),
        "apply": ("direction, every step", "forward_backward", "share of forward + backward"),
        "store": ("matrices kept", "parameters", "share of the parameters"),
    }
    labels = ("NG+", "NG+, released construction", "K-FAC", "Shampoo")
    with figure(folder, "costs", (10, 6)) as fig:
        for axis, (part, (title, unit, ylabel)) in zip(fig.subplots(2, 2).flat, panels.items(), strict=True):
            for index, (method, label) in enumerate(zip(METHODS, labels, strict=True)):
                heights = [row[f"{method}_{part}"] / row[unit] for row in totals]
                places = [place + 0.2 * (index - 1.5) for place in range(len(totals))]
                axis.bar(places, heights, 0.2, label=label)
            axis.set(yscale="log", title=title, ylabel=ylabel)
            axis.set_xticks(range(len(totals)), [row["model"] for row in totals])
            axis.grid(visible=False, axis="x")
        fig.suptitle("K-FAC and Shampoo as the paper writes them: an embedding's rows × rows factor included")
        fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def run(out: Path, *, sizes: Sequence[int], seed: int = 0) -> None:
    """Count every model's costs, time the inverses, check the sentences, and write it all to `out`."""
    totals, everything = [], []
    for name in PAPER_MODELS:
        layers, batch = paper_layers(name)
        write_rows(out / f"{name}.csv", [cost_row(layer, batch) for layer in layers])
        totals.append(total_row(name, layers, batch))
        everything += layers
    measured = measured_rows(sizes, seed)
    write_rows(out / "totals.csv", totals)
    write_rows(out / "measured.csv", measured)
    write_verdicts(out / "verdicts.csv", verdicts(everything, totals, measured[-1]["ratio"]))
    draw(totals, out)


def main(
    seed: Annotated[int, typer.Option(help="of the matrices that are timed")] = 0,
    out: Annotated[Path, typer.Option(help="folder for tables and figure")] = Path("results/theory/costs"),
    quick: Annotated[bool, typer.Option(help="time small matrices only")] = False,
) -> None:
    """The cost comparison of sections 2.4 and 2.5, from the models themselves."""
    run(out, sizes=(64, 128) if quick else (64, 128, 256, 512, 1024), seed=seed)


if __name__ == "__main__":
    typer.run(main)
