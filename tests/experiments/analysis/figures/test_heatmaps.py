import numpy as np
import pandas as pd
import pytest

from experiments.analysis.figures.heatmaps import colour_range, draw, figure, heat_map

CSV = """grid,ended,lr,damping,block_size,seed,split,epochs,loss,top1,best_top1
pair,finished,0.1,10,,0,validation,4,1.0,0.5,0.6
pair,finished,0.1,2,,0,validation,4,1.0,0.5,0.7
pair,diverged,0.02,10,,0,validation,1,,0.1,0.9
block,finished,0.1,,16,0,validation,4,1.0,0.5,0.65
block,finished,0.1,,,0,validation,4,1.0,0.5,0.55
"""


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "sensitivity.csv"
    path.write_text(CSV)
    return path


def test_a_map_has_a_cell_for_each_pair_in_the_order_of_the_values(csv):
    found = heat_map(pd.read_csv(csv).iloc[:3])
    assert (found.down, found.rows) == ("lr", ["0.02", "0.1"])
    assert (found.across, found.columns) == ("damping", ["2", "10"])
    assert np.array_equal(found.best, [[np.nan, np.nan], [0.7, 0.6]], equal_nan=True)
    assert found.ended.tolist() == [["", "diverged"], ["finished", "finished"]]


def test_one_setting_is_a_row_and_what_the_recipe_has_comes_last(csv):
    found = heat_map(pd.read_csv(csv).iloc[3:])
    assert (found.down, found.across, found.rows, found.columns) == ("", "block_size", [""], ["16", "default"])
    assert found.best.tolist() == [[0.65, 0.55]]


def test_where_no_more_is_there_than_what_the_recipe_has_it_stands_under_the_grids_name(csv):
    found = heat_map(pd.read_csv(csv).iloc[4:].assign(lr=np.nan))
    assert (found.down, found.across, found.columns, found.best.tolist()) == ("", "grid", ["block"], [[0.55]])


@pytest.mark.parametrize("higher", [True, False])
def test_the_better_cell_is_darker_and_a_cell_says_its_value_or_that_it_diverged(csv, higher):
    made = figure(pd.read_csv(csv), "title", higher_is_better=higher)
    image = made.axes[0].images[0]
    brightness = [sum(image.cmap(image.norm(value))[:3]) for value in (0.6, 0.7)]
    assert (brightness[1] < brightness[0]) == higher
    assert [text.get_text() for text in made.axes[0].texts] == ["", "diverged", "0.7", "0.6"]
    assert image.norm.vmin == 0.55


def test_a_long_title_is_no_wider_than_the_figure(csv):
    made = figure(pd.read_csv(csv).iloc[:3], "a long title of many words, " * 5, higher_is_better=True)
    made.canvas.draw()
    extent = made._suptitle.get_window_extent()
    assert extent.x0 >= 0
    assert extent.x1 <= made.bbox.width


def test_the_same_file_gives_the_same_bytes(csv):
    first = [path.read_bytes() for path in draw(csv, "title", higher_is_better=True)]
    assert [path.read_bytes() for path in draw(csv, "title", higher_is_better=True)] == first


def test_where_all_diverged_there_is_a_figure_still(tmp_path):
    path = tmp_path / "sensitivity.csv"
    path.write_text("\n".join(line.replace("finished", "diverged") for line in CSV.splitlines()))
    assert all(drawn.stat().st_size > 1000 for drawn in draw(path, "title", higher_is_better=True))


@pytest.mark.parametrize(
    ("best", "ends"),
    [
        ([0.13, 0.14, 0.16, 0.17, 0.23, 4.4, np.nan], (0.13, 0.23)),
        ([0.793, 0.85, 0.853, 0.855, 0.858], (0.85, 0.858)),
        ([3.8, 3.9, 4.2, 5.2], (3.8, 5.2)),
        ([0.5, 0.5, 0.5, 0.5, 0.6], (0.5, 0.6)),
        ([np.nan], (0.0, 1.0)),
    ],
)
def test_what_is_far_out_does_not_stretch_the_colours(best, ends):
    assert colour_range(np.array(best)) == ends
