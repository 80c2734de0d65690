"""What is timed is what is counted, and computes what it says."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.theory.costs import timings
from experiments.theory.costs.operations import COSTS, LayerShape

# One that is built through the Gram matrix, one whose gradients are formed, one with the smaller side on the right.
SHAPES = [(6, 20, 2), (4, 5, 30), (20, 6, 3)]


@pytest.mark.parametrize(("m", "n", "kappa"), SHAPES)
@pytest.mark.parametrize("method", timings.TIMED)
def test_builds_and_directions_cost_what_is_counted(method, m, n, kappa):
    layer = LayerShape(name="", m=m, n=n, kappa=kappa)
    parts = timings.make_parts(method, layer, timings.draw_factors(layer, 3, seed=0))
    counted = COSTS[method](layer, 3)
    for part in ("build", "apply"):
        with FlopCounterMode(display=False) as counter:
            parts[part]()
        assert counter.get_total_flops() == getattr(counted, part)


@pytest.mark.parametrize(("m", "n", "kappa"), SHAPES)
def test_the_build_is_the_sum_over_samples(m, n, kappa):
    layer = LayerShape(name="", m=m, n=n, kappa=kappa)
    factors = timings.draw_factors(layer, 3, seed=0)
    gradients = [g.mT @ a for g, a in zip(factors.g, factors.a, strict=True)]
    expected = sum(G @ G.mT if m <= n else G.mT @ G for G in gradients)
    torch.testing.assert_close(timings.build_ngplus(layer, factors), expected, rtol=1e-4, atol=1e-3)


def test_the_timed_root_is_an_inverse_fourth_root():
    root = torch.randn(6, 12, dtype=torch.float64)
    matrix = root @ root.mT
    fourth = torch.linalg.matrix_power(timings.inverse_fourth_root(matrix), 4)
    torch.testing.assert_close(fourth, timings.inverse(matrix))


def test_the_largest_layer_within_the_limit_is_timed():
    layers = [
        LayerShape(name="table", m=4, n=90, kappa=1, lookups=1),
        LayerShape(name="small", m=8, n=8, kappa=1),
        LayerShape(name="large", m=9, n=50, kappa=1),
        LayerShape(name="too long", m=8, n=101, kappa=1),
    ]
    assert timings.largest_layer(layers, 100).name == "large"
    assert timings.largest_layer(layers, 7) is None
