"""The layers that are read off a model, and those of the paper's four models."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.theory.costs import operations
from experiments.theory.costs.method_costs import total_row
from experiments.theory.costs.model_shapes import CRITEO_ROWS, PAPER_MODELS, layer_shapes, paper_layers
from experiments.theory.costs.operations import model_operations


@pytest.fixture(scope="module", params=PAPER_MODELS)
def paper(request):
    return request.param, *paper_layers(request.param)


def test_forward_and_backward_cost_what_torch_counts():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.Flatten(),
        nn.Linear(128, 5, bias=False),
    )
    images = torch.randn(2, 3, 8, 8)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    assert model_operations(layer_shapes(model, lambda: model(images), 2), 2) == counter.get_total_flops()


def test_shapes_of_every_kind_of_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = nn.EmbeddingBag(50, 6)
            self.convolution = nn.Conv1d(6, 4, 3, groups=2)
            self.table = nn.Embedding(30, 8)
            self.token = nn.Linear(8, 30)
            self.token.weight = self.table.weight

        def forward(self, indices, sequence):
            self.bag(indices)
            self.convolution(sequence.mT)
            return self.token(self.table(indices))

    model = Model()
    indices, sequence = torch.zeros(2, 7, dtype=torch.long), torch.randn(2, 10, 6)
    shapes = layer_shapes(model, lambda: model(indices, sequence), 2)
    assert [(s.name, s.m, s.n, s.kappa, s.groups, s.lookups, s.input_gradient) for s in shapes] == [
        ("bag", 6, 50, 7, 1, 7, False),
        ("convolution", 2, 10, 8, 2, 0, False),
        ("table", 30, 8, 14, 1, 7, True),  # tied: one matrix of both uses, 7 lookups and 7 products
    ]


def test_every_weight_of_the_papers_models_is_there_once(paper):
    name, layers, _ = paper
    model = PAPER_MODELS[name]().model
    normalisation = nn.BatchNorm2d | nn.LayerNorm
    owners = [module for module in model.modules() if not isinstance(module, normalisation)]
    own = {id(p): p.numel() for module in owners for p in module.parameters(recurse=False)}
    assert len({layer.name for layer in layers}) == len(layers)
    assert sum(layer.parameters for layer in layers) == sum(own.values())


def test_one_matrix_is_never_larger_than_the_gradient_and_kfac_costs_at_least_twice(paper):
    _, layers, batch = paper
    for layer in layers:
        ours, kfac = operations.ngplus_cost(layer, batch), operations.kfac_cost(layer, batch)
        assert ours.store <= layer.parameters
        assert kfac.invert >= 2 * ours.invert
        assert kfac.apply >= 2 * ours.apply


def test_sizes_of_the_papers_models(paper):
    name, layers, batch = paper
    by_name = {layer.name: layer for layer in layers}
    if name == "schnet":  # 6 interactions of 5 layers, a table, 2 output layers
        assert len(layers) == 33
        pairs, atoms = (by_name[f"representation.interactions.5.{x}"] for x in ("filter_network.0", "in2f"))
        assert (pairs.m, pairs.n, atoms.m, atoms.n) == (128, 51, 128, 128)
        assert 17 <= atoms.kappa <= 19  # QM9's 18.0 atoms, of which all pairs are within 10 Å but for a few
        assert 0.9 * atoms.kappa * (atoms.kappa - 1) < pairs.kappa < 1.1 * atoms.kappa**2
    if name == "transformer":  # 6 · (4 + 2) and 6 · (8 + 2) layers, two tables, the second tied to the output
        assert len(layers) == 98
        assert by_name["decoder.embed_tokens"].lookups == 25
        assert (by_name["decoder.embed_tokens"].m, by_name["decoder.embed_tokens"].n) == (6632, 512)
        assert by_name["encoder.embed_tokens"].n == 8848
    if name == "dlrm":
        assert sum(CRITEO_ROWS) == 33_762_577
        assert [layer.n for layer in layers if layer.embedding] == list(CRITEO_ROWS)
        assert (by_name["top.0"].m, by_name["top.0"].n) == (512, 16 + 27 * 26 // 2 + 1)
        assert batch == 128


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
