"""Bytes a step and memory a process of optimizers on a sharded model, on paper.

For a model whose weights `fully_shard` has cut into W shards of rows, what a process sends in a step beyond the weights
and gradients that `fully_shard` moves under any optimizer, and what it keeps beyond them. Every element is one of
float32 but where it says otherwise. NG+'s part is that of `ngplus.sharded`, formula by formula, and is compared with
counted collectives in the tests; the others' are those of their authors' code:

- AdamW keeps two moments and sends nothing.
- Muon (Liu et al., "Muon is Scalable for LLM Training", arXiv:2502.16982, algorithm 1) keeps the momentum, gathers it
  in bfloat16 on every process, and keeps of the direction the rows that it needs.
- Distributed Shampoo (Shi et al., arXiv:2309.06497; its distributor without loss, round robin) gathers the gradient on
  every process, gives each weight to one process with its two factors and their roots, in blocks, and its AdaGrad
  grafting, and sends the direction's rows back.

    python -m experiments.theory.sharded_costs --out results/theory/sharded
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.records.claim_checks import write_rows
from ngplus.tuning import DEFAULT

PROCESSES = (8, 16, 32, 64, 128, 256, 512)
DOUBLE, FLOAT, HALF = 8, 4, 2
SHAMPOO_BLOCK = 1024
"""The side of Shampoo's blocks, its default `max_preconditioner_dim`."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A weight, m × n, and perhaps a bias."""

    name: str
    m: int
    n: int
    bias: bool = False

    @property
    def columns(self) -> int:
        """Of the layer's matrix, the bias counted."""
        return self.n + self.bias

    @property
    def elements(self) -> int:
        """Of the weight and its bias."""
        return self.m * self.columns

    @property
    def inverse(self) -> int:
        """Elements of the inverse that NG+ keeps."""
        return min(self.m, self.columns) ** 2

    @property
    def triangle(self) -> int:
        """Elements of its lower triangle."""
        side = min(self.m, self.columns)
        return side * (side + 1) // 2

    def rows(self, processes: int) -> list[int]:
        """Rows that each process has."""
        length = -(-self.m // processes)
        return [max(0, min(self.m, length * (rank + 1)) - length * rank) for rank in range(processes)]


@dataclass(frozen=True, kw_only=True)
class Load:
    """What an optimizer adds to a process, in bytes.

    Attributes:
        sent: to other processes in a step; of all processes the most.
        sent_mean: of all processes the mean.
        kept: between steps; of all processes the most.
        update_sent: sent in addition in a step that updates the preconditioner.
        update_kept: what such a step keeps in addition until it is averaged.
    """

    sent: float
    sent_mean: float
    kept: float
    update_sent: float = 0.0
    update_kept: float = 0.0


def transformer(*, layers: int = 32, width: int = 4096, hidden: int = 11008, vocabulary: int = 32000) -> list[Matrix]:
    """The weights of a Transformer like Llama's of 7 billion parameters: attention, a gated perceptron, no biases.

    Args:
        layers: of it.
        width: of the residual stream.
        hidden: width inside of a perceptron.
        vocabulary: rows of the table, and of the head.

    Returns:
        The matrices; norms, a hundred-thousandth of all parameters, are left out.
    """
    attention = [(name, width, width) for name in ("query", "key", "value", "out")]
    perceptron = [("gate", hidden, width), ("up", hidden, width), ("down", width, hidden)]
    block = [Matrix(name=name, m=m, n=n) for name, m, n in (*attention, *perceptron)]
    return [Matrix(name="table", m=vocabulary, n=width), *block * layers, Matrix(name="head", m=vocabulary, n=width)]


def keepers(matrices: Sequence[Matrix], processes: int) -> list[int | None]:
    """The process that alone keeps each inverse, as `ngplus.sharded` assigns them; None where all do.

    Args:
        matrices: of the model, sharded by rows.
        processes: that they are sharded over.

    Returns:
        A rank for each matrix.
    """
    load, ranks = [0] * processes, list[int | None]([None]) * len(matrices)
    for place in sorted(range(len(matrices)), key=lambda place: -matrices[place].inverse):
        matrix = matrices[place]
        right = matrix.m > matrix.columns
        if right and (matrix.inverse <= DEFAULT.grouped_below or matrix.m >= DEFAULT.replicated_from * matrix.columns):
            continue
        ranks[place] = load.index(min(load))
        load[load.index(min(load))] += matrix.inverse
    return ranks


def ngplus(matrices: Sequence[Matrix], processes: int) -> Load:
    """NG+ with ``inverses="auto"`` around SGD with momentum.

    A process sends its rows of each gradient to the one that keeps the inverse, and the direction's rows back from its
    own. In a curvature step it sums L or R over its own samples; their lower triangles are averaged by an all-reduce,
    in which each process sends twice the elements but for its own part, and so are in float64 the inverses that all
    processes keep, of which each one makes some.

    Args:
        matrices: of the model.
        processes: that they are sharded over.

    Returns:
        What it adds to a process.
    """
    ranks, sent = keepers(matrices, processes), [0] * processes
    kept = [_shard(matrices, processes)] * processes
    for matrix, keeper in zip(matrices, ranks, strict=True):
        rows = matrix.rows(processes)
        for rank in range(processes):
            if keeper in (None, rank):
                kept[rank] += matrix.inverse
            if keeper is not None:
                sent[rank] += matrix.columns * (matrix.m - rows[rank] if rank == keeper else rows[rank])
    averaged = sum(matrix.triangle for matrix in matrices)
    everywhere = sum(matrix.triangle for matrix, keeper in zip(matrices, ranks, strict=True) if keeper is None)
    return Load(
        sent=FLOAT * max(sent),
        sent_mean=FLOAT * sum(sent) / processes,
        kept=FLOAT * max(kept),
        update_sent=2 * (FLOAT * averaged + DOUBLE * everywhere) * (processes - 1) / processes,
        update_kept=FLOAT * sum(matrix.inverse for matrix in matrices),
    )


def adamw(matrices: Sequence[Matrix], processes: int) -> Load:
    """AdamW: two moments of each element of a process's shards.

    Args:
        matrices: of the model.
        processes: that they are sharded over.

    Returns:
        What it adds to a process.
    """
    return Load(sent=0.0, sent_mean=0.0, kept=2 * FLOAT * _shard(matrices, processes))


def muon(matrices: Sequence[Matrix], processes: int) -> Load:
    """Muon: the momentum of a process's shards, which is sent to all others in bfloat16.

    Args:
        matrices: of the model.
        processes: that they are sharded over.

    Returns:
        What it adds to a process.
    """
    shard = _shard(matrices, processes)
    sent = HALF * shard * (processes - 1)
    return Load(sent=sent, sent_mean=sent, kept=FLOAT * shard)


def shampoo(matrices: Sequence[Matrix], processes: int) -> Load:
    """Distributed Shampoo: factors, roots and grafting of whole weights, one after the other to each process.

    Args:
        matrices: of the model.
        processes: that they are sharded over.

    Returns:
        What it adds to a process.
    """
    shard, kept, back = _shard(matrices, processes), [0] * processes, [0.0] * processes
    for place, matrix in enumerate(matrices):
        owner = place % processes
        heights, widths = _blocks(matrix.m), _blocks(matrix.n)
        factors = sum(height**2 + width**2 for height in heights for width in widths)
        kept[owner] += 2 * factors + 2 * matrix.elements  # and grafting, and the whole weight
        back[owner] += matrix.elements * (processes - 1) / processes
    sent = [shard * (processes - 1) + each for each in back]
    return Load(sent=FLOAT * max(sent), sent_mean=FLOAT * sum(sent) / processes, kept=FLOAT * max(kept))


def _shard(matrices: Sequence[Matrix], processes: int) -> int:
    return sum(matrix.rows(processes)[0] * matrix.columns for matrix in matrices)


def _blocks(side: int) -> list[int]:
    whole, rest = divmod(side, SHAMPOO_BLOCK)
    return [SHAMPOO_BLOCK] * whole + [rest] * (rest > 0)


OPTIMIZERS = {"AdamW": adamw, "Muon": muon, "NG+": ngplus, "Distributed Shampoo": shampoo}


def fully_sharded(matrices: Sequence[Matrix], processes: int) -> dict[str, float]:
    """What `fully_shard` sends and keeps under any optimizer, with computation in bfloat16 and gradients in float32.

    Args:
        matrices: of the model.
        processes: that they are sharded over.

    Returns:
        Bytes: weights gathered twice and gradients reduced once, and the shards of weights and gradients.
    """
    shard = _shard(matrices, processes)
    return {
        "fully_shard_sent": (2 * HALF + FLOAT) * shard * (processes - 1),
        "fully_shard_kept": 2 * FLOAT * shard,
    }


def rows(matrices: Sequence[Matrix], processes: Sequence[int] = PROCESSES) -> list[dict[str, Any]]:
    """The table, a row for each number of processes and optimizer.

    Args:
        matrices: of the model.
        processes: that it is sharded over.

    Returns:
        Bytes.
    """
    return [
        {"processes": count, "optimizer": name, **fully_sharded(matrices, count), **vars(load(matrices, count))}
        for count in processes
        for name, load in OPTIMIZERS.items()
    ]


def run(out: Path) -> None:
    """Write the costs of a Transformer of 7 billion parameters on 8 to 512 GPUs.

    Args:
        out: folder of the table.
    """
    write_rows(out / "transformer-7b.csv", rows(transformer()))


def main(
    out: Annotated[Path, typer.Option(help="folder for the table")] = Path("results/theory/sharded"),
) -> None:
    """The costs of a Transformer of 7 billion parameters on 8 to 512 GPUs."""
    run(out)


if __name__ == "__main__":
    typer.run(main)
