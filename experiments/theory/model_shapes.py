"""The paper's four networks on torch's meta device, where shapes are computed and nothing is stored.

SchNet, the Transformer and DLRM are plain modules with the layers and sizes of the originals (SchNetPack's
QM9 and Materials Project settings, fairseq's ``iwslt_de_en``, DLRM's Criteo Kaggle script): what a cost
needs is a layer's m, n and κ. Any other model can be given to `costs.layer_shapes` in the same way.
"""

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

# Rows of the 26 embedding tables of the Criteo Kaggle data, as DLRM's preprocessing leaves them.
CRITEO_ROWS = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27),
    *(14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)


class Interaction(nn.Module):
    """One SchNet block: filters from the distances of pairs, features of atoms before and after them."""

    def __init__(self, width: int, filters: int, gaussians: int) -> None:
        super().__init__()
        self.filter_1, self.filter_2 = nn.Linear(gaussians, filters), nn.Linear(filters, filters)
        self.in2f = nn.Linear(width, filters, bias=False)
        self.f2out_1, self.f2out_2 = nn.Linear(filters, width), nn.Linear(width, width)

    def forward(self, atoms: Tensor, pairs: Tensor) -> Tensor:
        """Shapes (B, atoms, width), (B, pairs, gaussians) -> (B, atoms, width)."""
        weights = self.filter_2(self.filter_1(pairs)).mean(dim=1, keepdim=True)  # stands for the scatter sum
        return atoms + self.f2out_2(self.f2out_1(self.in2f(atoms) * weights))


class SchNetShapes(nn.Module):
    """SchNet's layers: an embedding of atom types, interactions, an atom-wise output network."""

    def __init__(self, width: int, interactions: int, gaussians: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, width)
        self.interactions = nn.ModuleList(Interaction(width, width, gaussians) for _ in range(interactions))
        self.out_1, self.out_2 = nn.Linear(width, width // 2), nn.Linear(width // 2, 1)

    def forward(self, types: Tensor, pairs: Tensor) -> Tensor:
        """Shapes (B, atoms), (B, pairs, gaussians) -> (B, 1)."""
        atoms = self.embedding(types)
        for interaction in self.interactions:
            atoms = interaction(atoms, pairs)
        return self.out_2(self.out_1(atoms)).sum(dim=1)


class TransformerShapes(nn.Module):
    """fairseq's ``iwslt_de_en``: d 512, feed-forward 1024, 4 heads, 6 + 6 layers, embeddings not tied."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(source, 512), nn.Embedding(target, 512)
        self.body = nn.Transformer(512, 4, 6, 6, 1024, dropout=0.0, batch_first=True)
        self.project = nn.Linear(512, target, bias=False)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Shapes (B, S), (B, T) -> (B, T, vocabulary)."""
        return self.project(self.body(self.source(source), self.target(target)))


class DLRMShapes(nn.Module):
    """DLRM for Criteo Kaggle: bottom 13-512-256-64-16, 26 tables of width 16, top 367-512-256-1."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(rows, 16, mode="sum") for rows in CRITEO_ROWS)
        self.bottom = nn.Sequential(*(nn.Linear(i, o) for i, o in ((13, 512), (512, 256), (256, 64), (64, 16))))
        self.top = nn.Sequential(*(nn.Linear(i, o) for i, o in ((367, 512), (512, 256), (256, 1))))

    def forward(self, dense: Tensor, indices: Tensor) -> Tensor:
        """Shapes (B, 13), (B, 26) -> (B, 1)."""
        x = self.bottom(dense)
        vectors = torch.stack([x, *(table(indices[:, [k]]) for k, table in enumerate(self.tables))], dim=1)
        products = (vectors @ vectors.mT).flatten(1)[:, : 27 * 26 // 2]  # the pairs' count is what matters
        return self.top(torch.cat([x, products], dim=1))


def _tokens(batch: int, length: int) -> Tensor:
    return torch.zeros(batch, length, dtype=torch.long)


def resnet50() -> tuple[nn.Module, tuple[Tensor, ...], int]:
    """ResNet50 of torchvision at 224², batch 256."""
    return torchvision.models.resnet50(), (torch.empty(2, 3, 224, 224),), 256


def schnet() -> tuple[nn.Module, tuple[Tensor, ...], int]:
    """SchNet on QM9 molecules of 18 atoms, all 306 pairs, batch 100."""
    return SchNetShapes(128, 6, 50), (_tokens(2, 18), torch.empty(2, 306, 50)), 100


def transformer() -> tuple[nn.Module, tuple[Tensor, ...], int]:
    """Sentences of 25 tokens; 4096 tokens are 164 of them."""
    return TransformerShapes(8848, 6632), (_tokens(2, 25), _tokens(2, 25)), 164


def dlrm() -> tuple[nn.Module, tuple[Tensor, ...], int]:
    """DLRM at batch 128."""
    return DLRMShapes(), (torch.empty(2, 13), _tokens(2, 26)), 128


# name -> () -> (model, example inputs with a batch of two, the paper's batch); call under device("meta")
PAPER_MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...], int]]] = {
    "resnet50": resnet50,
    "schnet": schnet,
    "transformer": transformer,
    "dlrm": dlrm,
}
