"""Figure 1's matrices against explicit ones, and the Kronecker comparison against the formed EFIM."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from experiments.theory import figure1
from experiments.theory.kronecker import Kronecker, LayerSamples, compare, kronecker_forms, natural_direction
from experiments.theory.layer_samples import MODELS, collect_factors, load_images


def vec(matrix):
    return matrix.mT.reshape(-1)


def random_layer(m=4, n=5, kappa=3, samples=12):
    torch.manual_seed(0)
    g, a = (torch.randn(samples, kappa, size, dtype=torch.float64) for size in (m, n))
    return LayerSamples(name="layer", g=g, a=a, held_out=torch.randn(m, n, dtype=torch.float64))


def formed(layer):
    columns = torch.stack([vec(G) for G in layer.gradients()])
    return columns.mT @ columns / len(columns)


def test_blocks_equal_those_of_the_formed_fisher():
    ensemble = figure1.ensembles(6)[1]
    (blocks,) = figure1.accumulate(ensemble, 6, [20], seed=3)
    Z = torch.randn(20, 6, 6, generator=torch.Generator().manual_seed(3))
    G = (ensemble.rows @ Z).double()
    columns = torch.stack([vec(matrix) for matrix in G])
    fisher = columns.mT @ columns / 20
    torch.testing.assert_close(blocks.block, fisher[:6, :6], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(blocks.neighbour, fisher[:6, 6:12], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(blocks.gfim, (G @ G.mT).mean(dim=0), rtol=1e-5, atol=1e-6)


def test_chunks_do_not_change_the_sums_and_counts_are_nested():
    ensemble = figure1.ensembles(5)[0]
    nested = figure1.accumulate(ensemble, 5, [50, 100], seed=0)
    (whole,) = figure1.accumulate(ensemble, 5, [100], seed=0)
    assert [blocks.matrices for blocks in nested] == [50, 100]
    torch.testing.assert_close(nested[-1].gfim, whole.gfim)


def test_the_diagonals_differ_by_n_and_the_rest_is_sampling_error():
    ensemble = figure1.ensembles(40)[0]
    (row,) = figure1.gaussian_rows(ensemble, figure1.accumulate(ensemble, 40, [2000], seed=0))
    assert row["diagonal_ratio"] == pytest.approx(40, rel=0.02)
    assert row["difference_divided_by_n"] == pytest.approx(row["expected_sampling_error"], rel=0.1)
    assert row["difference_as_printed"] > 38


def test_what_is_missed_off_the_diagonal_blocks_equals_the_formed_difference():
    for ensemble in figure1.ensembles(5):
        A, B = (root.double() @ root.double().mT for root in (ensemble.rows, ensemble.columns))
        fisher = torch.kron(B, A)
        best = torch.kron(torch.eye(5).double(), torch.trace(B) / 5 * A)
        expected = float((fisher - best).norm() / fisher.norm())
        assert ensemble.missed() == pytest.approx(expected, abs=1e-3)


def test_errors_equal_those_of_the_formed_matrices():
    layer = random_layer()
    fisher, forms = formed(layer), kronecker_forms(layer, layer.gradients())
    rows = {row["method"]: row for row in compare(layer)}
    for method, form in forms.items():
        matrix = torch.kron(form.right, form.left)
        scale = (matrix * fisher).sum() / matrix.square().sum()
        error, best = ((fisher - c * matrix).norm() / fisher.norm() for c in (1.0, scale))
        assert rows[method]["error"] == pytest.approx(float(error), rel=1e-9)
        assert rows[method]["error_best_scale"] == pytest.approx(float(best), rel=1e-9)


def test_divided_by_n_is_the_best_of_the_one_sided_forms():
    rows = {row["method"]: row for row in compare(random_layer())}
    assert rows["NG+ left, I ⊗ L/n"]["error"] == pytest.approx(rows["NG+ left, I ⊗ L/n"]["error_best_scale"])
    assert rows["NG+ (10) as printed"]["error"] > 2 * rows["NG+ left, I ⊗ L/n"]["error"]


def test_directions_equal_dense_solves():
    layer = random_layer()
    G, eye = layer.held_out, torch.eye(20, dtype=torch.float64)
    exact = torch.linalg.solve(0.3 * eye + formed(layer), vec(G)).view(5, 4).mT
    torch.testing.assert_close(natural_direction(layer.gradients(), G, 0.3), exact)
    A, B = (torch.randn(size, size, dtype=torch.float64) for size in (4, 5))
    form = Kronecker(A @ A.mT, B @ B.mT)
    dense = torch.linalg.solve(0.3 * eye + torch.kron(form.right, form.left), vec(G)).view(5, 4).mT
    torch.testing.assert_close(form.direction(G, 0.3), dense)


@pytest.mark.parametrize("name", MODELS)
def test_factors_give_the_gradients_of_one_sample_at_a_time(name):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    images, labels = torch.randn(3, 1, 28, 28, dtype=torch.float64), torch.tensor([1, 4, 7])
    layers = list(collect_factors(model, lambda: F.cross_entropy(model(images), labels, reduction="sum")))
    assert layers
    for layer, g, a in layers:
        module = model.get_submodule(layer)
        for index in range(3):
            loss = F.cross_entropy(model(images[index : index + 1]), labels[index : index + 1])
            weight, bias = torch.autograd.grad(loss, [module.weight, module.bias])
            oracle = torch.cat([weight.flatten(1), bias[:, None]], dim=1)
            torch.testing.assert_close(g[index].mT @ a[index], oracle)


def test_synthetic_images_are_named_so(monkeypatch, tmp_path):
    monkeypatch.setattr("experiments.theory.layer_samples.EMBEDDED", tmp_path / "missing.npz")
    images, labels, name = load_images(0)
    assert images.shape == (len(labels), 1, 28, 28)
    assert "synthetic" in name


def test_a_small_run_leaves_its_files(tmp_path):
    figure1.run(1, tmp_path, size=20, matrices=200, samples=20, epochs=0)
    for name in ("figure1", "matrices", "layers"):
        for suffix in (".png", ".svg"):
            assert (tmp_path / name).with_suffix(suffix).stat().st_size > 0
    verdicts = (tmp_path / "verdicts.csv").read_text().splitlines()
    assert ",reproduced," in verdicts[1]
    assert len(np.genfromtxt(tmp_path / "gaussian.csv", delimiter=",", names=True)) > 10
