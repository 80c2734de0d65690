"""What building the curvature of ResNet50 costs, compared with one forward and backward: ``make bench-curvature``.

Forward and backward passes of three kinds are interleaved: plain ones, those in which NG+ builds its curvature, and
those with the construction of the authors' code. What they take longer than the plain ones of the same round is what
building costs, of which NG+ saves some in the backward pass. Medians over rounds.
"""

import argparse
import statistics
import time
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torchvision.models import resnet50

from experiments.bench.released import ReleasedCurvature
from experiments.records.provenance import device_name
from ngplus import NGPlus


def measure(batch: int, *, size: int = 224, rounds: int = 5, device: str = "cpu", released: bool = True) -> pd.Series:
    """Median ratio of building to forward and backward, ours and released, for torchvision's resnet50.

    Args:
        batch: images a step.
        size: side of the images in pixels.
        rounds: how often each is measured, after one round that is not counted.
        device: where.
        released: whether to measure the authors' construction too, which is slow.

    Returns:
        Ratios by name, with the device and the seconds they are of.
    """
    torch.manual_seed(0)
    model = resnet50().to(device)
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(1000, (batch,), device=device)
    plain: list[float] = []
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(rounds + 1):
        plain.append(_forward_backward(model, images, labels))
        ours.append(_ngplus_step(model, images, labels))
        if released:
            theirs.append(_released_step(model, images, labels))
    return _summary(batch, size, device, plain[1:], ours[1:], theirs[1:])


def _ngplus_step(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Seconds of a forward and backward pass in which the curvature is built."""
    optimizer = NGPlus(model, lr=1e-9, damping=0.16)
    total = _forward_backward(model, images, labels)
    optimizer._recorder.disarm()
    return total


def _released_step(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with ReleasedCurvature(model):
        return _forward_backward(model, images, labels)


def _forward_backward(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.zero_grad()
    _synchronize(images)
    start = time.perf_counter()
    nn.functional.cross_entropy(model(images), labels).backward()
    _synchronize(images)
    return time.perf_counter() - start


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def _summary(
    batch: int, size: int, device: str, plain: list[float], ours: list[float], theirs: list[float]
) -> pd.Series:
    row = {
        "model": "resnet50",
        "batch": batch,
        "size": size,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "rounds": len(ours),
        "forward_backward_s": statistics.median(plain),
        "curvature_over_forward_backward": _median_excess(ours, plain),
    }
    if theirs:
        row["released_over_forward_backward"] = _median_excess(theirs, plain)
        row["released_over_ours"] = _median_excess(theirs, plain) / _median_excess(ours, plain)
    return pd.Series(row)


def _median_excess(seconds: list[float], plain: list[float]) -> float:
    """What steps take longer than the plain ones of their rounds, over those."""
    return statistics.median((each - other) / other for each, other in zip(seconds, plain, strict=True))


def main() -> None:
    """Measure, print and write ``results/bench/curvature.csv``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-released", action="store_true", help="leave out the authors' construction")
    parser.add_argument("--out", type=Path, default=Path("results/bench/curvature.csv"))
    arguments = parser.parse_args()
    rows = []
    for batch in arguments.batch:
        row = measure(
            batch,
            size=arguments.size,
            rounds=arguments.rounds,
            device=arguments.device,
            released=not arguments.no_released,
        )
        print(row.to_string(), end="\n\n", flush=True)
        rows.append(row)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(arguments.out, index=False)


if __name__ == "__main__":
    main()
