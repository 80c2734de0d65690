"""The constants that trade one cost against another, measured and not derived."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Sizes, in elements unless said otherwise, at which one way of computing becomes cheaper than another.

    No result depends on them but for rounding. An optimizer takes its own from `LayerwiseOptimizer.tuning`.

    Attributes:
        curvature_chunk_cpu: most elements of the temporaries of L or R on a CPU: what stays near the cache.
        curvature_chunk_device: the same on other devices, 256 MiB in float32.
        small_use: most elements of the factors of a use that is kept until the step, to be multiplied with others.
        apply_chunk: elements of a gradient that are multiplied at a time where it is longer than four of these.
        grouped_below: most elements of a gradient that is preconditioned together with others: copying them takes about
            as long as the calls that this saves.
        kept_direction: most elements of a direction whose memory is kept from step to step, where there are several.
        zero_rows_from: elements of a table's gradient from which on it is worth finding its nonzero rows.
        sparse_step_share: a base's step takes a sparse gradient where at most this share of a table's rows is nonzero.
        dense_step_up_to: elements of a table up to which AdaGrad's dense step is cheaper than its sparse one.
        short_vector: elements of a vector that is checked for NaN together with others.
        low_rank_up_to: rank/p up to which applying (14), 4prq operations, is no more expensive than applying the p×p
            inverse, 2p²q.
        low_rank_from: shortest side of a matrix for which (14) is cheaper than an inverse that is applied, and made, in
            one batch with others: below, the calls take longer than what they compute.
        float64_above: Frobenius norm of L, or of UᵀU, over λ above which an inverse is made in float64.
        refine_above: ‖L‖/λ above which a low-rank direction is refined.
        cholesky_tries: how often the damping of a matrix that does not factorise is raised tenfold.
        capture_tries: steps in a row on which a layer without curvature that has a gradient is captured again.
        compared_entries: most entries of a layer's gradient that are compared with its captured uses.
        compared_products: products of a use beyond which fewer entries are compared, two at the least.
        summed_outputs: elements of a linear layer's output up to which all entries of its gradient are compared.
        summed_weights: elements of its weight up to which they are.
        long_table: rows from which on one block of rows in sixteen is compared.
        inverted_elements: of the matrices that are inverted as one batch, which takes four times as many of float64.
        inverted_block: side of a matrix up to which LAPACK inverts it faster than products do.
        inverted_multiplications: bp³ of a batch from which on products do.
        exchanged_elements: of the gradients that a process with sharded weights sends at a time.
        averaged_elements: of the matrices that are averaged over processes at a time.
        replicated_from: ratio of a sharded weight's sides from which on every process keeps the inverse in any case.
    """

    curvature_chunk_cpu: int = 2**21
    curvature_chunk_device: int = 2**26
    small_use: int = 2**13
    apply_chunk: int = 2**16
    grouped_below: int = 2**14
    kept_direction: int = 2**10
    zero_rows_from: int = 2**17
    sparse_step_share: float = 1 / 8
    dense_step_up_to: int = 2**13
    short_vector: int = 2**12
    low_rank_up_to: float = 1 / 2
    low_rank_from: int = 65
    float64_above: float = 2.0
    refine_above: float = 10.0
    cholesky_tries: int = 6
    capture_tries: int = 3
    compared_entries: int = 8
    compared_products: int = 2**12
    summed_outputs: int = 2**16
    summed_weights: int = 2**20
    long_table: int = 2**13
    inverted_elements: int = 2**24
    inverted_block: int = 64
    inverted_multiplications: int = 2**22
    exchanged_elements: int = 2**25
    averaged_elements: int = 2**25
    replicated_from: int = 16

    def curvature_chunk(self, device: torch.device) -> int:
        """Most elements of the temporaries of L or R on a device."""
        return self.curvature_chunk_cpu if device.type == "cpu" else self.curvature_chunk_device


DEFAULT = Tuning()

__all__ = ["DEFAULT", "Tuning"]
