"""OnlineNGPlus against a plain numpy loop; its projection against scipy and projected gradient descent."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from ngplus.online import OnlineNGPlus, default_epsilon, project_to_ball, regret_bound, secular_multiplier


def random_spd(rng, m, condition=100.0):
    Q, _ = np.linalg.qr(rng.normal(size=(m, m)))
    return (Q * np.geomspace(1.0, condition, m)) @ Q.T


def project(L, Y, radius, center=None):
    eigenvalues, eigenvectors = torch.linalg.eigh(torch.from_numpy(L))
    center = None if center is None else torch.from_numpy(center)
    return project_to_ball(torch.from_numpy(Y), eigenvalues, eigenvectors, radius, center).numpy()


def clip(X, radius):
    return X * min(1.0, radius / np.linalg.norm(X))


def projected_gradient(L, Y, radius, steps=20_000):
    """Minimise ½‖X − Y‖_L² on the ball by gradient steps and Frobenius clipping: no multiplier, no basis."""
    X, norm = clip(Y, radius), np.linalg.norm(L, 2)
    for _ in range(steps):
        X = clip(X - L @ (X - Y) / norm, radius)
    return X


def quadratic_gradients(rng, rounds, m, n):
    """A fixed sequence of affine maps Θ ↦ A_t Θ − B_t, the gradients of online least squares."""
    data = []
    for _ in range(rounds):
        X = rng.normal(size=(m, 2))
        data.append((X @ X.T, rng.normal(size=(m, n))))
    return data


def run(optimizer, weight, data):
    for A, B in data:
        theta = weight.detach().to(torch.float64)
        weight.grad = (torch.from_numpy(A) @ theta - torch.from_numpy(B)).to(weight.dtype)
        optimizer.step()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.floats(1e-3, 10.0), st.integers(0, 10**6))
def test_projection_satisfies_its_optimality_conditions(m, n, radius, seed):
    rng = np.random.default_rng(seed)
    L, Y, C = random_spd(rng, m), 3 * rng.normal(size=(m, n)), rng.normal(size=(m, n))
    X = project(L, Y, radius, C)
    if np.linalg.norm(Y - C) <= radius:
        np.testing.assert_array_equal(X, Y)
        return
    assert np.linalg.norm(X - C) == pytest.approx(radius, rel=1e-10)
    force, normal = L @ (Y - X), X - C
    mu = np.sum(force * normal) / np.sum(normal**2)
    assert mu > 0
    np.testing.assert_allclose(force, mu * normal, atol=1e-9 * np.linalg.norm(force))


def test_projection_equals_projected_gradient_descent():
    rng = np.random.default_rng(0)
    L, Y = random_spd(rng, 4, 20.0), 5 * rng.normal(size=(4, 3))
    np.testing.assert_allclose(project(L, Y, 1.3), projected_gradient(L, Y, 1.3), atol=1e-9)


def test_projection_equals_scipy():
    rng = np.random.default_rng(1)
    L, Y, radius = random_spd(rng, 3, 10.0), 4 * rng.normal(size=(3, 2)), 0.7
    found = minimize(
        lambda x: 0.5 * np.sum((x.reshape(3, 2) - Y) * (L @ (x.reshape(3, 2) - Y))),
        clip(Y, radius).ravel(),
        jac=lambda x: (L @ (x.reshape(3, 2) - Y)).ravel(),
        constraints={"type": "ineq", "fun": lambda x: radius**2 - x @ x, "jac": lambda x: -2 * x},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    np.testing.assert_allclose(project(L, Y, radius), found.x.reshape(3, 2), atol=1e-6)


def test_projection_is_not_the_frobenius_one_when_L_is_not_a_multiple_of_the_identity():
    rng = np.random.default_rng(2)
    L, Y = random_spd(rng, 4), 5 * rng.normal(size=(4, 3))
    assert np.linalg.norm(project(L, Y, 1.0) - clip(Y, 1.0)) > 0.1
    np.testing.assert_allclose(project(3.0 * np.eye(4), Y, 1.0), clip(Y, 1.0), atol=1e-12)


def test_multiplier_survives_a_condition_number_of_1e14():
    eigenvalues, weights = torch.logspace(-14, 0, 8).double(), torch.ones(8, dtype=torch.float64)
    mu = secular_multiplier(eigenvalues, weights, 1e-3)
    norm = (weights * (eigenvalues / (eigenvalues + mu)) ** 2).sum().sqrt().item()
    assert norm == pytest.approx(1e-3, rel=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_recursion_equals_a_plain_loop(dtype, tolerance):
    rng = np.random.default_rng(3)
    m, n, alpha, epsilon = 4, 3, 0.5, 0.8
    start, data = rng.normal(size=(m, n)), quadratic_gradients(rng, 30, m, n)
    weight = torch.nn.Parameter(torch.tensor(start, dtype=dtype))
    run(OnlineNGPlus([weight], alpha=alpha, epsilon=epsilon), weight, data)

    theta, L = start, epsilon * np.eye(m)
    for A, B in data:
        G = A @ theta - B
        L = L + G @ G.T
        theta = theta - np.linalg.solve(L, G) / alpha
    np.testing.assert_allclose(weight.detach().numpy(), theta, rtol=tolerance, atol=tolerance)


def test_projected_recursion_equals_a_loop_with_projected_gradient_descent():
    rng = np.random.default_rng(4)
    m, n, alpha, radius = 3, 2, 0.3, 0.5
    data = quadratic_gradients(rng, 8, m, n)
    weight = torch.nn.Parameter(torch.zeros(m, n, dtype=torch.float64))
    run(OnlineNGPlus([weight], alpha=alpha, radius=radius), weight, data)

    theta, L = np.zeros((m, n)), np.eye(m) / (alpha * 2 * radius) ** 2
    for A, B in data:
        G = A @ theta - B
        L = L + G @ G.T
        target = theta - np.linalg.solve(L, G) / alpha
        theta = target if np.linalg.norm(target) <= radius else projected_gradient(L, target, radius)
    np.testing.assert_allclose(weight.detach().numpy(), theta, atol=1e-8)


def test_every_iterate_stays_in_a_ball_around_its_start():
    rng = np.random.default_rng(5)
    start = torch.tensor(10 + rng.normal(size=(3, 4)))
    weight = torch.nn.Parameter(start.clone())
    optimizer = OnlineNGPlus([weight], alpha=0.1, radius=0.2, center="start")
    for step in quadratic_gradients(rng, 20, 3, 4):
        run(optimizer, weight, [step])
        assert (weight.detach() - start).norm().item() <= 0.2 * (1 + 1e-12)


def test_right_matrix_is_the_left_one_of_the_transpose():
    rng = np.random.default_rng(6)
    start = torch.tensor(rng.normal(size=(5, 2)))
    tall, wide = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.mT.clone())
    right = OnlineNGPlus([tall], alpha=0.4, radius=5.0, side="right")
    left = OnlineNGPlus([wide], alpha=0.4, radius=5.0)
    for _ in range(10):
        gradient = torch.tensor(rng.normal(size=(5, 2)))
        tall.grad, wide.grad = gradient, gradient.mT.clone()
        right.step()
        left.step()
    assert right.state[tall]["curvature"].shape == (2, 2)
    torch.testing.assert_close(tall.detach(), wide.detach().mT, rtol=1e-12, atol=1e-12)


def test_shapes_beyond_matrices_are_flattened_from_the_second_dimension():
    rng = np.random.default_rng(7)
    gradient = torch.tensor(rng.normal(size=(3, 2, 2)))
    tensor = torch.nn.Parameter(torch.zeros(3, 2, 2, dtype=torch.float64))
    matrix = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    vector = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    scalar = torch.nn.Parameter(torch.tensor(0.0))
    optimizer = OnlineNGPlus([tensor, matrix, vector, scalar], alpha=1.0, epsilon=1.0)
    tensor.grad, matrix.grad = gradient, gradient.reshape(3, 4)
    vector.grad, scalar.grad = torch.tensor([1.0, 0.0, 0.0]).double(), torch.tensor(2.0)
    optimizer.step()
    torch.testing.assert_close(tensor.detach().reshape(3, 4), matrix.detach())
    torch.testing.assert_close(vector.detach(), torch.tensor([-0.5, 0.0, 0.0]).double())
    assert scalar.item() == pytest.approx(-2 / 5)


def test_small_eigenvalues_are_never_lost_to_rounding():
    weight = torch.nn.Parameter(torch.zeros(2, 1, dtype=torch.float64))
    optimizer = OnlineNGPlus([weight], alpha=1.0, epsilon=1e-10)
    weight.grad = torch.tensor([[1e6], [1e6]]).double()
    optimizer.step()
    assert weight.abs().max().item() < 1e-3
    weight.grad = torch.tensor([[1e-12], [-1e-12]]).double()
    optimizer.step()
    assert weight.abs().max().item() < 0.1


def test_state_goes_through_a_file_and_continues_to_the_bit():
    rng = np.random.default_rng(8)
    data = quadratic_gradients(rng, 20, 4, 3)

    def fresh():
        weight = torch.nn.Parameter(torch.zeros(4, 3))
        return weight, OnlineNGPlus([weight], alpha=0.3, radius=2.0, center="start")

    weight, optimizer = fresh()
    run(optimizer, weight, data[:10])
    file = io.BytesIO()
    torch.save({"weight": weight.detach(), "optimizer": optimizer.state_dict()}, file)
    run(optimizer, weight, data[10:])

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, resumed = fresh()
    with torch.no_grad():
        other.copy_(saved["weight"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.state[other]["curvature"].dtype == torch.float64
    run(resumed, other, data[10:])
    assert torch.equal(weight, other)
    assert torch.equal(optimizer.state[weight]["curvature"], resumed.state[other]["curvature"])
    assert resumed.state[other]["step"] == 20


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
def test_nothing_moves_when_one_gradient_is_not_finite(bad):
    first = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    second = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    optimizer = OnlineNGPlus([first, second], alpha=1.0, epsilon=1.0)
    first.grad = torch.ones(2, 2, dtype=torch.float64)
    second.grad = torch.tensor([[1.0, bad], [0.0, 0.0]], dtype=torch.float64)
    optimizer.step()
    for parameter in (first, second):
        assert torch.equal(parameter.detach(), torch.ones(2, 2, dtype=torch.float64))
        assert torch.equal(optimizer.state[parameter]["curvature"], torch.eye(2, dtype=torch.float64))
    optimizer.param_groups[0]["nonfinite"] = "raise"
    with pytest.raises(FloatingPointError, match=r"shape \(2, 2\) is not finite"):
        optimizer.step()


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = OnlineNGPlus([weight], alpha=1.0, epsilon=1.0)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert weight.max().item() < 1.0


def test_a_sparse_gradient_gives_the_same_step_as_the_dense_one():
    dense, sparse = (torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64)) for _ in range(2))
    optimizer = OnlineNGPlus([dense, sparse], alpha=1.0, epsilon=1.0)
    dense.grad = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]]).double()
    sparse.grad = dense.grad.to_sparse()
    optimizer.step()
    assert torch.equal(dense, sparse)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.0, "epsilon": 1.0}, "alpha must be positive and finite, got 0.0"),
        ({"alpha": math.nan, "epsilon": 1.0}, "alpha must be positive and finite, got nan"),
        ({"alpha": 1.0, "epsilon": -1.0}, "epsilon must be positive and finite or None, got -1.0"),
        ({"alpha": 1.0, "radius": math.inf}, "radius must be positive and finite or None, got inf"),
        ({"alpha": 1.0}, "give one of them"),
        (
            {"alpha": 1.0, "epsilon": 1.0, "side": "top"},
            r"side must be one of \('left', 'right'\), got 'top'",
        ),
        ({"alpha": 1.0, "epsilon": 1.0, "center": 0}, "center must be one of"),
        ({"alpha": 1.0, "epsilon": 1.0, "nonfinite": "zero"}, "nonfinite must be one of"),
        ({"alpha": 1.0, "radius": 0.5}, r"starts at norm 2, outside the ball of radius 0\.5"),
    ],
)
def test_a_wrong_argument_is_named_with_its_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        OnlineNGPlus([torch.nn.Parameter(torch.ones(2, 2))], **arguments)


def test_a_refused_group_is_not_left_behind():
    optimizer = OnlineNGPlus([torch.nn.Parameter(torch.zeros(2))], alpha=1.0, epsilon=1.0)
    with pytest.raises(ValueError, match="radius"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], "radius": -1.0})
    assert len(optimizer.param_groups) == 1


def test_epsilon_and_bound_follow_from_the_diameter():
    assert default_epsilon(0.5, 2.0) == pytest.approx(1 / (0.5**2 * 4.0**2))
    optimizer = OnlineNGPlus([torch.nn.Parameter(torch.zeros(2))], alpha=0.5, radius=2.0)
    assert optimizer.param_groups[0]["epsilon"] == default_epsilon(0.5, 2.0)
    expected = (3 * math.log(1 + 0.5**2 * 2.0**2 * 4.0**2 * 50) + 1) / (2 * 0.5)
    assert regret_bound(0.5, 3, 2.0, 4.0, 50) == pytest.approx(expected)


def test_complex_parameters_and_arguments_that_are_no_numbers_are_refused():
    with pytest.raises(TypeError, match=r"shape \(2,\) is complex"):
        OnlineNGPlus([torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))], alpha=1.0, epsilon=1.0)
    with pytest.raises(TypeError, match="alpha must be positive and finite, got 'a'"):
        OnlineNGPlus([torch.nn.Parameter(torch.zeros(2))], alpha="a", epsilon=1.0)


def test_a_parameter_without_entries_is_left_alone():
    empty, other = torch.nn.Parameter(torch.zeros(0, 3)), torch.nn.Parameter(torch.zeros(2))
    optimizer = OnlineNGPlus([empty, other], alpha=1.0, epsilon=1.0, radius=1.0)
    (empty.sum() + (other - 1).square().sum()).backward()
    optimizer.step()
    assert other.detach().abs().min() > 0
