"""Training with differential privacy: what a step is made of must be the noised gradients alone."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def refuse_private(parameters: Iterable[Tensor]) -> None:
    """Refuse a step that opacus' ``DPOptimizer`` makes, with a curvature from the gradients before clipping and noise.

    It keeps the sum of the clipped gradients of a parameter as ``summed_grad``, from before the step until
    ``zero_grad``.

    Args:
        parameters: of the optimizer.

    Raises:
        RuntimeError: where one has such a sum.
    """
    if any(getattr(parameter, "summed_grad", None) is not None for parameter in parameters):
        raise RuntimeError(
            "opacus' DPOptimizer makes gradients private, and the curvature of single samples is made of those before "
            'clipping and noise, so that the step would not be; take curvature="mini_batch", or "momentum" with '
            'basis="eigen", which are made of the private gradients'
        )


__all__ = ["refuse_private"]
