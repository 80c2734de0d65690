"""What a training step costs under each optimizer, on the four models: ``make bench``.

Every optimizer gets its own copy of the model. In each round every optimizer makes a turn of several steps, one
optimizer after the other, and refreshes its preconditioner once in a turn; the first step does not count, since it
finds the memory as another optimizer left it (on a DLRM that is worth a tenth of a step). Plain steps are those before
the refresh step; what the steps just after it take more than they, since it empties the caches, is a part of what a
refresh costs. A step at interval 𝒯 then costs ((𝒯 − 1)·plain + refresh)/𝒯. Ratios are taken within a round, to the
plain step of each of `REFERENCES` of the same round; their medians over rounds are reported, and the least and the
greatest beside them. An optimizer that refreshes nothing has the noise of its slowest place at 𝒯 = 1, which on steps of
milliseconds can be anything. What is stopped keeps the rounds that were whole.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch

from experiments.bench.compared_optimizers import CANDIDATES, Candidate, Unsupported
from experiments.bench.peak_memory import peak_memory_mb
from experiments.bench.workloads import WORKLOADS, Workload
from experiments.records.provenance import device_name

EQUAL_INTERVAL = 10
REFERENCES = ("sgd", "adam", "adagrad", "adamw")
FOUR_MODELS = ["resnet50", "schnet", "transformer", "dlrm"]
COMPARED = [
    "sgd",
    "adam",
    "adagrad",
    "muon",
    "ngplus",
    "ngplus-adam",
    "ngplus-adagrad",
    "ngplus-eigen",
    "ngplus-eigen-short",
    "kfac (asdfghjkl)",
    "kfac (ngplus.baselines)",
    "shampoo (pytorch-optimizer)",
    "soap (pytorch-optimizer)",
]


def compare(model: str, names: Iterable[str], *, rounds: int, device: str, memory: bool) -> Iterator[pd.DataFrame]:
    """One row an optimizer for one of `WORKLOADS`, after every round of what was measured so far.

    Args:
        model: the workload's name.
        names: of `CANDIDATES`. Ratios are to those of `REFERENCES` that are among them and can train the model.
        rounds: how many count, after one that does not.
        device: where.
        memory: whether to measure peak memory too at the end, each optimizer in a process of its own.

    Yields:
        A row an optimizer.
    """
    candidates, reasons, workload = _make(model, names, device)
    turns: dict[str, list[list[float]]] = {name: [] for name in candidates}
    for counted in range(rounds + 1):
        for name, candidate in candidates.items():
            turns[name].append([_seconds(candidate, device) for _ in range(workload.turn)])
        if counted:
            frame = _table(candidates, reasons, workload, turns)
            frame.insert(0, "model", workload.name)
            frame.insert(1, "device", device_name(device))
            frame.insert(2, "threads", torch.get_num_threads())
            frame.insert(3, "rounds", counted)
            yield frame
    if memory:
        frame["peak_memory_mb"] = [
            peak_memory_mb(model, name, device) if name in candidates else None for name in frame.optimizer
        ]
        yield frame


def _table(
    candidates: Mapping[str, Candidate],
    reasons: Mapping[str, str],
    workload: Workload,
    turns: Mapping[str, Sequence[Sequence[float]]],
) -> pd.DataFrame:
    seconds = {name: split_refresh(values) for name, values in turns.items()}
    rows = [_row(name, candidates[name], workload, values[1:], seconds) for name, values in seconds.items()]
    rows += [{"optimizer": name, "why_not": reason} for name, reason in reasons.items()]
    return pd.DataFrame(rows)


def _make(model: str, names: Iterable[str], device: str) -> tuple[dict[str, Candidate], dict[str, str], Workload]:
    candidates: dict[str, Candidate] = {}
    reasons: dict[str, str] = {}
    for name in names:
        torch.manual_seed(0)
        workload = WORKLOADS[model](device)
        try:
            candidates[name] = CANDIDATES[name](workload, workload.turn)
            candidates[name].step()  # makes state; it is a refresh step, and so is one in every turn
            candidates[name].step()
        except Unsupported as reason:
            reasons[name] = str(reason)
        except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
            candidates.pop(name, None)
            reasons[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return candidates, reasons, workload


def split_refresh(turns: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Seconds of the refresh step and of a plain one of each turn.

    The most expensive place in a turn is the refresh step, which is not the same for all: some count steps from one.
    The first step of a turn counts only where it is that one. What steps after it take more than a plain one is added
    to it.
    """
    medians = [statistics.median(place) for place in zip(*turns, strict=True)]
    refresh = medians.index(max(medians))
    calm = slice(1, refresh) if refresh > 1 else slice(len(medians) // 2 + 1, None)
    plain = [statistics.median(turn[calm]) for turn in turns]
    aftermath = [sum(step - usual for step in turn[refresh + 1 :]) for turn, usual in zip(turns, plain, strict=True)]
    return [(turn[refresh] + more, usual) for turn, more, usual in zip(turns, aftermath, plain, strict=True)]


def _seconds(candidate: Candidate, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    candidate.step()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait for what a GPU has queued.

    Args:
        device: where.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _row(
    name: str,
    candidate: Candidate,
    workload: Workload,
    values: list[tuple[float, float]],
    seconds: dict[str, list[tuple[float, float]]],
) -> dict[str, object]:
    row: dict[str, object] = {
        "optimizer": name,
        "interval": workload.interval,
        "renewing_step_s": statistics.median(refresh for refresh, _ in values),
        "plain_step_s": statistics.median(plain for _, plain in values),
    }
    intervals = {"usual": workload.interval, f"every_{EQUAL_INTERVAL}": EQUAL_INTERVAL, "every_1": 1}
    for label, interval in intervals.items():
        for reference in REFERENCES:
            if reference not in seconds:
                continue
            base = [plain for _, plain in seconds[reference][1:]]
            ratios = [_mean_at_interval(pair, interval) / other for pair, other in zip(values, base, strict=True)]
            row |= summarise_ratios(f"{label}_over_{reference}", ratios)
    if hasattr(candidate.optimizer, "times"):
        steps = 2 + workload.turn * (len(values) + 1)
        refreshes = math.ceil(steps / workload.turn)
        times = candidate.optimizer.times
        row |= {"curvature_s": times.curvature / refreshes, "inverse_s": times.inverse / refreshes}
        row |= {"apply_s": times.apply / steps}
    return row


def summarise_ratios(name: str, ratios: Sequence[float]) -> dict[str, float]:
    """Summarise the ratios of all rounds.

    Args:
        name: what the ratio is called.
        ratios: one a round.

    Returns:
        The median under ``name``, the least and the greatest under ``name_low`` and ``name_high``.
    """
    return {name: statistics.median(ratios), f"{name}_low": min(ratios), f"{name}_high": max(ratios)}


def show_ratios(frame: pd.DataFrame) -> str:
    """A table to print, with the spread of each ratio in its own cell: ``1.20 [1.18, 1.25]``.

    Args:
        frame: has columns as `summarise_ratios` names them, and others, which stay as they are.

    Returns:
        The table's lines.
    """
    shown = frame.copy()
    for name in [name.removesuffix("_low") for name in frame.columns if name.endswith("_low")]:
        spread = zip(shown[name], shown.pop(f"{name}_low"), shown.pop(f"{name}_high"), strict=True)
        shown[name] = ["" if pd.isna(ratio) else f"{ratio:.2f} [{low:.2f}, {high:.2f}]" for ratio, low, high in spread]
    return shown.round(4).to_string(index=False, na_rep="")


def _mean_at_interval(pair: tuple[float, float], interval: int) -> float:
    """Mean seconds a step when every ``interval``-th refreshes."""
    refresh, plain = pair
    return ((interval - 1) * plain + refresh) / interval


def main() -> None:
    """Measure, print and write ``results/bench/steps-<model>.csv``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", choices=list(WORKLOADS), default=FOUR_MODELS)
    parser.add_argument(
        "--optimizer", nargs="+", choices=list(CANDIDATES), default=COMPARED, help="besides SGD and Adam"
    )
    parser.add_argument("--also", nargs="+", choices=list(CANDIDATES), default=[], help="in addition to --optimizer")
    parser.add_argument("--rounds", type=int, default=5, help="1 or more; each is written when it is done")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory, which takes a process each")
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: must be 1 or more")
    arguments.out.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(["sgd", "adam", *arguments.optimizer, *arguments.also]))
    for model in arguments.model:
        path = arguments.out / f"steps-{model}-{arguments.device.split(':')[0]}.csv"
        measured = compare(
            model, names, rounds=arguments.rounds, device=arguments.device, memory=not arguments.no_memory
        )
        for frame in measured:
            frame.to_csv(path, index=False)
        print(show_ratios(frame), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
