"""The optimizers whose cost is compared, each made to refresh what it refreshes every ``interval`` steps."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.bench.workloads import Workload
from experiments.optimizers.muon import MuonAndAdamW, hidden_matrices
from ngplus import NGPlus
from ngplus.baselines import KFAC


class Unsupported(Exception):  # noqa: N818 (a result of the bench, not an error)
    """A candidate that cannot train this model, with the reason."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An optimizer on a workload.

    Attributes:
        optimizer: makes the step.
        step: one whole training step: forward, backward, optimizer.
    """

    optimizer: Optimizer
    step: Callable[[], None]


def _train(workload: Workload, optimizer: Optimizer) -> Candidate:
    def step() -> None:
        workload.loss(workload.model(*workload.inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Candidate(optimizer=optimizer, step=step)


def _torch(workload: Workload, _interval: int, cls: type[Optimizer], **options: Any) -> Candidate:
    return _train(workload, cls(workload.model.parameters(), lr=1e-9, **options))


def _ngplus(workload: Workload, interval: int, base: type[Optimizer], **options: Any) -> Candidate:
    options = {"momentum": 0.9, **options} if base is torch.optim.SGD else options
    samples = options.pop("samples", workload.samples)
    optimizer = NGPlus(workload.model, base, lr=1e-9, damping=0.3, update_every=interval, samples=samples, **options)
    optimizer.track_times()
    return _train(workload, optimizer)


def _ngplus_eigen(workload: Workload, interval: int, **options: Any) -> Candidate:
    """In the eigenbasis of its curvature, around Adam, with the longest side that SOAP is given too."""
    return _ngplus(workload, interval, torch.optim.Adam, basis="eigen", max_side=LARGEST_SIDE, ema=0.9, **options)


def _muon(workload: Workload, _interval: int) -> Candidate:
    matrices = hidden_matrices(workload.model)
    if sum(p.numel() for p in matrices) < 0.2 * sum(p.numel() for p in workload.model.parameters()):
        raise Unsupported("Muon is for matrices that are no embeddings, which are few here")
    return _train(workload, MuonAndAdamW(workload.model, lr=1e-9))


LARGEST_SIDE = 5000
"""Longest side of a weight that a two-sided method is given: its matrix for 10,000 takes 0.8 GB and minutes."""


def _shampoo(workload: Workload, interval: int) -> Candidate:
    from pytorch_optimizer import Shampoo

    longest = max(max(p.shape) for p in workload.model.parameters())
    if longest > LARGEST_SIDE:
        raise Unsupported(f"it keeps a matrix for every side of a weight, and the longest here is {longest:,}")
    parameters = workload.model.parameters()
    return _train(workload, Shampoo(parameters, lr=1e-9, preconditioning_compute_steps=interval))


def _soap(workload: Workload, interval: int) -> Candidate:
    from pytorch_optimizer import SOAP

    parameters = workload.model.parameters()
    return _train(
        workload, SOAP(parameters, lr=1e-9, precondition_frequency=interval, max_precondition_dim=LARGEST_SIDE)
    )


def _kfac(workload: Workload, interval: int) -> Candidate:
    from asdl import FISHER_EMP, KfacGradientMaker, PreconditioningConfig

    if any(isinstance(m, (nn.MultiheadAttention, nn.Embedding, nn.EmbeddingBag)) for m in workload.model.modules()):
        raise Unsupported("asdfghjkl's K-FAC has no attention, and no embeddings of indices in one dimension")
    config = PreconditioningConfig(
        preconditioner_upd_interval=interval,
        curvature_upd_interval=interval,
        damping=0.1,
        ema_decay=0.95,
        data_size=workload.inputs[0].shape[0],
    )

    def loss(output: Tensor, reduction: str = "mean") -> Tensor:
        mean = workload.loss(output)
        return mean * workload.inputs[0].shape[0] if reduction == "sum" else mean

    maker = KfacGradientMaker(workload.model, config, fisher_type=FISHER_EMP)
    optimizer = torch.optim.SGD(workload.model.parameters(), lr=1e-9, momentum=0.9)

    def step() -> None:
        output = maker.setup_model_call(workload.model, *workload.inputs)
        maker.setup_loss_call(loss, output)
        maker.forward_and_backward()
        optimizer.step()
        optimizer.zero_grad()

    return Candidate(optimizer=optimizer, step=step)


def _own_kfac(workload: Workload, interval: int) -> Candidate:
    """This repository's, which knows attention and embeddings."""
    sgd, side = torch.optim.SGD, LARGEST_SIDE
    optimizer = KFAC(workload.model, sgd, lr=1e-9, damping=0.1, update_every=interval, max_side=side, momentum=0.9)
    optimizer.track_times()
    return _train(workload, optimizer)


CANDIDATES: dict[str, Callable[[Workload, int], Candidate]] = {
    "sgd": partial(_torch, cls=torch.optim.SGD, momentum=0.9),
    "sgd-foreach": partial(_torch, cls=torch.optim.SGD, momentum=0.9, foreach=True),
    "adam": partial(_torch, cls=torch.optim.Adam),
    "adagrad": partial(_torch, cls=torch.optim.Adagrad),
    "adamw": partial(_torch, cls=torch.optim.AdamW),
    "muon": _muon,
    "ngplus": partial(_ngplus, base=torch.optim.SGD),
    "ngplus-foreach": partial(_ngplus, base=torch.optim.SGD, foreach=True),
    "ngplus-adam": partial(_ngplus, base=torch.optim.Adam),
    "ngplus-adagrad": partial(_ngplus, base=torch.optim.Adagrad),
    "ngplus-adamw": partial(_ngplus, base=torch.optim.AdamW),
    "ngplus-adamw-batch": partial(_ngplus, base=torch.optim.AdamW, samples="batch"),
    "ngplus-dense": partial(_ngplus, base=torch.optim.SGD, solver="dense"),
    "ngplus-low-rank": partial(_ngplus, base=torch.optim.SGD, solver="low_rank"),
    "ngplus-sketched": partial(_ngplus, base=torch.optim.SGD, solver="sketched", sketch_size=128),
    "ngplus-blocks": partial(_ngplus, base=torch.optim.SGD, block_size=128),
    "ngplus-adagrad-blocks": partial(_ngplus, base=torch.optim.Adagrad, block_size=128),
    "ngplus-adagrad-32-samples": partial(_ngplus, base=torch.optim.Adagrad, max_samples=32),
    "ngplus-mini-batch": partial(_ngplus, base=torch.optim.SGD, curvature="mini_batch"),
    "ngplus-eigen": partial(_ngplus_eigen, sides="both"),
    "ngplus-eigen-short": partial(_ngplus_eigen, sides="short"),
    "ngplus-eigen-momentum": partial(_ngplus_eigen, sides="both", curvature="momentum"),
    "kfac (asdfghjkl)": _kfac,
    "kfac (ngplus.baselines)": _own_kfac,
    "shampoo (pytorch-optimizer)": _shampoo,
    "soap (pytorch-optimizer)": _soap,
}
