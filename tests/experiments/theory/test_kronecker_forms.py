"""The Kronecker comparison against the formed EFIM."""

import pytest
import torch

from experiments.theory.kronecker_forms import (
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
    """A layer's samples, and gradients of others."""
    torch.manual_seed(0)
    g, a = (torch.randn(samples, kappa, size, dtype=torch.float64) for size in (m, n))
    return LayerSamples.of_factors("layer", g, a), torch.randn(7, m, n, dtype=torch.float64)


def formed(gradients):
    columns = torch.stack([vec(G) for G in gradients])
    return columns.mT @ columns / len(columns)


def test_errors_equal_those_of_the_formed_matrices():
    layer, others = random_layer()
    own, other, forms = formed(layer.gradients), formed(others), kronecker_forms(layer)
    rows = {row["method"]: row for row in compare(layer, others)}
    # For the expectation, ‖F‖² and ⟨F, K⟩ are taken across two sets of samples, so that no sample meets itself.
    for prefix, squared, fisher in (("", (own * other).sum(), other), ("sampled_", own.square().sum(), own)):
        for method, form in forms.items():
            matrix = torch.kron(form.right, form.left)
            inner, norm = (matrix * fisher).sum(), matrix.square().sum()
            error, best = 1 + (norm - 2 * inner) / squared, 1 - inner**2 / (squared * norm)
            assert rows[method][f"{prefix}error"] == pytest.approx(max(0.0, float(error)) ** 0.5, rel=1e-9)
            assert rows[method][f"{prefix}error_best_scale"] == pytest.approx(max(0.0, float(best)) ** 0.5, rel=1e-9)
            if prefix:
                direct = (fisher - matrix).norm() / fisher.norm()
                assert rows[method]["sampled_error"] == pytest.approx(float(direct), rel=1e-9)


def test_for_gaussian_matrices_the_form_is_right_for_the_expectation_and_for_no_samples():
    torch.manual_seed(0)
    gradients, others = torch.randn(2, 400, 10, 12, dtype=torch.float64)
    layer = LayerSamples(
        name="", gradients=gradients, outputs=torch.eye(10).double(), inputs=torch.eye(12).double(), kappa=1
    )
    row = next(row for row in compare(layer, others) if row["method"] == LEFT)
    assert row["error_best_scale"] < 0.15
    rank = 10 * 12 / 400  # ‖EFIM‖² is 1 + mn/N times that of its expectation
    assert row["sampled_error"] == pytest.approx((rank / (1 + rank)) ** 0.5, rel=0.05)


def test_cosines_equal_those_of_dense_solves():
    layer, others = random_layer()
    G, fisher, eye = others.mean(dim=0), formed(layer.gradients), torch.eye(20, dtype=torch.float64)
    damping = 0.1 * float(torch.linalg.eigvalsh(fisher)[-1])
    exact = torch.linalg.solve(damping * eye + fisher, vec(G))
    rows = {row["method"]: row for row in compare(layer, others)}
    for method, form in kronecker_forms(layer).items():
        matrix = damping * eye + torch.kron(form.right, form.left)
        ours = torch.linalg.solve(matrix, vec(G))
        assert rows[method]["cosine_0.1"] == pytest.approx(cosine(ours, exact), rel=1e-9)


def test_divided_by_n_is_the_best_of_the_one_sided_forms():
    rows = {row["method"]: row for row in compare(*random_layer())}
    assert rows[LEFT]["sampled_error"] == pytest.approx(rows[LEFT]["sampled_error_best_scale"])
    assert rows[PRINTED]["sampled_error"] > 2 * rows[LEFT]["sampled_error"]


def test_directions_equal_dense_solves():
    layer, others = random_layer()
    G, eye = others[0], torch.eye(20, dtype=torch.float64)
    exact = torch.linalg.solve(0.3 * eye + formed(layer.gradients), vec(G)).view(5, 4).mT
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
        "layer", torch.stack([g[i : i + 1] for i, _ in pairs]), torch.stack([a[j : j + 1] for _, j in pairs])
    )
    kfac = next(row for row in compare(layer, layer.gradients) if row["method"] == "K-FAC")
    assert kfac["error"] == pytest.approx(0, abs=1e-7)
    assert kfac["cosine_0.1"] == pytest.approx(1)
