"""The models at their papers' shapes, on made-up data: for cost only, never in a table of results."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.tasks.dlrm.dlrm_model import DLRM
from experiments.tasks.protocol import Task


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One model and one batch.

    Attributes:
        name: as it stands in tables.
        model: in training mode, on its device.
        inputs: what the model is called with.
        loss: scalar loss of the model's output, a mean over samples.
        interval: the method's usual 𝒯 on this model.
        samples: what NG+ takes for a sample here.
        turn: steps an optimizer makes one after another, of which one refreshes: 3 or more, and more where steps are
            short, since those after a refresh step find the caches emptied.
    """

    name: str
    model: nn.Module
    inputs: tuple[Any, ...]
    loss: Callable[[Tensor], Tensor]
    interval: int
    samples: str = "batch"
    turn: int = 4


def resnet50(device: str, *, batch: int = 32, size: int = 224) -> Workload:
    """The resnet50 of torchvision."""
    from torchvision.models import resnet50 as build

    labels = torch.randint(1000, (batch,), device=device)
    return Workload(
        name=f"resnet50 {size}², batch {batch}",
        model=build().to(device),
        inputs=(torch.randn(batch, 3, size, size, device=device),),
        loss=lambda logits: F.cross_entropy(logits, labels),
        interval=500,
    )


class _SchNet(nn.Module):
    """SchNetPack's SchNet and the sum of its atomwise energies."""

    def __init__(self, molecules: int) -> None:
        super().__init__()
        from schnetpack.atomistic import Atomwise, PairwiseDistances
        from schnetpack.nn import CosineCutoff, GaussianRBF
        from schnetpack.representation import SchNet

        self.distances = PairwiseDistances()
        self.representation = SchNet(128, 6, GaussianRBF(50, 10.0), CosineCutoff(10.0))
        self.energy = Atomwise(128, output_key="energy")
        self.molecules = molecules

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.energy(self.representation(self.distances(dict(inputs))))["energy"]


def schnet(device: str, *, molecules: int = 100, atoms: int = 18) -> Workload:
    """SchNetPack's SchNet at the paper's size (128 features, 6 interactions, cutoff 10 Å), QM9-like molecules."""
    index = torch.arange(molecules * atoms).view(molecules, atoms)
    others = ~torch.eye(atoms, dtype=torch.bool)
    pairs = index[:, :, None].expand(-1, -1, atoms)[:, others], index[:, None, :].expand(-1, atoms, -1)[:, others]
    centres, neighbours = (pair.flatten() for pair in pairs)
    inputs = {
        "_atomic_numbers": torch.randint(1, 10, (molecules * atoms,)),
        "_positions": torch.randn(molecules * atoms, 3) * 2,
        "_idx_m": torch.arange(molecules).repeat_interleave(atoms),
        "_idx_i": centres,
        "_idx_j": neighbours,
        "_offsets": torch.zeros(centres.numel(), 3),
        "_n_atoms": torch.full((molecules,), atoms),
    }
    energies = torch.randn(molecules, device=device)
    return Workload(
        name=f"SchNet, {molecules} molecules of {atoms} atoms",
        model=_SchNet(molecules).to(device),
        inputs=({name: value.to(device) for name, value in inputs.items()},),
        loss=lambda energy: F.mse_loss(energy, energies),
        interval=200,
        samples="rows",
    )


class _Translator(nn.Module):
    """An encoder-decoder of iwslt_de_en's size: 512 wide, 1024 in the feed-forward, 4 heads, 6 + 6 layers."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.source = nn.Embedding(vocabulary, 512)
        self.target = nn.Embedding(vocabulary, 512)
        self.layers = nn.Transformer(512, 4, 6, 6, 1024, dropout=0.3, batch_first=True, norm_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        states = self.layers(self.source(source), self.target(target))
        return F.linear(states, self.target.weight)


def transformer(device: str, *, sentences: int = 160, length: int = 25, vocabulary: int = 10_000) -> Workload:
    """A Transformer of iwslt_de_en's size and about its 4,096 tokens a batch."""
    source, target, labels = (torch.randint(vocabulary, (sentences, length), device=device) for _ in range(3))
    return Workload(
        name=f"Transformer iwslt, {sentences} × {length} tokens",
        model=_Translator(vocabulary).to(device),
        inputs=(source, target),
        loss=lambda logits: F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1),
        interval=200,
        samples="rows",
    )


class _Loss(nn.Module):
    """A task's loss as a model's output."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task, self.model = task, task.build_model()

    def forward(self, batch: Any) -> Tensor:
        return self.task.loss(self.model, batch)


def fairseq(device: str) -> Workload:
    """The Transformer of the paper's recipe for IWSLT14, fairseq's own, on one full batch of random tokens."""
    from experiments.config.recipe import load_recipe
    from experiments.estimate.stand_ins.made_up_sentences import MadeUpSentences

    task = MadeUpSentences(load_recipe("transformer-iwslt14", "paper").task_settings, scale="paper")
    batch = task.to_device(next(task.train_batches(0, 0)), device)
    return Workload(
        name=f"fairseq's iwslt_de_en, {batch['ntokens']:,} target tokens",
        model=_Loss(task).to(device),
        inputs=(batch,),
        loss=lambda loss: loss,
        interval=200,
        samples="rows",
    )


def gpt(device: str) -> Workload:
    """The decoder of gpt-text at scale small, on one batch of random tokens."""
    from experiments.config.recipe import load_recipe
    from experiments.estimate.stand_ins.made_up_tokens import MadeUpTokens

    task = MadeUpTokens(load_recipe("gpt-text", "small").task_settings, scale="small")
    return Workload(
        name=f"GPT, {task.settings.batch_size} × {task.settings.context} tokens",
        model=_Loss(task).to(device),
        inputs=(task.to_device(next(task.train_batches(0, 0)), device),),
        loss=lambda loss: loss,
        interval=200,
        samples="rows",
        turn=12,
    )


def dlrm(device: str, *, batch: int = 128, largest: int = 100_000, sparse: bool = False) -> Workload:
    """A DLRM of Criteo Kaggle's shape; ``largest`` is the number of rows of its largest table.

    Args:
        device: where.
        batch: samples.
        largest: rows of the largest table.
        sparse: whether embeddings give sparse gradients.

    Returns:
        The model with a batch.
    """
    rows = [largest, *([10_000] * 5), *([1_000] * 10), *([100] * 10)]
    clicks = torch.randint(2, (batch,), device=device).float()
    categories = torch.stack([torch.randint(n, (batch,)) for n in rows], dim=1)
    return Workload(
        name=f"DLRM, largest table {largest:,} rows{', sparse' if sparse else ''}",
        model=DLRM(13, rows, sparse=sparse).to(device),
        inputs=(torch.randn(batch, 13, device=device), categories.to(device)),
        loss=lambda logits: F.binary_cross_entropy_with_logits(logits, clicks),
        interval=200,
        turn=12,
    )


def convolutions(
    device: str,
    *,
    size: tuple[int, ...],
    channels: int,
    kernel: int = 3,
    batch: int = 1,
    depthwise: bool = False,
    samples: str = "batch",
) -> Workload:
    """Three convolutions that keep the size of a signal, an image or a volume, the second of them the largest."""
    Conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(size)]
    groups = channels if depthwise else 1
    model = nn.Sequential(
        Conv(1, channels, kernel, padding="same"),
        nn.ReLU(),
        Conv(channels, channels, kernel, padding="same", groups=groups),
        nn.ReLU(),
        Conv(channels, 2, 1),
    )
    shape = " × ".join(map(str, size))
    return Workload(
        name=f"{'depthwise ' if depthwise else ''}{Conv.__name__} {shape}, {channels} channels, batch {batch}",
        model=model.to(device),
        inputs=(torch.randn(batch, 1, *size, device=device),),
        loss=lambda output: output.square().mean(),
        interval=500,
        samples=samples,
    )


def linear_layers(device: str, *, layers: int, width: int, batch: int = 32) -> Workload:
    """Square linear layers one after another: what a step costs that has little to compute and much to call."""
    return Workload(
        name=f"{layers:,} linear layers {width} × {width}, batch {batch}",
        model=nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))).to(device),
        inputs=(torch.randn(batch, width, device=device),),
        loss=lambda output: output.square().mean(),
        interval=200,
        turn=12,
    )


_CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "conv1d": {"size": (2**18,), "channels": 16, "kernel": 9},
    "conv2d": {"size": (512, 512), "channels": 32},
    "conv2d-depthwise": {"size": (512, 512), "channels": 32, "depthwise": True},
    "conv3d": {"size": (64, 64, 64), "channels": 16},
    "conv3d-batch-4": {"size": (48, 48, 48), "channels": 16, "batch": 4},
}


WORKLOADS: dict[str, Callable[[str], Workload]] = {
    "resnet50": lambda device: resnet50(device, batch=8 if device == "cpu" else 256),
    "resnet50-32": resnet50,
    "schnet": schnet,
    "transformer": transformer,
    "fairseq": fairseq,
    "gpt": gpt,
    "dlrm": dlrm,
    "linear-8": partial(linear_layers, layers=2000, width=8),
    "linear-64": partial(linear_layers, layers=100, width=64),
    "dlrm-sparse": lambda device: dlrm(device, sparse=True),
    **{name: partial(convolutions, **shape) for name, shape in _CONVOLUTIONS.items()},
    **{f"{name}-rows": partial(convolutions, **shape, samples="rows") for name, shape in _CONVOLUTIONS.items()},
}
