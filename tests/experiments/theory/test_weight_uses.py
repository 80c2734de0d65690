"""What is seen of a forward pass: functions that get a weight, whichever module calls them."""

import pytest
import torch
import torch.nn.functional as F
from schnetpack.nn import Dense, shifted_softplus
from torch import nn

from experiments.theory.weight_uses import FUNCTIONS, record_uses


class Mixed(nn.Module):
    """One use of each kind, and a table that is tied to the output."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.bag = nn.EmbeddingBag(5, 6, mode="sum")
        self.convolution = nn.Conv2d(1, 4, 3, padding=1)
        self.dense = Dense(6, 6, activation=shifted_softplus)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.table.weight

    def forward(self, tokens):
        x = self.table(tokens) + self.bag(tokens % 5).unsqueeze(1)  # (B, T, 6)
        x = x + self.convolution(x.unsqueeze(1)).mean(dim=1)
        return self.out(self.dense(x))


def test_every_use_is_seen_in_order_with_its_positions():
    model = Mixed()
    with record_uses(model) as uses:
        model(torch.zeros(2, 7, dtype=torch.long))
    assert [(use.layer, use.function, use.positions) for use in uses] == [
        ("table", "embedding", 14),
        ("bag", "embedding_bag", 14),
        ("convolution", "conv2d", 2 * 7 * 6),
        ("dense", "linear", 14),
        ("table", "linear", 14),  # the tied output goes by the first module's name
    ]


def test_the_output_is_what_comes_before_the_activation():
    dense, x = Dense(3, 2, activation=shifted_softplus), torch.randn(4, 3)
    with record_uses(dense) as uses:
        dense(x)
    torch.testing.assert_close(uses[0].output, x @ dense.weight.mT + dense.bias)
    assert uses[0].inputs is x


def test_functions_are_put_back_even_after_an_error():
    before = {name: getattr(F, name) for name in FUNCTIONS}
    with pytest.raises(ValueError, match="stop"), record_uses(nn.Linear(2, 2)):
        raise ValueError("stop")
    assert before == {name: getattr(F, name) for name in FUNCTIONS}


def test_weights_of_other_models_are_not_seen():
    mine, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with record_uses(mine) as uses:
        other(mine(torch.ones(1, 2)))
    assert [use.module for use in uses] == [mine]
