import pytest
import torch
from torch.nn import functional as F

from ngplus.starting.loss_graph import read_loss

LABELS = torch.tensor([0, 1, -100, 2, 1, -100])


@pytest.mark.parametrize(
    ("loss", "reduction"),
    [
        (lambda x: F.cross_entropy(x, LABELS), "mean"),
        (lambda x: F.cross_entropy(x, LABELS, reduction="sum"), "sum"),
        (lambda x: F.cross_entropy(x, LABELS, reduction="sum") / 4, "mean"),
        (lambda x: F.cross_entropy(x, LABELS, reduction="none").mean(), "mean"),
        (lambda x: F.cross_entropy(x, LABELS, label_smoothing=0.1), "mean"),
        (lambda x: F.cross_entropy(x, LABELS) / 8, "mean"),
        (lambda x: F.cross_entropy(x, LABELS) + 0.1 * x.square().mean(), "mean"),
        (lambda x: F.binary_cross_entropy_with_logits(x, torch.ones_like(x)), "mean"),
        (lambda x: F.mse_loss(x, torch.ones_like(x), reduction="sum"), "sum"),
        (lambda x: x.sum(), "sum"),
        (lambda x: F.cross_entropy(x, LABELS) + x.sum(), None),
        (lambda x: x.logsumexp((0, 1)), None),
    ],
)
def test_how_a_loss_is_reduced_is_read_off_its_graph(loss, reduction):
    assert read_loss(loss(torch.randn(6, 3, requires_grad=True))).reduction == reduction


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda x: F.mse_loss(x, torch.ones_like(x)), True),
        (lambda x: F.huber_loss(x, torch.ones_like(x)), True),
        (lambda x: (x - 1).square().mean(), True),
        (lambda x: F.cross_entropy(x, LABELS), False),
        (lambda x: x.exp().mean(), False),
    ],
)
def test_a_squared_error_is_known(loss, expected):
    assert read_loss(loss(torch.randn(6, 3, requires_grad=True))).is_regression is expected


def test_ignored_targets_are_counted():
    assert read_loss(F.cross_entropy(torch.randn(6, 3, requires_grad=True), LABELS)).ignored == (2, 6)
