"""The cost formulas against torch's own operation counter, and ResNet50's totals."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.theory import costs
from experiments.theory.costs import LayerShape, layer_shapes, model_operations, paper_layers, total_row


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(("m", "n", "kappa"), [(4, 9, 3), (9, 4, 3), (5, 5, 1), (3, 40, 7)])
def test_both_ways_of_building_cost_what_torch_counts(m, n, kappa):
    layer = LayerShape(name="", m=m, n=n, kappa=kappa)
    g, a = torch.empty(kappa, m), torch.empty(kappa, n)
    G = g.mT @ a
    assert costs.forming(layer, m) == counted(lambda: (g.mT @ a) @ (g.mT @ a).mT) - counted(lambda: g.mT @ a)
    short, long = (g, a) if m <= n else (a, g)
    assert costs.through_gram(layer) == counted(lambda: short.mT @ ((long @ long.mT) @ short))
    p = min(m, n)
    side = torch.empty(p, p)
    assert costs.ngplus_cost(layer, 1).apply == counted(lambda: side @ (G if m <= n else G.mT))
    both = counted(lambda: torch.empty(m, m) @ G @ torch.empty(n, n))
    assert costs.kfac_cost(layer, 1).apply == costs.shampoo_cost(layer, 1).apply == both


def test_forward_and_backward_cost_what_torch_counts():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.Flatten(),
        nn.Linear(128, 5, bias=False),
    )
    images = torch.randn(2, 3, 8, 8)
    expected = counted(lambda: model(images).sum().backward())
    assert model_operations(layer_shapes(model, images), 2) == expected


def test_shapes_of_every_kind_of_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = nn.EmbeddingBag(50, 6)
            self.convolution = nn.Conv1d(6, 4, 3, groups=2)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.token = nn.Linear(8, 3)

        def forward(self, indices, sequence):
            self.bag(indices)
            self.convolution(sequence.mT[:, :6])
            return self.token(self.attention(sequence, sequence, sequence)[0])

    shapes = layer_shapes(Model(), torch.zeros(2, 7, dtype=torch.long), torch.randn(2, 10, 8))
    assert [(s.name, s.m, s.n, s.kappa, s.groups) for s in shapes] == [
        ("bag", 6, 50, 7, 1),
        ("convolution", 2, 10, 8, 2),
        ("attention.q", 8, 9, 10, 1),
        ("attention.k", 8, 9, 10, 1),
        ("attention.v", 8, 9, 10, 1),
        ("attention.out", 8, 9, 10, 1),
        ("token", 3, 9, 10, 1),
    ]


def test_resnet50_totals():
    layers, batch = paper_layers("resnet50")
    total = total_row("resnet50", layers, batch)
    step = total["forward_backward"]
    assert step / 1e12 == pytest.approx(6.22, abs=0.01)
    assert total["ngplus_build"] / step == pytest.approx(0.324, abs=0.001)
    assert total["ngplus_released_build"] / step == pytest.approx(2.11, abs=0.01)
    assert total["ngplus_store"] / total["parameters"] == pytest.approx(0.24, abs=0.005)
    assert total["kfac_store"] / total["parameters"] == pytest.approx(6.0, abs=0.05)
    assert sum(layer.m > layer.n for layer in layers) == 20


def test_an_embeddings_cost_does_not_grow_with_its_rows():
    small, large = (LayerShape(name="", m=16, n=rows, kappa=1, embedding=True) for rows in (10**5, 10**7))
    assert costs.ngplus_cost(small, 128) == costs.ngplus_cost(large, 128)
    assert costs.kfac_cost(large, 128).store > 10**13


@pytest.mark.parametrize("name", costs.PAPER_MODELS)
def test_one_matrix_is_never_larger_than_the_gradient_and_kfac_costs_at_least_twice(name):
    layers, batch = paper_layers(name)
    for layer in layers:
        ours, kfac = costs.ngplus_cost(layer, batch), costs.kfac_cost(layer, batch)
        assert ours.store <= layer.parameters
        assert kfac.invert >= 2 * ours.invert
        assert kfac.apply >= 2 * ours.apply


def test_the_timed_root_is_an_inverse_fourth_root():
    root = torch.randn(6, 12, dtype=torch.float64)
    matrix = root @ root.mT
    fourth = torch.linalg.matrix_power(costs.inverse_fourth_root(matrix), 4)
    torch.testing.assert_close(fourth, costs.inverse(matrix))


def test_a_run_leaves_its_files(tmp_path):
    costs.run(tmp_path, sizes=(8, 16))
    for name in ("resnet50.csv", "totals.csv", "measured.csv", "verdicts.csv", "costs.png", "costs.svg"):
        assert (tmp_path / name).stat().st_size > 0
