"""Run records written by hand: the lines are spelt out here, not made by the code under test."""

import json
from pathlib import Path

TASK, SCALE = "resnet50-imagenet", "tiny"


def manifest(optimizer: str, seed: int, **changes) -> dict:
    return {
        "event": "manifest",
        "schema": 1,
        "task": TASK,
        "scale": SCALE,
        "optimizer": optimizer,
        "seed": seed,
        "recipe": {"task": {}, "run": {"report_split": "test"}, "optimizer": {"lr": 0.1}},
        "git_sha": None,
        "git_dirty": None,
        "versions": {"torch": "2"},
        "device": "cpu",
        "threads": 2,
        "world_size": 1,
        "dataset": {
            "name": "Fashion-MNIST, 3,600 embedded images",
            "sha256": "ab" * 32,
            "licence": "MIT",
            "train_size": 3600,
            "eval_size": 1000,
        },
        "metric": {"name": "top1", "unit": "fraction", "higher_is_better": True},
        "target": 0.8,
        "epochs": 4,
        "started_at": "2026-01-01T00:00:00Z",
    } | changes


def epoch(number: int, metric: float | None, *, seconds_per_epoch: float = 2.0, **changes) -> dict:
    return {
        "event": "epoch",
        "epoch": number,
        "step": 36 * number,
        "train_loss": None if number == 0 else 2.0 / number,
        "eval_loss": 2.0 / (number + 1),
        "metric": metric,
        "seconds": seconds_per_epoch * number,
        "peak_memory_mb": 100.0 + number,
        "curvature_s": 0.5 * number,
        "inverse_s": 0.25 * number,
        "apply_s": None,
        "lr": 0.1,
        "damping": None,
    } | changes


def run_lines(optimizer: str, seed: int, metrics: list[float | None], **changes) -> list[dict]:
    """A whole run; `metrics` are those of epochs 0, 1, ..., `seconds_per_epoch` and `end` apart from the manifest."""
    pace = changes.pop("seconds_per_epoch", 2.0)
    reason = changes.pop("end", "finished")
    lines = [manifest(optimizer, seed, **changes)]
    lines += [epoch(number, metric, seconds_per_epoch=pace) for number, metric in enumerate(metrics)]
    if reason:
        lines.append({"event": "end", "reason": reason, "seconds": pace * (len(metrics) - 1)})
    return lines


def write(results: Path, optimizer: str, seed: int, metrics: list[float | None], **changes) -> Path:
    """The record of a run of `TASK`; a change of ``task`` makes it one that is in the wrong folder."""
    return write_run(results, optimizer, seed, metrics, folder=TASK, **changes)


def write_run(results: Path, optimizer: str, seed: int, metrics: list[float | None], **changes) -> Path:
    folder = changes.pop("folder", changes.get("task", TASK))
    path = results / folder / SCALE / "runs" / f"{optimizer}-seed{seed}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = run_lines(optimizer, seed, metrics, **changes)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# Metrics after epochs 0 to 4; against a target of 0.8 they reach it after the epoch they are named for.
HIT_1 = [0.1, 0.81, 0.82, 0.83, 0.84]
HIT_2 = [0.1, 0.7, 0.8, 0.81, 0.82]
HIT_3 = [0.1, 0.6, 0.7, 0.85, 0.8]
HIT_4 = [0.1, 0.6, 0.7, 0.75, 0.8]
MISS = [0.1, 0.6, 0.7, 0.75, 0.79]


def add_others(path, name, values):
    """Give each epoch of a record a further figure."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line, value in zip([line for line in lines if line["event"] == "epoch"], values, strict=True):
        line["others"] = {name: value}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
