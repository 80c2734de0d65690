"""What the counted operations take: CPU time of each part of each method, for one layer of each model.

A layer is random factors of its shape. What is timed is what `operations` counts: the build from a few samples, the
inverses or roots, the direction.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.theory.costs.operations import COSTS, ROOT_OPERATIONS, LayerShape, forming, through_gram

TIMED = ("ngplus", "kfac", "shampoo")
REPEATS = 5


class Factors(NamedTuple):
    """Random (g, a) of samples of one layer, their mean gradient, and its two sides as random positive matrices."""

    g: Tensor  # (b, κ, m)
    a: Tensor  # (b, κ, n)
    gradient: Tensor  # (m, n)
    left: Tensor  # (m, m)
    right: Tensor  # (n, n)


def draw_factors(layer: LayerShape, samples: int, seed: int) -> Factors:
    """Factors of `samples` samples, float32."""
    generator = torch.Generator().manual_seed(seed)
    g, a = (torch.randn(samples, layer.kappa, size, generator=generator) for size in (layer.m, layer.n))
    left, right = (positive_matrix(size, generator) for size in (layer.m, layer.n))
    return Factors(g, a, torch.randn(layer.m, layer.n, generator=generator), left, right)


def positive_matrix(size: int, generator: torch.Generator) -> Tensor:
    """A random matrix with eigenvalues from 0.1 to about 3."""
    root = torch.randn(size, 2 * size, generator=generator)
    return root @ root.mT / (2 * size) + 0.1 * torch.eye(size)


def inverse(matrix: Tensor) -> Tensor:
    """By Cholesky, p³ operations."""
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def inverse_fourth_root(matrix: Tensor) -> Tensor:
    """By eigendecomposition, `ROOT_OPERATIONS` p³."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**-0.25) @ vectors.mT


def build_ngplus(layer: LayerShape, factors: Factors) -> Tensor:
    """Σ 𝒢 𝒢ᵀ or Σ 𝒢ᵀ𝒢 on the smaller side, the cheaper way."""
    short, long = (factors.g, factors.a) if layer.m <= layer.n else (factors.a, factors.g)
    if through_gram(layer) <= forming(layer, layer.short):
        weighted = long @ long.mT @ short  # (b, κ, q) x (b, q, κ) x (b, κ, p) -> (b, κ, p)
        return short.flatten(0, 1).mT @ weighted.flatten(0, 1)
    wide = (short.mT @ long).transpose(0, 1).flatten(1)  # (p, b · q)
    return wide @ wide.mT


def build_kfac(layer: LayerShape, factors: Factors) -> tuple[Tensor, Tensor]:
    """Σ g gᵀ and Σ a aᵀ over all positions."""
    g, a = factors.g.flatten(0, 1), factors.a.flatten(0, 1)
    return g.mT @ g, a.mT @ a


def make_parts(method: str, layer: LayerShape, factors: Factors) -> Mapping[str, Callable[[], Any]]:
    """The three parts of a method on one layer, ready to be timed."""
    G, left, right = factors.gradient, factors.left, factors.right
    if method == "ngplus":
        side = left if layer.m <= layer.n else right
        return {
            "build": lambda: build_ngplus(layer, factors),
            "invert": lambda: inverse(side),
            "apply": lambda: side @ G if layer.m <= layer.n else G @ side,
        }
    root = inverse if method == "kfac" else inverse_fourth_root
    return {
        "build": (lambda: build_kfac(layer, factors)) if method == "kfac" else (lambda: (G @ G.mT, G.mT @ G)),
        "invert": lambda: (root(left), root(right)),
        "apply": lambda: left @ G @ right,
    }


def cpu_seconds(function: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Least CPU time of a call, all threads together, the first not counted: another program takes none of it."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times[1:])


def layer_timings(model: str, layer: LayerShape, *, samples: int, seed: int) -> list[dict[str, Any]]:
    """A row for each part of each method: operations counted, CPU time measured, and their quotient.

    Args:
        model: its name, for the table.
        layer: its shape.
        samples: in the batch that is timed.
        seed: of the factors.

    Returns:
        Rows of a table.
    """
    factors, rows = draw_factors(layer, samples, seed), []
    for method in TIMED:
        counted = asdict(COSTS[method](layer, samples))
        for part, function in make_parts(method, layer, factors).items():
            seconds = cpu_seconds(function)
            rows.append(
                {
                    "model": model,
                    "layer": layer.name,
                    "m": layer.m,
                    "n": layer.n,
                    "kappa": layer.kappa,
                    "samples": samples,
                    "method": method,
                    "part": part,
                    "operations": counted[part],
                    "cpu_s": seconds,
                    "gflops": counted[part] / seconds / 1e9,
                    "threads": torch.get_num_threads(),
                }
            )
    return rows


def largest_layer(layers: Sequence[LayerShape], limit: int) -> LayerShape | None:
    """The layer with most parameters of those with no side above `limit`, if there is one; no embeddings, no groups.

    Args:
        layers: of a model.
        limit: on m and n.

    Returns:
        The layer.
    """
    fitting = [layer for layer in layers if layer.long <= limit and not layer.embedding and layer.groups == 1]
    return max(fitting, key=lambda layer: layer.parameters, default=None)


def root_timings(sizes: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """CPU time of an inverse and of an inverse fourth root on this machine, float32.

    Args:
        sizes: of the matrices.
        seed: of the matrices.

    Returns:
        Rows of a table.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    for size in sizes:
        matrix = positive_matrix(size, generator)
        seconds = [cpu_seconds(lambda f=f, x=matrix: f(x)) for f in (inverse, inverse_fourth_root)]
        rows.append(
            {
                "size": size,
                "inverse_cpu_s": seconds[0],
                "inverse_fourth_root_cpu_s": seconds[1],
                "ratio": seconds[1] / seconds[0],
                "counted_ratio": ROOT_OPERATIONS,
                "threads": torch.get_num_threads(),
            }
        )
    return rows
