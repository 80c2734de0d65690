"""What the page says of a grid of settings in words."""

import numpy as np
import pytest

from experiments.analysis.figures.heatmaps import HeatMap
from experiments.analysis.report.sections.sensitivity_section import _summary

SAID = {
    "from 0.250 to 0.500, best at size 8": [[0.25, 0.5]],
    "0.500 in every cell": [[0.5, 0.5]],
    "from 0.500 to 0.500, best at size 16": [[np.nan, 0.5]],
    "no run of the grid finished": [[np.nan, np.nan]],
}


@pytest.mark.parametrize("said", SAID)
def test_a_grid_in_words(said):
    best = np.array(SAID[said])
    ended = np.full(best.shape, "finished")
    grid = HeatMap(down="", across="size", rows=[""], columns=["8", "16"], best=best, ended=ended)
    assert _summary("error: size", grid, higher_is_better=False) == f"error: size: {said}."
