"""Theorem 5: the regret of `OnlineNGPlus` against log T, its constants, and Lemma 7.

Three streams of convex losses on the Frobenius ball of radius R, played by NG+ in its online form, by the
online Newton step on the vectorized parameter, and by online gradient descent. The regret is measured
against the best fixed point of the ball, found to a certified gap.

    python -m experiments.theory.regret --seed 0 --out results/theory/regret
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from experiments.analysis.figures.drawing import figure
from experiments.records.claim_checks import Erratum, Verdict, write_rows, write_verdicts
from ngplus.online import OnlineNGPlus, project_to_ball, regret_bound

Array = NDArray[np.float64]
LOSS_NAMES = {
    "least squares": "matrix least squares (5×4)",
    "logistic": "logistic loss (5×1)",
    "log": "log loss (5×1)",
}


@dataclass(frozen=True, kw_only=True)
class Stream:
    """T rounds of ψ_t(W) = φ(Wᵀx_t, y_t) on {‖W‖_F ≤ radius}, with the constants of Assumption 4.

    Attributes:
        name: of the loss.
        x: (T, m), rows of norm at most 1.
        y: (T, n).
        loss: φ: (T, n), (T, n) -> (T,).
        slope: ∂φ/∂z: (T, n), (T, n) -> (T, n); ∇ψ_t = x_t slopeᵀ.
        radius: R; the diameter 𝒟 is 2R.
        alpha: α of Assumption 4.1, proved for the loss.
        gradient_bound: 𝓛 of Assumption 4.2.
        smoothness: of φ in z.
    """

    name: str
    x: Array
    y: Array
    loss: Callable[[Array, Array], Array]
    slope: Callable[[Array, Array], Array]
    radius: float
    alpha: float
    gradient_bound: float
    smoothness: float

    def losses(self, W: Array, upto: int) -> Array:
        """ψ_1(W) … ψ_upto(W)."""
        return self.loss(self.x[:upto] @ W, self.y[:upto])

    def gradient(self, W: Array, t: int) -> Array:
        """∇ψ_t(W), shape (m, n)."""
        return np.outer(self.x[t], self.slope(self.x[t : t + 1] @ W, self.y[t : t + 1])[0])

    def bound(self, rounds: int) -> float:
        """Theorem 5, corrected: (1/2α)[m log(1 + α²𝓛²𝒟²T) + 1]."""
        return regret_bound(self.alpha, self.x.shape[1], self.gradient_bound, 2 * self.radius, rounds)

    def printed_bound(self, rounds: int) -> float:
        """Theorem 5 as printed: (n/α) log(α𝓛²𝒟²T)."""
        scale = self.alpha * (self.gradient_bound * 2 * self.radius) ** 2
        return self.y.shape[1] / self.alpha * math.log(scale * rounds)


def unit_rows(rng: np.random.Generator, rounds: int, m: int) -> Array:
    """Inputs of norm at most 1 whose directions differ ninefold in variance."""
    x = rng.normal(size=(rounds, m)) * np.geomspace(1.0, 1 / 3, m)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1.0)


def least_squares_stream(rng: np.random.Generator, rounds: int, radius: float = 1.0) -> Stream:
    """The paper's example, ½‖Wᵀx − y‖² with ‖x‖ ≤ 1, ‖y‖ ≤ R: α = 1/(4R²), 𝓛 = 2R.

    ∇²ψ = I ⊗ xxᵀ and ∇ψ∇ψᵀ = ‖Wᵀx − y‖² xxᵀ ⪯ 4R² xxᵀ.
    """
    m, n = 5, 4
    x, truth = unit_rows(rng, rounds, m), rng.normal(size=(m, n))
    y = x @ (radius * truth / np.linalg.norm(truth)) + 0.3 * radius * rng.normal(size=(rounds, n))
    y *= np.minimum(1.0, radius / np.linalg.norm(y, axis=1, keepdims=True))
    return Stream(
        name="least squares",
        x=x,
        y=y,
        loss=lambda z, y: 0.5 * np.square(z - y).sum(axis=1),
        slope=lambda z, y: z - y,
        radius=radius,
        alpha=1 / (4 * radius**2),
        gradient_bound=2 * radius,
        smoothness=1.0,
    )


def exp_concave_alpha(concavity: float, gradient_bound: float, diameter: float) -> float:
    """Assumption 4.1 from exp-concavity: α = ½ min{1/(𝓛𝒟), concavity} (Hazan, Agarwal and Kale, 2007)."""
    return 0.5 * min(1 / (gradient_bound * diameter), concavity)


def logistic_stream(rng: np.random.Generator, rounds: int, radius: float = 1.0) -> Stream:
    """log(1 + exp(−y wᵀx)), e^{−R}-exp-concave on the ball: φ''/φ'² = e^{y wᵀx}."""
    x = unit_rows(rng, rounds, 5)
    odds = 3 * x @ rng.normal(size=(5, 1))
    y = np.where(rng.random((rounds, 1)) < 1 / (1 + np.exp(-odds)), 1.0, -1.0)
    return Stream(
        name="logistic",
        x=x,
        y=y,
        loss=lambda z, y: np.logaddexp(0.0, -y * z)[:, 0],
        slope=lambda z, y: -y / (1 + np.exp(y * z)),
        radius=radius,
        alpha=exp_concave_alpha(math.exp(-radius), 1.0, 2 * radius),
        gradient_bound=1.0,
        smoothness=0.25,
    )


def log_stream(rng: np.random.Generator, rounds: int, radius: float = 1.0, offset: float = 1.5) -> Stream:
    """−log(c + wᵀx) with c > R, 1-exp-concave: ∇²ψ = ∇ψ∇ψᵀ; 𝓛 = 1/(c − R)."""
    x = unit_rows(rng, rounds, 5) + np.array([0.3, 0, 0, 0, 0])
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1.0)
    steepest = 1 / (offset - radius)
    return Stream(
        name="log",
        x=x,
        y=np.zeros((rounds, 1)),
        loss=lambda z, y: -np.log(offset + z)[:, 0],
        slope=lambda z, y: -1 / (offset + z),
        radius=radius,
        alpha=exp_concave_alpha(1.0, steepest, 2 * radius),
        gradient_bound=steepest,
        smoothness=steepest**2,
    )


STREAMS = (least_squares_stream, logistic_stream, log_stream)


def clip(W: Array, radius: float) -> Array:
    """The nearest point of the ball in the Frobenius norm."""
    return W * min(1.0, radius / max(float(np.linalg.norm(W)), 1e-300))


def play_ngplus(stream: Stream, *, vectorized: bool = False) -> Array:
    """The losses of (19); ``vectorized`` plays vec(W) instead, which is the online Newton step."""
    m, n = stream.x.shape[1], stream.y.shape[1]
    shape = (m * n, 1) if vectorized else (m, n)
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = OnlineNGPlus([weight], alpha=stream.alpha, radius=stream.radius, nonfinite="raise")
    losses = np.empty(len(stream.x))
    for t in range(len(losses)):
        W = weight.detach().numpy().reshape(m, n)
        losses[t] = stream.loss(stream.x[t : t + 1] @ W, stream.y[t : t + 1])[0]
        weight.grad = torch.from_numpy(stream.gradient(W, t).reshape(shape))
        optimizer.step()
    return losses


def play_gradient_descent(stream: Stream) -> Array:
    """The losses of online gradient descent with its textbook step 𝒟/(𝓛√t)."""
    W = np.zeros((stream.x.shape[1], stream.y.shape[1]))
    losses = np.empty(len(stream.x))
    for t in range(len(losses)):
        losses[t] = stream.loss(stream.x[t : t + 1] @ W, stream.y[t : t + 1])[0]
        step = 2 * stream.radius / (stream.gradient_bound * math.sqrt(t + 1))
        W = clip(W - step * stream.gradient(W, t), stream.radius)
    return losses


def best_in_hindsight(
    stream: Stream, rounds: int, start: Array, *, tolerance: float = 1e-6, steps: int = 100_000
) -> tuple[Array, float]:
    """A point of the ball whose total loss is within `tolerance` of the least, and that gap's bound.

    Accelerated projected gradient descent with restarts, until the Frank-Wolfe gap ⟨∇F, W⟩ + R‖∇F‖ ≥ F − F*
    certifies it.

    Args:
        stream: the losses.
        rounds: how many of them.
        start: a point of the ball.
        tolerance: of the total loss.
        steps: at most.

    Returns:
        The point, and the gap that is certified.

    Raises:
        RuntimeError: the gap is still larger after `steps` steps.
    """
    x, y = stream.x[:rounds], stream.y[:rounds]
    rate = 1 / (stream.smoothness * np.linalg.norm(x, 2) ** 2)
    W, momentum, speed = start, start, 1.0
    for _ in range(steps):
        gradient = x.T @ stream.slope(x @ momentum, y)
        gap = float(np.sum(gradient * momentum) + stream.radius * np.linalg.norm(gradient))
        if gap <= tolerance and np.linalg.norm(momentum) <= stream.radius * (1 + 1e-12):
            return momentum, gap
        moved = clip(momentum - rate * gradient, stream.radius)
        faster = (1 + math.sqrt(1 + 4 * speed**2)) / 2
        if np.sum((momentum - moved) * (moved - W)) > 0:
            momentum, speed = moved, 1.0
        else:
            momentum, speed = clip(moved + (speed - 1) / faster * (moved - W), stream.radius), faster
        W = moved
    raise RuntimeError(f"the gap is still {gap:.3g} > {tolerance:.3g} after {steps} steps")


def checkpoints(rounds: int) -> list[int]:
    """About eight numbers of rounds a decade, the last being all."""
    return sorted({int(t) for t in np.geomspace(10, rounds, 1 + int(8 * math.log10(rounds / 10)))} | {rounds})


def measure_regret(stream: Stream) -> list[dict[str, Any]]:
    """The regret of each method at each checkpoint, with the bounds.

    `regret` is an upper value: the certified gap of the best point in hindsight is added.
    """
    played = {"NG+": play_ngplus(stream), "online gradient descent": play_gradient_descent(stream)}
    if stream.y.shape[1] > 1:  # for n = 1 the online Newton step is NG+ itself
        played["online Newton step"] = play_ngplus(stream, vectorized=True)
    totals = {method: np.cumsum(losses) for method, losses in played.items()}
    rows: list[dict[str, Any]] = []
    best = np.zeros((stream.x.shape[1], stream.y.shape[1]))
    for t in checkpoints(len(stream.x)):
        best, gap = best_in_hindsight(stream, t, best)
        least = stream.losses(best, t).sum() - gap
        for method, total in totals.items():
            rows.append(
                {
                    "loss": stream.name,
                    "method": method,
                    "rounds": t,
                    "regret": total[t - 1] - least,
                    "bound": stream.bound(t),
                    "printed_bound": stream.printed_bound(t),
                }
            )
    return rows


def growth_exponent(rows: Sequence[dict[str, Any]], loss: str, method: str) -> float:
    """The slope of log regret against log T over the last decade: ½ for √T, towards 0 for log T."""
    line = [row for row in rows if (row["loss"], row["method"]) == (loss, method)]
    line = [row for row in line if row["rounds"] * 10 >= line[-1]["rounds"]]
    rounds, regrets = ([math.log(row[name]) for row in line] for name in ("rounds", "regret"))
    return float(np.polyfit(rounds, regrets, 1)[0])


def ordered_pair(rng: np.random.Generator, size: int) -> tuple[Array, Array]:
    """A ⪰ B ≻ 0 with scales from 1e-2 to 1e2 and an increment of any rank."""
    scales = 10 ** rng.uniform(-2, 2, size=2)
    root, step = rng.normal(size=(size, size)), rng.normal(size=(size, rng.integers(1, size + 1)))
    B = scales[0] * (root @ root.T / size + 0.01 * np.eye(size))
    return B + scales[1] * step @ step.T / size, B


def log_determinant_ratio(A: Array, B: Array) -> float:
    """log(|A|/|B|)."""
    return float(np.linalg.slogdet(A)[1] - np.linalg.slogdet(B)[1])


def lemma_inequality(rng: np.random.Generator, pairs: int = 3000) -> Erratum:
    """Lemma 7 rests on ⟨A−B, A⁻¹⟩ ≤ log(|A|/|B|); printed is ⟨A−B, B⟩ ≥ log(|A|/|B|)."""
    printed = corrected = 0
    for _ in range(pairs):
        A, B = ordered_pair(rng, int(rng.integers(1, 7)))
        ratio = log_determinant_ratio(A, B)
        printed += np.sum((A - B) * B) < ratio - 1e-9
        corrected += np.trace(np.linalg.solve(A, A - B)) > ratio + 1e-9
    return Erratum(
        place="Lemma 7, inequality",
        measure=f"share of {pairs} random pairs A ⪰ B ≻ 0 on which it fails",
        printed=printed / pairs,
        corrected=corrected / pairs,
        margin=0.01,
        tolerance=0.0,
    )


def potential(gradients: Array, epsilon: float, *, printed_matrix: bool = False) -> tuple[float, float]:
    """Σ_t ‖G_t‖²_{L_t⁻¹} and log(|L_T|/|L_0|), with L_t from G Gᵀ or, as (19) prints it, from GᵀG.

    Args:
        gradients: (T, m, n); m = n if ``printed_matrix``, or the shapes do not fit.
        epsilon: L_0 = εI.
        printed_matrix: whether to accumulate GᵀG.

    Returns:
        The sum and the logarithm.
    """
    start = epsilon * np.eye(gradients.shape[1])
    L, total = start, 0.0
    for G in gradients:
        L = L + (G.T @ G if printed_matrix else G @ G.T)
        total += float(np.sum(G * np.linalg.solve(L, G)))
    return total, log_determinant_ratio(L, start)


def lemma_factor(rng: np.random.Generator) -> Erratum:
    """(21): the factor is m, the size of L, not n. One column, m directions in turn."""
    m, rounds, epsilon = 12, 240, 1.0
    basis = np.linalg.qr(rng.normal(size=(m, m)))[0]
    gradients = basis.T[np.arange(rounds) % m][:, :, None]  # (T, m, 1), norm 1
    total, _ = potential(gradients, epsilon)
    growth = math.log((rounds + epsilon) / epsilon)
    return Erratum(
        place="Lemma 7, factor",
        measure="excess of Σ‖G_t‖² in the norm of L_t⁻¹ over the bound, n = 1, m = 12",
        printed=max(0.0, total / (1 * growth) - 1),
        corrected=max(0.0, total / (m * growth) - 1),
        margin=0.5,
    )


def online_matrix(rng: np.random.Generator) -> Erratum:
    """(19): with GᵀG to the left of G the potential argument of Lemma 7 does not hold; with G Gᵀ it does."""
    g, a = rng.normal(size=(2, 4))
    gradients = np.stack([np.outer(g + 0.1 * rng.normal(size=4), a) for _ in range(60)])
    excess = []
    for printed in (True, False):
        total, growth = potential(gradients, 1.0, printed_matrix=printed)
        excess.append(max(0.0, total / growth - 1))
    return Erratum(
        place="(19), matrix",
        measure="excess of Σ‖G_t‖² in the norm of L_t⁻¹ over log(|L_T|/|L_0|), m = n = 4",
        printed=excess[0],
        corrected=excess[1],
        margin=0.05,
    )


def online_projection(rng: np.random.Generator, draws: int = 100) -> Erratum:
    """(19): the proof needs ‖Π(Y) − Θ*‖_L ≤ ‖Y − Θ*‖_L for Θ* in the ball: the projection in L's norm.

    Y leaves a Θ* on the sphere in the direction that L weighs least; a radial projection leaves that direction.
    """
    worst = {"frobenius": 0.0, "curvature": 0.0}
    for _ in range(draws):
        basis = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        L = (basis * np.array([1.0, 10.0, 100.0])) @ basis.T
        inside = rng.normal(size=(3, 2))
        inside /= np.linalg.norm(inside)
        Y = inside + 0.3 * np.outer(basis[:, 0], rng.normal(size=2))
        values, vectors = torch.linalg.eigh(torch.from_numpy(L))
        nearest = {
            "frobenius": clip(Y, 1.0),
            "curvature": project_to_ball(torch.from_numpy(Y), values, vectors, 1.0).numpy(),
        }
        for norm, X in nearest.items():
            squared = [float(np.sum((Z - inside) * (L @ (Z - inside)))) for Z in (X, Y)]
            worst[norm] = max(worst[norm], math.sqrt(squared[0] / squared[1]) - 1)
    return Erratum(
        place="(19), projection",
        measure=f"largest growth of ‖Y − Θ*‖ in the norm of L by projecting, {draws} draws",
        printed=worst["frobenius"],
        corrected=worst["curvature"],
        margin=0.01,
        tolerance=1e-9,
    )


def regret_claim(rng: np.random.Generator, rounds: int = 20, radius: float = 0.05) -> Erratum:
    """Theorem 5: with ε = 2/(α𝒟²) the printed bound is negative for small T; the regret is not.

    One function ½(xᵀw − R)² is played again and again, so that the regret is a sum of nonnegative terms.
    """
    x = rng.normal(size=(1, 2))
    stream = Stream(
        name="one square",
        x=np.repeat(x / np.linalg.norm(x), rounds, axis=0),
        y=np.full((rounds, 1), radius),
        loss=lambda z, y: 0.5 * np.square(z - y)[:, 0],
        slope=lambda z, y: z - y,
        radius=radius,
        alpha=1 / (4 * radius**2),
        gradient_bound=2 * radius,
        smoothness=1.0,
    )
    excess = []
    for epsilon, bound in ((2 / (stream.alpha * 4 * radius**2), stream.printed_bound), (None, stream.bound)):
        weight = torch.nn.Parameter(torch.zeros(2, 1, dtype=torch.float64))
        optimizer = OnlineNGPlus([weight], alpha=stream.alpha, epsilon=epsilon, radius=radius)
        regret = 0.0
        for t in range(rounds):
            regret += float(stream.losses(weight.detach().numpy(), 1)[0])  # the best loss is 0
            weight.grad = torch.from_numpy(stream.gradient(weight.detach().numpy(), t))
            optimizer.step()
        excess.append(max(0.0, (regret - bound(rounds)) / regret))
    return Erratum(
        place="Theorem 5",
        measure=f"(regret − bound)/regret where positive, R = {radius}, T = {rounds}",
        printed=excess[0],
        corrected=excess[1],
        margin=0.5,
    )


THEOREM = (lemma_inequality, lemma_factor, online_matrix, online_projection, regret_claim)


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Regret against T, one panel a loss, with the corrected bound."""
    with figure(folder, "regret", (10, 5.6)) as fig:
        for (upper, lower), loss in zip(fig.subplots(2, 3, sharex=True).T, LOSS_NAMES, strict=True):
            panel = [row for row in rows if row["loss"] == loss]
            for method in dict.fromkeys(row["method"] for row in panel):
                line = [row for row in panel if row["method"] == method]
                for axis in (upper, lower):
                    axis.plot([r["rounds"] for r in line], [r["regret"] for r in line], ".-", label=method)
            rounds, bounds = [row["rounds"] for row in panel], [row["bound"] for row in panel]
            upper.plot(rounds, bounds, "k--", label="Theorem 5, corrected")
            upper.set(xscale="log", yscale="log", ylabel="regret", title=LOSS_NAMES[loss])
            lower.set(xscale="log", xlabel="rounds T", ylabel="regret, linear scale")
            if loss == "least squares":
                fig.legend(*upper.get_legend_handles_labels(), loc="outside lower center", ncols=4)


def verdicts(rows: Sequence[dict[str, Any]], errata: Sequence[Erratum]) -> list[Verdict]:
    """What the rows say of Theorem 5 and Lemma 7."""
    ours = [row for row in rows if row["method"] == "NG+"]
    largest = max(row["regret"] / row["bound"] for row in ours)
    exponents = ", ".join(
        f"{loss} {growth_exponent(rows, loss, 'NG+'):.2f} "
        f"(gradient descent {growth_exponent(rows, loss, 'online gradient descent'):.2f})"
        for loss in LOSS_NAMES
    )
    lemma, claim = errata[0], errata[-1]
    return [
        Verdict(
            claim="Theorem 5: logarithmic regret (constants corrected)",
            paper="R_T = O(log T)",
            ours=f"largest regret/bound {largest:.3g}; growth exponents {exponents}",
            verdict="reproduced" if largest <= 1 else "not reproduced",
            why="the corrected bound holds at every checkpoint of every loss",
        ),
        Verdict(
            claim="Theorem 5 as printed, (n/α) log(α𝓛²𝒟²T)",
            paper="holds for every T",
            ours=f"exceeded: (regret − bound)/regret = {claim.printed:.2f} at T = 20",
            verdict="not reproduced" if claim.printed_is_wrong else "inconclusive",
            why="the printed bound is negative for small T",
        ),
        Verdict(
            claim="Lemma 7's matrix inequality as printed",
            paper="⟨A−B, B⟩ ≥ log|A|/|B| for A ⪰ B",
            ours=f"fails on {lemma.printed:.1%} of random pairs, the corrected one on {lemma.corrected:.1%}",
            verdict="not reproduced" if lemma.printed_is_wrong else "inconclusive",
            why="one counterexample is enough; ⟨A−B, A⁻¹⟩ ≤ log|A|/|B| has a proof and is what (21) needs",
        ),
    ]


def measure(seed: int, rounds: int) -> tuple[list[dict[str, Any]], list[Erratum]]:
    """The regret on every stream, and every erratum of section 4.2."""
    rows = [
        row
        for index, make in enumerate(STREAMS)
        for row in measure_regret(make(np.random.default_rng([seed, index]), rounds))
    ]
    return rows, [check(np.random.default_rng([seed, 99])) for check in THEOREM]


def run(seed: int, out: Path, rounds: int) -> list[Erratum]:
    """Play every stream, check every erratum of section 4.2, and write tables and figure to `out`.

    Args:
        seed: of every draw.
        out: a folder for tables and figures.
        rounds: of each stream.

    Returns:
        The errata, checked.
    """
    rows, errata = measure(seed, rounds)
    write_rows(out / "regret.csv", rows)
    write_rows(out / "errata.csv", [erratum.row() for erratum in errata])
    write_verdicts(out / "verdicts.csv", verdicts(rows, errata))
    draw(rows, out)
    return errata


def main(
    seed: Annotated[int, typer.Option(help="of every draw")] = 0,
    out: Annotated[Path, typer.Option(help="folder for tables and figure")] = Path("results/theory/regret"),
    quick: Annotated[bool, typer.Option(help="few rounds, for a first look")] = False,
) -> None:
    """Regret of online NG+ compared with its bound, and the errata of section 4.2."""
    run(seed, out, 300 if quick else 10_000)


if __name__ == "__main__":
    typer.run(main)
