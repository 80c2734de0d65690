"""The cost formulas against torch's own operation counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.theory.costs import operations
from experiments.theory.costs.operations import LayerShape


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(("m", "n", "kappa"), [(4, 9, 3), (9, 4, 3), (5, 5, 1), (3, 40, 7)])
def test_both_ways_of_building_cost_what_torch_counts(m, n, kappa):
    layer = LayerShape(name="", m=m, n=n, kappa=kappa)
    g, a = torch.empty(kappa, m), torch.empty(kappa, n)
    G = g.mT @ a
    assert operations.forming(layer, m) == counted(lambda: (g.mT @ a) @ (g.mT @ a).mT) - counted(lambda: g.mT @ a)
    short, long = (g, a) if m <= n else (a, g)
    assert operations.through_gram(layer) == counted(lambda: short.mT @ ((long @ long.mT) @ short))
    p = min(m, n)
    side = torch.empty(p, p)
    assert operations.ngplus_cost(layer, 1).apply == counted(lambda: side @ (G if m <= n else G.mT))
    both = counted(lambda: torch.empty(m, m) @ G @ torch.empty(n, n))
    assert operations.kfac_cost(layer, 1).apply == operations.shampoo_cost(layer, 1).apply == both
    assert operations.kfac_cost(layer, 1).build == counted(lambda: (g.mT @ g, a.mT @ a))
    assert operations.shampoo_cost(layer, 1).build == counted(lambda: (G @ G.mT, G.mT @ G))


def test_rows_as_samples_cost_one_scaled_product_a_row():
    layer = LayerShape(name="", m=4, n=9, kappa=7)
    g, a = torch.empty(21, 4), torch.empty(21, 9)  # three samples
    norms = 2 * 21 * 9 + 2 * 21 * 4  # ‖a‖² of each row, and g scaled by it
    assert operations.rows_cost(layer, 3).build == counted(lambda: g.mT @ g) + norms
    assert operations.rows_cost(layer, 3).apply == operations.ngplus_cost(layer, 3).apply
    assert a.shape[0] == g.shape[0]


def test_an_embeddings_cost_does_not_grow_with_its_rows():
    small, large = (LayerShape(name="", m=16, n=rows, kappa=1, lookups=1) for rows in (10**5, 10**7))
    assert operations.ngplus_cost(small, 128) == operations.ngplus_cost(large, 128)
    assert operations.kfac_cost(large, 128).store > 10**13


def test_lookups_of_a_tied_table_multiply_nothing():
    tied = LayerShape(name="", m=100, n=8, kappa=10, lookups=4)
    plain = LayerShape(name="", m=100, n=8, kappa=6)
    assert operations.model_operations([tied], 3) == operations.model_operations([plain], 3)
    assert not tied.embedding
    extra = 2 * (10**2 - 6**2) * 8 + 2 * (10 - 6) * 8**2
    assert operations.through_gram(tied) == operations.through_gram(plain) + extra
