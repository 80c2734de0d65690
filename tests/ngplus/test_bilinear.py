"""Bilinear layers: out × (in₁ · in₂), a linear function of the products of two inputs' entries."""

import pytest
import torch
from torch import nn

from ngplus import NGPlus
from ngplus.baselines import KFAC, SENG
from tests.ngplus import oracle
from tests.ngplus.cases import points, seed_cpu


class Pair(nn.Module):
    """A bilinear layer of two inputs."""

    def __init__(self, dtype=torch.float64, **options):
        super().__init__()
        seed_cpu(0)
        self.layer = nn.Bilinear(4, 3, 5, dtype=dtype, **options)

    def forward(self, x, y):
        return self.layer(x, y)


@pytest.mark.parametrize("samples", ["batch", "rows"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("between", [(), (2,), (2, 6)])
def test_bilinear_of_any_shape_matches_the_oracle(between, bias, samples):
    oracle.check(Pair(bias=bias), points(3, *between, 4), points(3, *between, 3), samples=samples)


@pytest.mark.parametrize("options", [{"block_size": 2}, {"max_samples": 2}, {"solver": "low_rank"}])
def test_bilinear_with_every_option(options):
    oracle.check(Pair(), points(3, 4), points(3, 3), **options)


def test_bilinear_with_another_batch_dimension_and_in_float32():
    oracle.check(Pair(), points(2, 3, 4), points(2, 3, 3), batch_dim=1)
    oracle.check(Pair(torch.float32), points(3, 4, dtype=torch.float32), points(3, 3, dtype=torch.float32))


def test_rows_of_a_bilinear_layer_are_grouped_by_their_index():
    model, x, y = Pair(), points(5, 4), points(5, 3)
    index = torch.tensor([0, 1, 0, 2, 1])
    parts = [(x[index == i], y[index == i]) for i in range(3)]
    gradients = oracle.sample_gradients(model, [lambda m, p=p: oracle.energy(m(*p)) for p in parts])
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1)
    optimizer.sample_index = index
    (oracle.energy(model(x, y)) / 3).backward()
    optimizer.step()
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10


@pytest.mark.parametrize("kind", [KFAC, SENG])
def test_baselines_have_its_factors(kind):
    model = Pair()
    optimizer = kind(model, lr=1e-9, damping=0.3, update_every=1)
    oracle.batch_loss(points(3, 4), points(3, 3))(model).backward()
    optimizer.step()
    assert set(optimizer.curvature) == {"layer.weight"}
