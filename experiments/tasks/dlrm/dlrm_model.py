"""The deep learning recommendation model: dense numbers and categories in, the logit of a click out.

Source: Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems",
arXiv:1906.00091; shapes and initialisation as in the authors' code, written from scratch.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class DLRM(nn.Module):
    """Dot products between the embeddings of categories and the image of the numbers, then a perceptron.

    With z₀ the bottom perceptron of the numbers and z₁ … z_c the tables' rows, the top perceptron sees z₀ and
    ⟨zᵢ, zⱼ⟩ for all i > j.

    Args:
        numbers: dense inputs.
        rows: of each table.
        embedding: width of all z.
        bottom: widths between the numbers and z₀.
        top: widths between the products and the logit.
        sparse: whether tables have sparse gradients.
    """

    def __init__(
        self,
        numbers: int,
        rows: Sequence[int],
        *,
        embedding: int = 16,
        bottom: Sequence[int] = (512, 256, 64),
        top: Sequence[int] = (512, 256),
        sparse: bool = False,
    ) -> None:
        super().__init__()
        features = len(rows) + 1
        self.tables = nn.ModuleList(nn.EmbeddingBag(n, embedding, mode="sum", sparse=sparse) for n in rows)
        self.bottom = nn.Sequential(*_layers(numbers, *bottom, embedding))
        self.top = nn.Sequential(*_layers(embedding + features * (features - 1) // 2, *top), nn.Linear(top[-1], 1))
        self.register_buffer("pairs", torch.tril_indices(features, features, -1), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Tables uniform in ±1/√rows; weights (m, n) normal with variance 2/(m + n), biases with 1/m."""
        for table in self.tables:
            bound = table.num_embeddings**-0.5
            nn.init.uniform_(table.weight, -bound, bound)
        for layer in (*self.bottom, *self.top):
            if isinstance(layer, nn.Linear):
                m, n = layer.weight.shape
                nn.init.normal_(layer.weight, std=(2 / (m + n)) ** 0.5)
                nn.init.normal_(layer.bias, std=m**-0.5)

    def forward(self, dense: Tensor, categories: Tensor) -> Tensor:
        """Logits, (B,).

        Args:
            dense: (B, numbers).
            categories: (B, tables): rows.

        Returns:
            Logits, (B,).
        """
        bottom = self.bottom(dense)  # (B, e)
        embedded = [table(categories[:, i : i + 1]) for i, table in enumerate(self.tables)]
        features = torch.stack([bottom, *embedded], dim=1)  # (B, f, e)
        products = features @ features.mT  # (B, f, e) x (B, e, f) -> (B, f, f)
        crossed = products[:, self.pairs[0], self.pairs[1]]  # (B, f (f - 1) / 2)
        return self.top(torch.cat([bottom, crossed], dim=1)).squeeze(1)


def _layers(*sizes: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return layers
