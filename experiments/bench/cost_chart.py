"""The bench as a picture: what a step costs over one of SGD when every method refreshes every 10 steps.

Reads ``results/bench/steps-<model>-<device>.csv`` and writes ``steps-<device>.png`` and ``.svg`` next to them.
"""

import argparse
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from experiments.analysis.figures.drawing import figure
from experiments.analysis.figures.palette import pick_colour
from experiments.bench.steps import EQUAL_INTERVAL, FOUR_MODELS

SHOWN = {
    "ngplus": "NG+ on SGD",
    "ngplus-adam": "NG+ on Adam",
    "ngplus-eigen-short": "NG+ in its eigenbasis, one side",
    "ngplus-eigen": "NG+ in its eigenbasis, both sides",
    "muon": "Muon",
    "kfac (asdfghjkl)": "K-FAC (asdfghjkl)",
    "kfac (ngplus.baselines)": "K-FAC (this repository)",
    "soap (pytorch-optimizer)": "SOAP (pytorch-optimizer)",
    "shampoo (pytorch-optimizer)": "Shampoo (pytorch-optimizer)",
}
COLUMN = f"every_{EQUAL_INTERVAL}_over_sgd"


def draw(folder: Path, device: str) -> Path:
    """Draw what was measured of the four models on a device.

    Args:
        folder: has ``steps-<model>-<device>.csv``, and gets the picture.
        device: ``cpu`` or ``cuda``, as in the files' names.

    Returns:
        The SVG file; a PNG is next to it.

    Raises:
        FileNotFoundError: where nothing was.
    """
    paths = [folder / f"steps-{model}-{device}.csv" for model in FOUR_MODELS]
    frames = [pd.read_csv(path) for path in paths if path.exists()]
    if not frames:
        raise FileNotFoundError(f"{folder}: no steps-<model>-{device}.csv there; `make bench` makes them")
    with figure(folder, f"steps-{device}", (9.0, 4.4)) as drawn:
        for axes, frame in zip(drawn.subplots(-(-len(frames) // 2), 2).flat, frames, strict=False):
            _bars(axes, frame)
    return folder / f"steps-{device}.png"


def _bars(axes: Axes, frame: pd.DataFrame) -> None:
    ratios = frame.set_index("optimizer")[COLUMN].reindex(list(SHOWN)).dropna()
    names = [SHOWN[name] for name in ratios.index]
    bars = axes.barh(names, ratios, color=[pick_colour(name.split(" ")[0]) for name in ratios.index])
    axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel="step / step of SGD", xlim=(0, 1.25 * ratios.max()))
    axes.set_title(frame.model[0], loc="left")
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def main() -> None:
    """Draw, and say where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    try:
        print(draw(arguments.out, arguments.device))
    except FileNotFoundError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
