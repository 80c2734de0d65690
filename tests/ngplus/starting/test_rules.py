import pytest
import torch

from ngplus.starting import rules
from ngplus.starting.loss_graph import LossGraph
from ngplus.starting.measurement import InputShapes, MeasuredLayer, find_largest_eigenvalue


def layer(largest, elements=100, short=8):
    return MeasuredLayer(name="weight", matrix="", short=short, elements=elements, largest=largest)


NO_SHAPES = InputShapes(leading={}, has_positions=False)


def test_the_largest_eigenvalue_is_that_of_a_decomposition():
    torch.manual_seed(0)
    factors = torch.randn(3, 40, 10, dtype=torch.float64)
    stack = factors @ factors.mT
    expected = float(torch.linalg.eigvalsh(stack).max())
    assert find_largest_eigenvalue(stack) == pytest.approx(expected, rel=1e-2)


def test_the_median_is_by_weights_and_not_by_layers():
    pairs = [(1.0, 10), (2.0, 10), (3.0, 100), (4.0, 10)]
    assert rules.find_weighted_median(pairs) == 3.0
    with pytest.raises(ValueError, match="no values"):
        rules.find_weighted_median([])


@pytest.mark.parametrize(("steps", "expected"), [(None, 100), (50, 10), (1000, 50), (100_000, 200)])
def test_there_are_twenty_updates_within_bounds(steps, expected):
    assert rules.choose_update_every(steps).settings == {"update_every": expected}


@pytest.mark.parametrize(
    ("base", "short", "batch", "expected"),
    [
        (torch.optim.AdamW, 64, 8, 3e-3),
        (torch.optim.Adam, 800, 8, 5e-4),
        (torch.optim.SGD, 64, 128, 0.05),
        (torch.optim.Adagrad, 64, 128, 0.015),
    ],
)
def test_a_learning_rate_is_guessed_by_base_and_size(base, short, batch, expected):
    shapes = InputShapes(leading={"first": (batch,)}, has_positions=False)
    choice = rules.choose_lr(base, None, [layer(1.0, short=short)], shapes)
    assert choice.settings["lr"] == pytest.approx(expected)
    assert "a guess" in choice.reason


def test_a_learning_rate_that_is_given_stays():
    assert rules.choose_lr(torch.optim.Rprop, 0.2, [layer(1.0)], NO_SHAPES).settings == {"lr": 0.2}


def test_the_damping_is_bounded():
    choice = rules.choose_damping([layer(3e5)], is_regression=False)
    assert choice.settings == {"damping": 10.0}
    assert "up to λ = 1e+05" in choice.reason


def test_a_regression_is_told_that_its_curvature_falls():
    choice = rules.choose_damping([layer(15.0)], is_regression=True)
    assert choice.settings == {"damping": 5.0}
    assert "falls with the error" in choice.notes[0]
    assert rules.choose_damping([layer(15.0)], is_regression=False).notes == []


@pytest.mark.parametrize(
    ("graph", "setting", "note"),
    [
        (LossGraph(reduction="sum"), "sum", None),
        (LossGraph(reduction="mean"), "mean", None),
        (LossGraph(reduction="mean", ignored=(2, 6)), "mean", "2 of 6 targets are ignored"),
        (LossGraph(reduction=None), "mean", "cannot be read off"),
    ],
)
def test_what_the_loss_divides_by_is_said(graph, setting, note):
    choice = rules.choose_reduction(graph)
    assert choice.settings == {"loss_reduction": setting}
    assert [each for each in choice.notes if note is None or note not in each] == []
    assert bool(choice.notes) == (note is not None)
