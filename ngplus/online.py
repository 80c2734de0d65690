"""The online variant of NG+, equation (19), whose regret grows like log T.

The printed (19) accumulates ∇ψᵀ∇ψ, which is n×n and cannot stand to the left of an m×n gradient; its proof
uses ∇ψ∇ψᵀ, and so does this module. The projection is the one the proof needs too: nearest in the norm of
L_t, not in the Frobenius norm.
"""

import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, Literal, NamedTuple, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

Side = Literal["left", "right"]
Center = Literal["origin", "start"]
Nonfinite = Literal["skip", "raise"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "side": ("left", "right"),
    "center": ("origin", "start"),
    "nonfinite": ("skip", "raise"),
}
_NEWTON_STEPS = 100
_NEWTON_TOLERANCE = 1e-14


class _Proposal(NamedTuple):
    """What one step would write: the new matrix (side's orientation, float64) and the new L_t."""

    parameter: Tensor
    value: Tensor
    curvature: Tensor


def default_epsilon(alpha: float, radius: float) -> float:
    """ε = 1/(α² 𝒟²) with 𝒟 = 2·radius, the diameter of the ball.

    With it Theorem 5 reads R_T ≤ (1/2α) [m log(1 + α² 𝓛² 𝒟² T) + 1]; the printed ε = 2/(α𝒟²) gives a claim
    that can be negative.
    """
    return 1.0 / (alpha * 2.0 * radius) ** 2


def regret_bound(alpha: float, rows: int, gradient_bound: float, diameter: float, rounds: int) -> float:
    """Theorem 5 with its constants put right: (1/2α) [m log(1 + α² 𝓛² 𝒟² T) + 1].

    Args:
        alpha: α of Assumption 4.
        rows: m, the size of L_t (the printed bound has n here).
        gradient_bound: 𝓛, a bound on the Frobenius norm of every gradient.
        diameter: 𝒟, the diameter of the feasible set.
        rounds: T.

    Returns:
        The bound on R_T.

    Example:
        >>> round(regret_bound(alpha=0.25, rows=3, gradient_bound=1.0, diameter=2.0, rounds=100), 3)
        21.549
    """
    growth = math.log1p((alpha * gradient_bound * diameter) ** 2 * rounds)
    return (rows * growth + 1.0) / (2.0 * alpha)


def secular_multiplier(eigenvalues: Tensor, weights: Tensor, radius: float) -> float:
    """The μ ≥ 0 with Σᵢ wᵢ (λᵢ/(λᵢ+μ))² = radius².

    Newton's method on 1/‖s(μ)‖ = 1/radius, whose left side is concave and increasing, started at the lower
    bound λ_min (‖Z‖/radius − 1): the iterates rise to the root without passing it.

    Args:
        eigenvalues: λ, positive, shape (m,).
        weights: squared norms of the rows in the eigenbasis, shape (m,).
        radius: of the ball, positive.

    Returns:
        μ, 0 where the sum is no more than radius² already.
    """
    length = math.sqrt(weights.sum().item())
    if length <= radius:
        return 0.0
    excess = length / radius - 1.0
    mu, upper = eigenvalues.min().item() * excess, eigenvalues.max().item() * excess
    for _ in range(_NEWTON_STEPS):
        shrunk = weights * (eigenvalues / (eigenvalues + mu)).square()
        norm = math.sqrt(shrunk.sum().item())
        slope = (shrunk / (eigenvalues + mu)).sum().item()
        step = (norm / radius - 1.0) * norm**2 / slope
        mu = min(max(mu + step, 0.0), upper)
        if abs(step) <= _NEWTON_TOLERANCE * mu:
            break
    return mu


def project_to_ball(
    target: Tensor, eigenvalues: Tensor, eigenvectors: Tensor, radius: float, center: Tensor | None = None
) -> Tensor:
    """Π(Y) = argmin {‖X − Y‖_L : ‖X − C‖_F ≤ radius}, ‖A‖_L² = tr(Aᵀ L A).

    With L = Q Λ Qᵀ and a multiplier μ, X = C + Q Λ(Λ + μI)⁻¹ Qᵀ (Y − C).

    Args:
        target: Y, shape (m, n), float64.
        eigenvalues: of L, positive, shape (m,).
        eigenvectors: Q, shape (m, m).
        radius: of the ball.
        center: C, shape (m, n); None is the origin.

    Returns:
        X, shape (m, n).
    """
    offset = target if center is None else target - center
    rotated = eigenvectors.mT @ offset  # (m, m) x (m, n) -> (m, n)
    mu = secular_multiplier(eigenvalues, rotated.square().sum(dim=1), radius)
    if mu == 0.0:
        return target
    projected: Tensor = eigenvectors @ ((eigenvalues / (eigenvalues + mu)).unsqueeze(1) * rotated)
    return projected if center is None else center + projected


def online_step(
    theta: Tensor,
    gradient: Tensor,
    curvature: Tensor,
    *,
    alpha: float,
    epsilon: float,
    radius: float | None = None,
    center: Tensor | None = None,
) -> Tensor:
    """Θ_{t+1} = Π_𝒦(Θ_t − (1/α) L_t⁻¹ G_t), equation (19) with a left matrix.

    Args:
        theta: Θ_t, shape (m, n), float64.
        gradient: G_t, shape (m, n), float64.
        curvature: L_t = εI + Σ_{s≤t} G_s G_sᵀ, shape (m, m), float64.
        alpha: α of Assumption 4; 1/α is the step size.
        epsilon: ε; no eigenvalue of L_t is smaller.
        radius: of 𝒦; None is no projection.
        center: of 𝒦, shape (m, n); None is the origin.

    Returns:
        Θ_{t+1}, shape (m, n).
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(curvature)
    # Rounding can push a small eigenvalue of an ill-conditioned L_t below ε, even below zero.
    eigenvalues = eigenvalues.clamp(min=epsilon)
    direction = eigenvectors @ ((eigenvectors.mT @ gradient) / eigenvalues.unsqueeze(1))
    target: Tensor = theta - direction / alpha
    if radius is None:
        return target
    return project_to_ball(target, eigenvalues, eigenvectors, radius, center)


class OnlineNGPlus(Optimizer):
    """NG+ for online convex optimization: (19) with the regret of Theorem 5.

    L_t = L_{t−1} + G_t G_tᵀ, L₀ = εI, Θ_{t+1} = Π_𝒦(Θ_t − (1/α) L_t⁻¹ G_t), one L_t a parameter, in float64
    whatever the parameter's dtype. A parameter of shape (m, …) is an m×n matrix, a vector is m×1 (for which
    this is the online Newton step of Hazan, Agarwal and Kale, 2007).

    ``side="right"`` keeps R_t = R_{t−1} + G_tᵀ G_t (n×n) instead and moves by −(1/α) G_t R_t⁻¹: smaller when
    m > n, but it is never chosen by shape, because Theorem 5 then needs Assumption 4 with ∇ψᵀ∇ψ, which for
    a vector is strong convexity rather than exp-concavity.

    Args:
        params: parameters or parameter groups; with several, 𝒦 is the product of their balls.
        alpha: α of Assumption 4 (the step is 1/α).
        epsilon: ε > 0; None takes `default_epsilon`, for which a radius is needed.
        radius: of the Frobenius ball 𝒦 = {‖Θ − C‖_F ≤ radius}; None is no projection.
        center: C, ``"origin"`` or ``"start"`` (the parameter's value when it was added).
        side: ``"left"`` or ``"right"``.
        nonfinite: a NaN or Inf in any gradient or update leaves every parameter and L_t as they were and
            is passed over (``"skip"``) or raised as FloatingPointError (``"raise"``).

    Raises:
        TypeError: an argument that is no number, or a complex parameter.
        ValueError: an argument out of range, or a parameter that starts outside the ball.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
        >>> optimizer = OnlineNGPlus([weight], alpha=0.25, radius=1.0)
        >>> (0.5 * (weight - 1).square().sum()).backward()
        >>> _ = optimizer.step()
        >>> weight.norm().item() <= 1.0
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        alpha: float,
        epsilon: float | None = None,
        radius: float | None = None,
        *,
        center: Center = "origin",
        side: Side = "left",
        nonfinite: Nonfinite = "skip",
    ) -> None:
        defaults = {
            "alpha": alpha,
            "epsilon": epsilon,
            "radius": radius,
            "center": center,
            "side": side,
            "nonfinite": nonfinite,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, fill in its ε and set L₀ = εI for its parameters."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _validate(group)
            if group["epsilon"] is None:
                group["epsilon"] = default_epsilon(group["alpha"], group["radius"])
            for parameter in group["params"]:
                self.state[parameter] = _initial_state(parameter, group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; L_t and C stay in float64, which torch would cast to the parameter's dtype."""
        super().load_state_dict(state_dict)
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.to(parameter.device, copy=True)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one round t of (19).

        Args:
            closure: evaluates the model again and returns the loss, as in `torch.optim`.

        Returns:
            The closure's loss, or None.

        Raises:
            FloatingPointError: a gradient or an update is not finite and ``nonfinite="raise"``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        proposals = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or not parameter.numel():
                    continue
                proposal = _propose(parameter, group, self.state[parameter])
                if proposal is None:
                    _refuse(parameter, group["nonfinite"])
                    return loss
                proposals.append(proposal)
        for parameter, value, curvature in proposals:
            parameter.copy_(value)
            self.state[parameter]["curvature"] = curvature
            self.state[parameter]["step"] += 1
        return loss


def _validate(group: dict[str, Any]) -> None:
    """Raise for the first argument that is out of range (ValueError) or no number (TypeError)."""
    for name, optional in (("alpha", False), ("epsilon", True), ("radius", True)):
        value = group[name]
        if value is None and optional:
            continue
        message = f"{name} must be positive and finite{' or None' if optional else ''}, got {value!r}"
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(message)
        if not 0 < float(value) < math.inf:
            raise ValueError(message)
    for name, allowed in _CHOICES.items():
        if group[name] not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {group[name]!r}")
    if group["epsilon"] is None and group["radius"] is None:
        raise ValueError("epsilon=None takes 1/(α² (2 radius)²), but radius=None too: give one of them, both > 0")


def _matrix(tensor: Tensor, side: Side) -> Tensor:
    """A parameter or gradient as a float64 matrix whose rows L_t acts on: (m, n), or (n, m) for the right."""
    matrix = tensor.detach().to(torch.float64)
    matrix = matrix.flatten(1) if matrix.ndim > 1 else matrix.reshape(-1, 1)
    return matrix if side == "left" else matrix.mT


def _initial_state(parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """Round 0: L₀ = εI and, if it is not the origin, the ball's centre."""
    if parameter.is_complex():
        raise TypeError(f"a parameter of shape {tuple(parameter.shape)} is complex: (19) is for real parameters")
    theta = _matrix(parameter, group["side"])
    state: dict[str, Any] = {
        "step": 0,
        "curvature": group["epsilon"] * torch.eye(theta.shape[0], dtype=torch.float64, device=theta.device),
    }
    if group["center"] == "start":
        state["center"] = theta.clone()
    elif group["radius"] is not None and theta.norm().item() > group["radius"] * (1 + 1e-6):
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} starts at norm {theta.norm().item():.6g}, "
            f"outside the ball of radius {group['radius']!r}: start inside it, or pass center='start'"
        )
    return state


def _propose(parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> _Proposal | None:
    """The step one parameter would take, or None where a number is not finite.

    Reading finiteness costs a host sync; the eigendecomposition that follows has one anyway.
    """
    grad = cast(Tensor, parameter.grad)
    gradient = _matrix(grad.to_dense() if grad.is_sparse else grad, group["side"])
    curvature = state["curvature"] + gradient @ gradient.mT
    if not torch.isfinite(curvature).all():
        return None
    value = online_step(
        _matrix(parameter, group["side"]),
        gradient,
        curvature,
        alpha=group["alpha"],
        epsilon=group["epsilon"],
        radius=group["radius"],
        center=state.get("center"),
    )
    value = (value if group["side"] == "left" else value.mT).reshape(parameter.shape).to(parameter.dtype)
    return _Proposal(parameter, value, curvature) if torch.isfinite(value).all() else None


def _refuse(parameter: Tensor, nonfinite: Nonfinite) -> None:
    """Say that a step was not taken, if the caller asked to hear it."""
    if nonfinite == "raise":
        raise FloatingPointError(
            f"the gradient or the update of a parameter of shape {tuple(parameter.shape)} is not finite; "
            "no parameter was changed"
        )
