"""The Kronecker comparison against the formed EFIM."""

import pytest
import torch

from experiments.theory.kronecker import (
    LEFT,
    PRINTED,
    Kronecker,
    LayerSamples,
    compare,
    cosine,
    kronecker_forms,
    natural_direction,
)


def vec(matrix):
    return matrix.mT.reshape(-1)


def random_layer(m=4, n=5, kappa=3, samples=12):
    torch.manual_seed(0)
    g, a = (torch.randn(samples, kappa, size, dtype=torch.float64) for size in (m, n))
    return LayerSamples.of_factors("layer", g, a, torch.randn(m, n, dtype=torch.float64))


def formed(layer):
    columns = torch.stack([vec(G) for G in layer.gradients])
    return columns.mT @ columns / len(columns)


def test_errors_equal_those_of_the_formed_matrices():
    layer = random_layer()
    fisher, forms = formed(layer), kronecker_forms(layer)
    rows = {row["method"]: row for row in compare(layer)}
    for method, form in forms.items():
        matrix = torch.kron(form.right, form.left)
        scale = (matrix * fisher).sum() / matrix.square().sum()
        error, best = ((fisher - c * matrix).norm() / fisher.norm() for c in (1.0, scale))
        assert rows[method]["error"] == pytest.approx(float(error), rel=1e-9)
        assert rows[method]["error_best_scale"] == pytest.approx(float(best), rel=1e-9)


def test_cosines_equal_those_of_dense_solves():
    layer = random_layer()
    fisher, eye = formed(layer), torch.eye(20, dtype=torch.float64)
    damping = 0.1 * float(torch.linalg.eigvalsh(fisher)[-1])
    exact = torch.linalg.solve(damping * eye + fisher, vec(layer.held_out))
    rows = {row["method"]: row for row in compare(layer)}
    for method, form in kronecker_forms(layer).items():
        matrix = damping * eye + torch.kron(form.right, form.left)
        ours = torch.linalg.solve(matrix, vec(layer.held_out))
        assert rows[method]["cosine_0.1"] == pytest.approx(cosine(ours, exact), rel=1e-9)


def test_divided_by_n_is_the_best_of_the_one_sided_forms():
    rows = {row["method"]: row for row in compare(random_layer())}
    assert rows[LEFT]["error"] == pytest.approx(rows[LEFT]["error_best_scale"])
    assert rows[PRINTED]["error"] > 2 * rows[LEFT]["error"]


def test_directions_equal_dense_solves():
    layer = random_layer()
    G, eye = layer.held_out, torch.eye(20, dtype=torch.float64)
    exact = torch.linalg.solve(0.3 * eye + formed(layer), vec(G)).view(5, 4).mT
    torch.testing.assert_close(natural_direction(layer.gradients, G, 0.3), exact)
    A, B = (torch.randn(size, size, dtype=torch.float64) for size in (4, 5))
    form = Kronecker(A @ A.mT, B @ B.mT)
    for damping, direction in zip((0.3, 2.0), form.directions(G, (0.3, 2.0)), strict=True):
        dense = torch.linalg.solve(damping * eye + torch.kron(form.right, form.left), vec(G)).view(5, 4).mT
        torch.testing.assert_close(direction, dense)


def test_kfac_is_exact_where_inputs_and_output_gradients_are_independent():
    g, a = torch.randn(7, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    pairs = [(i, j) for i in range(7) for j in range(5)]  # every g with every a: E[aaᵀ ⊗ ggᵀ] is a product
    layer = LayerSamples.of_factors(
        "layer",
        torch.stack([g[i : i + 1] for i, _ in pairs]),
        torch.stack([a[j : j + 1] for _, j in pairs]),
        torch.randn(3, 4, dtype=torch.float64),
    )
    kfac = next(row for row in compare(layer) if row["method"] == "K-FAC")
    assert kfac["error"] == pytest.approx(0, abs=1e-7)
    assert kfac["cosine_0.1"] == pytest.approx(1)
