"""How well the Kronecker forms of NG+, K-FAC and Shampoo stand for the empirical Fisher matrix of a layer.

Nothing here forms the mn×mn matrix: norms, inner products and the exact damped direction come from N×N Gram
matrices of the samples' gradients, so that a layer may have any size.

Of N samples the EFIM has rank N, and in Frobenius norm nothing of full rank is near it, were it right for the
expectation: for independent Gaussian entries ‖EFIM‖² is 1 + mn/N times that of its expectation. So errors are
measured twice: against the EFIM of the samples, and, without bias, against its expectation, with a second
set of samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# λ as a share of the EFIM's largest eigenvalue, at which directions are compared.
DAMPINGS = (0.01, 0.1, 1.0)
PRINTED, LEFT, RIGHT = "NG+ (10) as printed", "NG+ left, I ⊗ L/n", "NG+ right, R/m ⊗ I"
PLAIN = "gradient (no curvature)"


@dataclass(frozen=True, kw_only=True)
class LayerSamples:
    """Gradients of N samples of one layer, and the sums of their factors (8): 𝒢_i = Σ_t g aᵀ over κ positions.

    Attributes:
        name: of the layer.
        gradients: 𝒢_i, (N, m, n), float64; a bias is one column.
        outputs: (1/N) Σ_i Σ_t g gᵀ, (m, m).
        inputs: (1/N) Σ_i Σ_t a aᵀ, (n, n).
        kappa: positions a sample, on average.
    """

    name: str
    gradients: Tensor
    outputs: Tensor
    inputs: Tensor
    kappa: float

    @classmethod
    def of_factors(cls, name: str, g: Tensor, a: Tensor) -> "LayerSamples":
        """From factors of one κ for all samples: (N, κ, m) and (N, κ, n)."""
        return cls(
            name=name,
            gradients=torch.einsum("bkm,bkn->bmn", g, a),
            outputs=torch.einsum("bki,bkj->ij", g, g) / len(g),
            inputs=torch.einsum("bki,bkj->ij", a, a) / len(a),
            kappa=g.shape[1],
        )


class Kronecker(NamedTuple):
    """right ⊗ left, which acts on vec(G) as left · G · right."""

    left: Tensor  # (m, m)
    right: Tensor  # (n, n)

    def squared_norm(self) -> float:
        """‖right ⊗ left‖_F²."""
        return float(self.left.square().sum() * self.right.square().sum())

    def inner(self, gradients: Tensor) -> float:
        """⟨EFIM, right ⊗ left⟩ = (1/N) Σ tr(G_iᵀ left G_i right)."""
        first = gradients if is_identity(self.left) else self.left @ gradients
        second = gradients if is_identity(self.right) else gradients @ self.right
        return float((first * second).sum() / len(gradients))

    def directions(self, G: Tensor, dampings: Sequence[float]) -> list[Tensor]:
        """(λI + right ⊗ left)⁻¹ vec(G) as a matrix for each λ, in the factors' eigenbases."""
        values, Q = torch.linalg.eigh(self.left)
        others, P = torch.linalg.eigh(self.right)
        spectrum = values.clamp(min=0)[:, None] * others.clamp(min=0)[None, :]
        rotated = Q.mT @ G @ P
        return [Q @ (rotated / (spectrum + damping)) @ P.mT for damping in dampings]


def is_identity(matrix: Tensor) -> bool:
    """Whether a product with it can be left out."""
    return torch.equal(matrix, torch.eye(len(matrix), dtype=matrix.dtype))


def matrix_power(matrix: Tensor, power: float) -> Tensor:
    """A power of a positive semidefinite matrix."""
    values, Q = torch.linalg.eigh(matrix)
    return (Q * values.clamp(min=0) ** power) @ Q.mT


def kronecker_forms(samples: LayerSamples) -> dict[str, Kronecker]:
    """Each method's Kronecker form of the EFIM.

    NG+ is I ⊗ L/n or R/m ⊗ I; printed, (10), it is I ⊗ L. K-FAC for κ > 1 takes positions as independent,
    (Σ_t a aᵀ) ⊗ (Σ_t g gᵀ)/κ. Shampoo's L̂^{-1/4} G R̂^{-1/4} is the inverse root of R^{1/2} ⊗ L^{1/2}.
    """
    gradients = samples.gradients
    N, m, n = gradients.shape
    L = torch.einsum("bmn,bpn->mp", gradients, gradients) / N
    R = torch.einsum("bmn,bmp->np", gradients, gradients) / N
    eye_m, eye_n = (torch.eye(size, dtype=L.dtype) for size in (m, n))
    return {
        PRINTED: Kronecker(L, eye_n),
        LEFT: Kronecker(L / n, eye_n),
        RIGHT: Kronecker(eye_m, R / m),
        "K-FAC": Kronecker(samples.outputs / samples.kappa, samples.inputs),
        "Shampoo": Kronecker(matrix_power(L, 0.5), matrix_power(R, 0.5)),
    }


def natural_direction(gradients: Tensor, G: Tensor, damping: float) -> Tensor:
    """(λI + EFIM)⁻¹ vec(G), exactly, through the N×N Gram matrix: (vec(G) − Vᵀ(NλI + VVᵀ)⁻¹V vec(G))/λ."""
    V = gradients.flatten(1)  # (N, mn)
    gram = V @ V.mT + len(V) * damping * torch.eye(len(V), dtype=V.dtype)
    return (G - (V.mT @ torch.linalg.solve(gram, V @ G.flatten())).view_as(G)) / damping


def cosine(first: Tensor, second: Tensor) -> float:
    """The cosine of the angle between two matrices."""
    return float((first * second).sum() / (first.norm() * second.norm()))


def compare(samples: LayerSamples, others: Tensor, dampings: Sequence[float] = DAMPINGS) -> list[dict[str, Any]]:
    """One row a method: relative Frobenius errors and the directions' cosines with the exact one.

    `error` is ‖F − K‖/‖F‖, F being the expectation of the EFIM and K the form that is made of `samples`;
    `error_best_scale` the same for the best multiple of K, √(1 − cos²). `sampled_error…` have the samples' EFIM in
    place of F. `cosine_λ` compares (λI + K)⁻¹G with (λI + EFIM)⁻¹G, λ being that share of the EFIM's largest
    eigenvalue and G the mean of the others' gradients.

    Args:
        samples: N samples of a layer.
        others: gradients of other samples of the same layer, (N', m, n).
        dampings: the shares.

    Returns:
        Rows of a table.
    """
    gradients, G = samples.gradients, others.mean(dim=0)
    V, W = gradients.flatten(1), others.flatten(1)
    gram = V @ V.mT / len(V)
    largest = float(torch.linalg.eigvalsh(gram)[-1])
    expected = float((V @ W.mT).square().sum()) / (len(V) * len(W))  # E⟨EFIM, EFIM'⟩ = ‖F‖² of independent samples
    scaled = [share * largest for share in dampings]
    exact = [natural_direction(gradients, G, damping) for damping in scaled]
    rows = []
    for method, form in (kronecker_forms(samples) | {PLAIN: None}).items():
        row: dict[str, Any] = {"layer": samples.name, "method": method, **_sizes(samples)}
        if form:
            row |= _errors(form, others, expected)
            row |= {f"sampled_{key}": x for key, x in _errors(form, gradients, float(gram.square().sum())).items()}
        ours = form.directions(G, scaled) if form else [G] * len(scaled)
        row |= {f"cosine_{share:g}": cosine(*pair) for share, *pair in zip(dampings, ours, exact, strict=True)}
        rows.append(row)
    return rows


def _sizes(samples: LayerSamples) -> Mapping[str, int | float]:
    N, m, n = samples.gradients.shape
    return {"m": m, "n": n, "kappa": round(samples.kappa, 1), "samples": N}


def _errors(form: Kronecker, gradients: Tensor, squared: float) -> dict[str, float]:
    """Relative Frobenius errors, from ‖F‖² = `squared`, ⟨F, K⟩ of these gradients, and ‖K‖²."""
    inner, norm = form.inner(gradients), form.squared_norm()
    return {
        "error": max(0.0, 1 + (norm - 2 * inner) / squared) ** 0.5,
        "error_best_scale": max(0.0, 1 - inner**2 / (squared * norm)) ** 0.5,
    }
