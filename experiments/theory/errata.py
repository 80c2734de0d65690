"""The paper's formulas that do not hold as printed, each compared with its corrected form and an oracle.

Every function draws a small random instance in float64, computes the printed and the corrected form, and
measures both against a dense computation that uses neither. The theorems' errata live with the theorems
(`convergence`, `regret`); `all_errata` collects everything. Derivations: docs/errata.md.
"""

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from experiments.records.claim_checks import Erratum

Array = NDArray[np.float64]
Check = Callable[[np.random.Generator], Erratum]


def relative_error(value: Array, truth: Array) -> float:
    """‖value − truth‖_F / ‖truth‖_F."""
    return float(np.linalg.norm(value - truth) / np.linalg.norm(truth))


def vec(matrix: Array) -> Array:
    """Columns stacked, the paper's vec."""
    return matrix.reshape(-1, order="F")


def left_gfim(gradients: Array) -> Array:
    """L = (1/N) Σ G_i G_iᵀ, (4): (N, m, n) -> (m, m)."""
    return np.einsum("imn,ipn->mp", gradients, gradients) / len(gradients)


def empirical_fisher(gradients: Array) -> Array:
    """EFIM = (1/N) Σ vec(G_i) vec(G_i)ᵀ: (N, m, n) -> (mn, mn)."""
    columns = np.stack([vec(gradient) for gradient in gradients])
    return columns.T @ columns / len(gradients)


def damped_solve(L: Array, G: Array, damping: float) -> Array:
    """(λI + L)⁻¹ G, (6), up to its sign."""
    return np.linalg.solve(damping * np.eye(len(L)) + L, G)


def best_identity_kronecker(matrix: Array, m: int, n: int) -> Array:
    """argmin_X ‖matrix − I_n ⊗ X‖_F over m×m matrices, by least squares over the m² entries."""
    units = np.eye(m * m).reshape(m * m, m, m)
    design = np.stack([np.kron(np.eye(n), unit).ravel() for unit in units], axis=1)
    return np.linalg.lstsq(design, matrix.ravel(), rcond=None)[0].reshape(m, m)


def woodbury(rng: np.random.Generator) -> Erratum:
    """(14): the 1/λ stands before the whole bracket; as printed it holds at λ = 1 only."""
    damping, U = 0.3, rng.normal(size=(12, 5))
    core = U @ np.linalg.solve(damping * np.eye(5) + U.T @ U, U.T)
    truth = np.linalg.inv(damping * np.eye(12) + U @ U.T)
    return Erratum(
        place="(14)",
        measure="relative error of the inverse at λ = 0.3",
        printed=relative_error(np.eye(12) / damping - core, truth),
        corrected=relative_error((np.eye(12) - core) / damping, truth),
        margin=0.1,
    )


def damping_in_woodbury(rng: np.random.Generator) -> Erratum:
    """(14) into (6): the L_k of (14) holds λI already, so (6) must not add it once more."""
    damping, U, G = 0.3, rng.normal(size=(12, 5)), rng.normal(size=(12, 7))
    L_of_14 = damping * np.eye(12) + U @ U.T
    truth = np.linalg.solve(L_of_14, G)
    core = U @ np.linalg.solve(damping * np.eye(5) + U.T @ U, U.T @ G)
    return Erratum(
        place="(14) in (6)",
        measure="relative error of the direction",
        printed=relative_error(damped_solve(L_of_14, G, damping), truth),
        corrected=relative_error((G - core) / damping, truth),
        margin=0.1,
    )


def ridge(U: Array, G: Array, damping: float) -> Array:
    """The minimiser of (15): D* = (λI + UᵀU)⁻¹ UᵀG, of shape (b, n)."""
    return np.linalg.solve(damping * np.eye(U.shape[1]) + U.T @ U, U.T @ G)


def least_squares(rng: np.random.Generator) -> Erratum:
    """(15): its minimiser is not the direction; (G − U D*)/λ is. b = m, or the printed shapes do not fit."""
    damping, U, G = 0.3, rng.normal(size=(8, 8)), rng.normal(size=(8, 6))
    truth = damped_solve(U @ U.T, G, damping)
    minimiser = ridge(U, G, damping)
    return Erratum(
        place="(15)",
        measure="relative error of the direction",
        printed=relative_error(minimiser, truth),
        corrected=relative_error((G - U @ minimiser) / damping, truth),
        margin=0.1,
    )


def same_batch_direction(g: Array, a: Array, damping: float) -> Array:
    """U(λI + UᵀU)⁻¹G̃ for κ = 1 and G from the same batch: G = U G̃, rows of G̃ being aᵢᵀ/(√b ‖aᵢ‖).

    Args:
        g: output gradients, (b, m).
        a: inputs, (b, n).
        damping: λ.

    Returns:
        The direction, (m, n).
    """
    norms = np.linalg.norm(a, axis=1, keepdims=True)
    U, G_tilde = (g * norms).T / np.sqrt(len(g)), a / (norms * np.sqrt(len(g)))
    return U @ np.linalg.solve(damping * np.eye(len(g)) + U.T @ U, G_tilde)


def same_batch(rng: np.random.Generator) -> Erratum:
    """(15) when G_k comes from the batch of L_k: no m×n right side is needed, and the result is exact."""
    damping, g, a = 0.3, rng.normal(size=(6, 6)), rng.normal(size=(6, 9))
    gradients = g[:, :, None] * a[:, None, :]  # (b, m) x (b, n) -> (b, m, n)
    truth = damped_solve(left_gfim(gradients), gradients.mean(axis=0), damping)
    U = (g * np.linalg.norm(a, axis=1, keepdims=True)).T / np.sqrt(6)
    return Erratum(
        place="(15), same batch",
        measure="relative error of the direction",
        printed=relative_error(ridge(U, gradients.mean(axis=0), damping), truth),
        corrected=relative_error(same_batch_direction(g, a, damping), truth),
        margin=0.1,
    )


def sketched_minimiser(U: Array, G: Array, damping: float, sketch: Array) -> Array:
    """The minimiser of (16): `ridge` of ΩU and ΩG, of shape (b, n)."""
    return ridge(sketch @ U, sketch @ G, damping)


def sketched_least_squares(rng: np.random.Generator) -> Erratum:
    """(16): the same last step is missing. Ω is a rotation here, for which a sketch loses nothing."""
    damping, U, G = 0.3, rng.normal(size=(8, 8)), rng.normal(size=(8, 6))
    sketch = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    truth, minimiser = damped_solve(U @ U.T, G, damping), sketched_minimiser(U, G, damping, sketch)
    return Erratum(
        place="(16)",
        measure="relative error of the direction, Ω orthogonal",
        printed=relative_error(minimiser, truth),
        corrected=relative_error((G - U @ minimiser) / damping, truth),
        margin=0.1,
    )


def row_sampling_error(
    rng: np.random.Generator, q: int, m: int = 128, b: int = 32, n: int = 64, draws: int = 50
) -> float:
    """Median relative error of (16)'s direction under uniform row sampling with replacement, λ = ‖UᵀU‖/10.

    Args:
        rng: of the problem and the draws.
        q: rows drawn.
        m: rows of U.
        b: samples.
        n: columns of G = U G̃.
        draws: sketches the median is over.

    Returns:
        The median.
    """
    U = rng.normal(size=(m, b)) / np.sqrt(b)
    G = U @ rng.normal(size=(b, n))
    damping = 0.1 * np.linalg.norm(U, 2) ** 2
    truth = damped_solve(U @ U.T, G, damping)
    errors = []
    for _ in range(draws):
        sketch = np.sqrt(m / q) * np.eye(m)[rng.integers(m, size=q)]
        errors.append(relative_error((G - U @ sketched_minimiser(U, G, damping, sketch)) / damping, truth))
    return float(np.median(errors))


def column_sampling(rng: np.random.Generator) -> Erratum:
    """(17): Ω samples columns of G. Sampling rows, as the text says, would give GᵀG in expectation.

    The expectation over the n equally likely columns of Ω is summed exactly.
    """
    n = 6
    G = rng.normal(size=(n, n))
    outcomes = [np.sqrt(n) * np.eye(n)[:, [i]] for i in range(n)]  # q = 1: √(n/q) e_i
    rows = sum((omega.T @ G).T @ (omega.T @ G) for omega in outcomes) / n
    columns = sum((G @ omega) @ (G @ omega).T for omega in outcomes) / n
    return Erratum(
        place="(17)",
        measure="relative error of the expected product against G Gᵀ",
        printed=relative_error(rows, G @ G.T),
        corrected=relative_error(columns, G @ G.T),
        margin=0.1,
    )


def missing_factor(rng: np.random.Generator) -> Erratum:
    """(9), (10): the best I ⊗ X is X = L/n, the mean of the EFIM's diagonal blocks; printed is X = L."""
    m, n = 3, 4
    gradients = rng.normal(size=(20, m, 1)) * rng.normal(size=(20, 1, n))
    best = best_identity_kronecker(empirical_fisher(gradients), m, n)
    L = left_gfim(gradients)
    return Erratum(
        place="(9), (10)",
        measure="relative distance from the best X in EFIM ≈ I ⊗ X",
        printed=relative_error(L, best),
        corrected=relative_error(L / n, best),
        margin=0.5,
    )


def momentum_matrix(rng: np.random.Generator) -> Erratum:
    """(11): L̄_k = βL̄_{k−1} + (1−β)L_k; printed is βL_{k−1} + (1−β)L_k, which remembers two matrices only."""
    beta = 0.8
    matrices = [left_gfim(rng.normal(size=(4, 3, 5))) for _ in range(6)]
    weights = [beta**5] + [(1 - beta) * beta ** (5 - k) for k in range(1, 6)]
    truth = sum(weight * L for weight, L in zip(weights, matrices, strict=True))
    averaged = matrices[0]
    for L in matrices[1:]:
        averaged = beta * averaged + (1 - beta) * L
    return Erratum(
        place="(11)",
        measure="relative error against the weighted sum written out",
        printed=relative_error(beta * matrices[-2] + (1 - beta) * matrices[-1], truth),
        corrected=relative_error(averaged, truth),
        margin=0.05,
    )


def damped_twice(rng: np.random.Generator) -> Erratum:
    """(12) into (6): L̃₀ = λ₀I leaves β^k λ₀ on the diagonal besides the λ of (6); start at 0 instead."""
    beta, damping, steps = 0.95, 0.3, 4
    gradients = rng.normal(size=(steps, 6, 8)) / 8
    G = gradients[-1]
    history = sum((1 - beta) * beta ** (steps - 1 - k) * g @ g.T for k, g in enumerate(gradients))
    printed, corrected = damping * np.eye(6), np.zeros((6, 6))
    for gradient in gradients:
        printed = beta * printed + (1 - beta) * gradient @ gradient.T
        corrected = beta * corrected + (1 - beta) * gradient @ gradient.T
    truth = np.linalg.inv(damping * np.eye(6) + history) @ G
    return Erratum(
        place="(12) in (6)",
        measure="relative error of the direction after four steps",
        printed=relative_error(damped_solve(printed, G, damping), truth),
        corrected=relative_error(damped_solve(corrected, G, damping), truth),
        margin=0.2,
    )


def mini_batch_expectation(rng: np.random.Generator) -> Erratum:
    """(12) is not (4): E[G_B G_Bᵀ] = ḡḡᵀ + (L − ḡḡᵀ)/b. All N^b batches are enumerated."""
    N, b = 5, 2
    gradients = rng.normal(size=(N, 3, 4))
    batches = [gradients[list(batch)].mean(axis=0) for batch in itertools.product(range(N), repeat=b)]
    truth = sum(G @ G.T for G in batches) / len(batches)
    L, mean = left_gfim(gradients), gradients.mean(axis=0)
    return Erratum(
        place="(12) for (4)",
        measure="relative error of E[G_B G_Bᵀ], b = 2",
        printed=relative_error(L, truth),
        corrected=relative_error(mean @ mean.T + (L - mean @ mean.T) / b, truth),
        margin=0.1,
    )


def kfac_order(rng: np.random.Generator) -> Erratum:
    """(13): K-FAC's direction is G̃⁻¹ G Ã⁻¹; printed is Ã⁻¹ G G̃⁻¹, whose shapes fit only if m = n."""
    m = 5
    g, a, G = rng.normal(size=(9, m)), rng.normal(size=(9, m)), rng.normal(size=(m, m))
    G_factor, A_factor = 0.5 * np.eye(m) + g.T @ g / 9, 0.5 * np.eye(m) + a.T @ a / 9
    truth = np.linalg.solve(np.kron(A_factor, G_factor), vec(G)).reshape(m, m, order="F")
    inverse = np.linalg.inv
    return Erratum(
        place="(13)",
        measure="relative error against (Ã ⊗ G̃)⁻¹ vec(G)",
        printed=relative_error(inverse(A_factor) @ G @ inverse(G_factor), truth),
        corrected=relative_error(inverse(G_factor) @ G @ inverse(A_factor), truth),
        margin=0.1,
    )


def cosine_rate(epoch: Array, max_epoch: float, start: float, power: float) -> Array:
    """0.001 + ½(α₀ − 0.001)(1 + cos(π epoch/max_epoch))^power; the printed 4 is a footnote's mark."""
    return 0.001 + 0.5 * (start - 0.001) * (1 + np.cos(np.pi * epoch / max_epoch)) ** power


def cosine_schedule(rng: np.random.Generator) -> Erratum:
    """Appendix A: with the exponent the schedule starts near 8α₀; without it, at α₀ and ends at 0.001."""
    start = rng.uniform(0.1, 1.0)
    ends, truth = np.array([0.0, 90.0]), np.array([start, 0.001])
    return Erratum(
        place="A, cosine schedule",
        measure="relative error at the two ends of the schedule",
        printed=relative_error(cosine_rate(ends, 90.0, start, 4.0), truth),
        corrected=relative_error(cosine_rate(ends, 90.0, start, 1.0), truth),
        margin=1.0,
    )


def polynomial_schedule(rng: np.random.Generator) -> Erratum:
    """Appendix A: the "exponential strategy" α₀(1 − e/E)^D̃ is a straight line of log(1 − e/E), not of e.

    The residual of a straight-line fit to log α, relative to its spread.
    """
    power, epochs = rng.uniform(4.0, 6.0), np.arange(50.0)
    log_rate = np.log(0.18 * (1 - epochs / 52) ** power)

    def misfit(x: Array) -> float:
        fit = np.polyval(np.polyfit(x, log_rate, 1), x)
        return float(np.linalg.norm(log_rate - fit) / np.linalg.norm(log_rate - log_rate.mean()))

    return Erratum(
        place="A, exponential strategy",
        measure="misfit of log α to a straight line",
        printed=misfit(epochs),
        corrected=misfit(np.log(1 - epochs / 52)),
        margin=0.1,
    )


def schnet_rate(rng: np.random.Generator) -> Erratum:
    """Appendix A, SchNet: "2e·4" is 2e-4. As a product it multiplies the loss of a quadratic at every step.

    Gradient descent on ½ h x² with curvature h ≤ 100, which 2e-4 keeps stable; log₁₀ of |x₁₀|/|x₀|.
    """
    curvature = rng.uniform(10.0, 100.0)

    def growth(rate: float) -> float:
        return float(max(0.0, 10 * np.log10(abs(1 - rate * curvature))))

    return Erratum(
        place="A, SchNet's rate",
        measure="decades by which ten gradient steps move away from a minimiser",
        printed=growth(2 * np.e * 4),
        corrected=growth(2e-4),
        margin=1.0,
    )


FORMULAS: tuple[Check, ...] = (
    missing_factor,
    momentum_matrix,
    damped_twice,
    mini_batch_expectation,
    kfac_order,
    woodbury,
    damping_in_woodbury,
    least_squares,
    same_batch,
    sketched_least_squares,
    column_sampling,
    cosine_schedule,
    polynomial_schedule,
    schnet_rate,
)
