"""Damped inverses: batches across layers, matrices that will not factorise, bounded retries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ngplus import NGPlus
from ngplus.curvature import damped_cholesky
from ngplus.curvature.damped_cholesky import InverseRequest, invert, invert_one
from ngplus.tuning import DEFAULT, Tuning
from tests.ngplus.cases import recorded_warnings, seed_cpu


def semidefinite(blocks, size, rank=None, dtype=torch.float64):
    factor = torch.randn(blocks, size, rank or size, dtype=dtype)
    return factor @ factor.mT


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.floats(1e-3, 10)), min_size=1, max_size=5))
def test_matrices_of_any_sizes_and_dampings_are_inverted_together(sizes):
    requests = [InverseRequest(semidefinite(blocks, size, rank=1), damping) for blocks, size, damping in sizes]
    invert(requests)
    for request in requests:
        size = request.matrices.shape[-1]
        damped = request.matrices + request.damping * torch.eye(size, dtype=torch.float64)
        for matrix, made in zip(damped, request.inverse, strict=True):
            torch.testing.assert_close(made @ matrix, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-8)
        assert request.used_damping == request.damping


def test_matrices_of_equal_size_are_factorised_as_one_batch(monkeypatch):
    batches = []
    factorise = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a: batches.append(tuple(a.shape)) or factorise(a))
    invert([InverseRequest(semidefinite(blocks, size), 0.1) for blocks, size in ((1, 4), (2, 3), (5, 4))])
    assert sorted(batches) == [(2, 3, 3), (6, 4, 4)]


def test_single_precision_is_factorised_in_double():
    """λ is 1e-9 of the matrix, beyond what float32 resolves."""
    matrix = torch.ones(1, 2, 2)
    request = InverseRequest(matrix, 1e-9)
    invert([request])
    assert request.inverse.dtype == torch.float32
    expected = torch.linalg.inv(matrix[0].double() + 1e-9 * torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(request.inverse[0].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [3, 65, 129, 200, 321])
def test_well_conditioned_matrices_are_inverted_as_exactly_block_by_block(monkeypatch, dtype, size):
    """‖L‖ is nearly 2λ or .2λ; against eigenvalues in float64."""
    factorised = []
    factorise = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a: factorised.append((len(a[0]), a.dtype)) or factorise(a))
    matrices = semidefinite(3, size, dtype=torch.float64)
    matrices *= 0.59 / torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    requests = [InverseRequest(matrices[:2].to(dtype), 0.3), InverseRequest(matrices[2:].to(dtype), 3.0)]
    invert(requests, Tuning(inverted_multiplications=2**10))
    for request in requests:
        values, vectors = torch.linalg.eigh(request.matrices.double())
        expected = (vectors / (request.damping + values).unsqueeze(1)) @ vectors.mT
        allowed = 16 * torch.finfo(dtype).eps / request.damping
        torch.testing.assert_close(request.inverse.double(), expected, rtol=0, atol=allowed)
        assert request.inverse.dtype == dtype
        assert request.used_damping == request.damping
    assert {found for _, found in factorised} == {dtype}
    assert max(length for length, _ in factorised) <= DEFAULT.inverted_block


def test_each_matrix_is_inverted_in_the_precision_that_its_condition_needs(monkeypatch):
    factorised = []
    factorise = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a: factorised.append((len(a), a.dtype)) or factorise(a))
    well, badly = torch.eye(2)[None] * 0.1, torch.ones(1, 2, 2)
    requests = [InverseRequest(matrices, 0.1) for matrices in (well, badly, well, torch.cat([well, badly]))]
    invert(requests)
    assert sorted(factorised, key=str) == [(2, torch.float32), (3, torch.float64)]
    for request in requests:
        expected = torch.linalg.inv(request.matrices.double() + 0.1 * torch.eye(2, dtype=torch.float64))
        torch.testing.assert_close(request.inverse.double(), expected, rtol=1e-6, atol=0)


def test_blocks_of_a_matrix_that_is_not_definite_are_not_used():
    """‖L‖ is less than 2λ, but L's smallest eigenvalue is −1.5λ."""
    matrix = torch.zeros(1, 100, 100)
    matrix[0, 70, 70] = -0.15
    requests = [InverseRequest(matrix, 0.1), InverseRequest(torch.zeros(1, 100, 100), 0.1)]
    invert(requests, Tuning(inverted_multiplications=0))
    assert [request.used_damping for request in requests] == [1.0, 0.1]
    torch.testing.assert_close(requests[0].inverse[0, 70, 70], torch.tensor(1 / 0.85))
    torch.testing.assert_close(requests[1].inverse[0], torch.eye(100) * 10)


def test_products_of_reduced_precision_make_no_inverse():
    matrix = semidefinite(1, 100, dtype=torch.float32)
    request = InverseRequest(matrix / matrix.norm(), 1.0)
    torch.set_float32_matmul_precision("medium")
    try:
        invert([request], Tuning(inverted_multiplications=0))
    finally:
        torch.set_float32_matmul_precision("highest")
    expected = torch.linalg.inv(request.matrices.double() + torch.eye(100, dtype=torch.float64))
    torch.testing.assert_close(request.inverse.double(), expected, rtol=0, atol=1e-6)


def test_a_matrix_that_is_not_definite_gets_ten_times_the_damping_until_it_is():
    indefinite, fine = torch.diag(torch.tensor([1.0, -0.5])).double()[None], semidefinite(1, 2)
    requests = [InverseRequest(indefinite, 0.1), InverseRequest(fine, 0.1)]
    invert(requests)
    assert [request.used_damping for request in requests] == [1.0, 0.1]
    torch.testing.assert_close(requests[0].inverse[0].diagonal(), torch.tensor([0.5, 2.0]).double())


@pytest.mark.parametrize("damping", [0.1, 0.2, 0.3])
def test_a_damping_that_single_precision_rounds_is_not_raised(monkeypatch, damping):
    """As on devices without float64."""
    monkeypatch.setattr(damped_cholesky, "factor_dtype", lambda matrix: matrix.dtype)
    request = InverseRequest(torch.zeros(1, 2, 2), damping)
    invert([request])
    assert request.used_damping == damping
    torch.testing.assert_close(invert_one(torch.zeros(2, 2), damping), torch.eye(2) / damping)


@pytest.mark.parametrize("entry", [-1e9, float("nan"), float("inf")])
def test_retries_are_bounded_and_other_matrices_are_inverted(monkeypatch, entry):
    tries = []
    factorised = damped_cholesky._factorise
    monkeypatch.setattr(damped_cholesky, "_factorise", lambda *a: tries.append(1) or factorised(*a))
    hopeless = torch.diag(torch.tensor([1.0, entry])).double()[None]
    requests = [InverseRequest(hopeless, 0.1), InverseRequest(semidefinite(1, 2), 0.1)]
    invert(requests)
    assert requests[0].inverse is None
    assert requests[1].inverse is not None
    assert len(tries) == 1 + DEFAULT.cholesky_tries


def make(solver="dense"):
    seed_cpu(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5)).double()
    return model, NGPlus(model, lr=0.1, damping=0.2, update_every=1, solver=solver)


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(6, 4, dtype=torch.float64)).square().mean(0).sum().backward()
    with recorded_warnings() as caught:
        optimizer.step()
    return sorted(caught)


def failing(monkeypatch, failures):
    """Factorisations of 4×4 matrices (the last layer's R) fail so many times."""
    left = [failures]
    factorised = damped_cholesky._factorise

    def sometimes(matrices, damping):
        factors, failed = factorised(matrices, damping)
        if matrices.shape[-1] == 4 and left[0] > 0:
            left[0] -= 1
            failed = torch.ones_like(failed)
        return factors, failed

    monkeypatch.setattr(damped_cholesky, "_factorise", sometimes)


def test_a_raised_damping_is_reported_and_used(monkeypatch):
    model, optimizer = make()
    failing(monkeypatch, 2)
    (message,) = step(model, optimizer)
    assert message.startswith("the damping of 2.weight was raised from 0.2 to 20 for this curvature step")
    assert optimizer.curvature["2.weight"].damping == pytest.approx(20)
    assert optimizer.curvature["0.weight"].damping == pytest.approx(0.2)
    assert step(model, optimizer) == []
    assert optimizer.curvature["2.weight"].damping == pytest.approx(0.2)


def test_a_layer_that_never_factorises_keeps_what_it_had_and_says_so(monkeypatch):
    model, optimizer = make()
    step(model, optimizer)
    before = optimizer.curvature
    failing(monkeypatch, 1 + DEFAULT.cholesky_tries)
    (message,) = step(model, optimizer)
    assert message.startswith("the curvature matrix of 2.weight would not factorise, even with its damping raised")
    assert optimizer.curvature["2.weight"] is before["2.weight"]
    assert optimizer.curvature["0.weight"] is not before["0.weight"]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_layer_that_never_factorised_goes_to_the_base(monkeypatch):
    model, optimizer = make()
    failing(monkeypatch, 10**6)
    (message,) = step(model, optimizer)
    assert "2.weight" in message
    assert list(optimizer.curvature) == ["0.weight"]
    assert all(parameter.isfinite().all() for parameter in model.parameters())
