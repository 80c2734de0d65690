import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from experiments.analysis.comparable_runs import load_comparable
from experiments.analysis.figures.curves import draw, figure, legend_below, panels, summarise_curve
from experiments.analysis.figures.palette import COLOURS, pick_colour, pick_dashes
from experiments.errors import UserError
from tests.experiments.cases.handwritten_records import (
    HIT_1,
    HIT_2,
    HIT_3,
    HIT_4,
    SCALE,
    TASK,
    add_others,
    write,
    write_run,
)


@pytest.fixture
def results(tmp_path):
    for seed, (ours, theirs) in enumerate([(HIT_1, HIT_2), (HIT_2, HIT_4), (HIT_1, HIT_3)], 1):
        write(tmp_path, "ngplus", seed, ours, seconds_per_epoch=2.0 + 0.1 * seed)
        write(tmp_path, "sgd", seed, theirs)
    return tmp_path


def test_the_curve_is_the_median_and_the_range_over_seeds(results):
    runs = load_comparable(results, TASK, SCALE).by_optimizer()["sgd"]
    curve = summarise_curve(runs, lambda epoch: epoch.metric)
    assert curve.epochs.tolist() == [0, 1, 2, 3, 4]
    assert curve.seconds.tolist() == [0, 2, 4, 6, 8]
    columns = np.array([HIT_2, HIT_4, HIT_3])
    assert curve.median.tolist() == np.median(columns, axis=0).tolist()
    assert curve.low.tolist() == columns.min(axis=0).tolist()
    assert curve.high.tolist() == columns.max(axis=0).tolist()


def test_epochs_without_a_value_are_left_out(results):
    runs = load_comparable(results, TASK, SCALE).by_optimizer()["sgd"]
    assert summarise_curve(runs, lambda epoch: epoch.train_loss).epochs.tolist() == [1, 2, 3, 4]


def test_the_figure_shows_loss_and_metric_against_epochs_and_seconds_with_the_target(results):
    made = figure(load_comparable(results, TASK, SCALE))
    axes = made.axes
    assert [ax.get_xlabel() for ax in axes] == ["", "", "epochs", "seconds of training"]
    assert [axes[0].get_ylabel(), axes[2].get_ylabel()] == ["training loss", "test top1 (fraction)"]
    for ax in axes[2:]:
        (target,) = [line for line in ax.lines if line.get_linestyle() == "--"]
        assert target.get_ydata()[0] == 0.8
    assert legend_of(made) == ["sgd", "ngplus"]


def test_the_same_records_give_the_same_bytes(results):
    first = [path.read_bytes() for path in draw(results, TASK, SCALE)]
    second = [path.read_bytes() for path in draw(results, TASK, SCALE)]
    assert first == second


def test_the_files_are_an_svg_and_a_png(results):
    svg, png = draw(results, TASK, SCALE)
    text = svg.read_text()
    assert "<svg" in text
    assert "Fashion-MNIST, 3,600 embedded images" in text
    with Image.open(png) as image:
        assert image.size == (1440, 992)


def test_a_run_that_diverged_at_once_does_not_stop_the_figure(results):
    write(results, "lars", 1, [None], end="diverged")
    svg, _ = draw(results, TASK, SCALE)
    assert "<svg" in svg.read_text()


def test_the_legend_counts_the_runs_that_diverged(results):
    write(results, "sgd", 4, [0.1, None], end="diverged")
    assert legend_of(figure(load_comparable(results, TASK, SCALE))) == ["sgd (1 of 4 diverged)", "ngplus"]


def legend_of(made):
    (legend,) = made.legends
    return [text.get_text() for text in legend.get_texts()]


def test_no_runs_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        draw(tmp_path, TASK, SCALE)


def test_an_optimizer_keeps_its_colour_and_its_variants_differ_in_dashes():
    assert len(set(COLOURS.values())) == len(COLOURS)
    assert pick_colour("ngplus-adam") == pick_colour("ngplus")
    shown = ["ngplus", "ngplus-adam", "sgd"]
    assert pick_dashes("ngplus", shown) != pick_dashes("ngplus-adam", shown)
    assert pick_dashes("ngplus", shown) == pick_dashes("sgd", shown) == "solid"


def test_each_further_figure_has_a_row_of_its_own_with_its_unit(tmp_path):
    add_others(write(tmp_path, "adam", 1, HIT_1), "MAE/atom eV", [9, 3, 2, 1, 0.5])
    add_others(write(tmp_path, "sgd", 1, HIT_2), "AUC", [0.5, 0.6, 0.7, 0.8, None])
    made = figure(load_comparable(tmp_path, TASK, SCALE))
    assert [ax.get_ylabel() for ax in made.axes[::2]][2:] == ["test MAE/atom (eV)", "test AUC"]
    assert [ax.get_xlabel() for ax in made.axes[-2:]] == ["epochs", "seconds of training"]
    assert [line.get_ydata().tolist() for line in made.axes[-2].lines if len(line.get_ydata())] == [
        [0.5, 0.6, 0.7, 0.8]
    ]


@pytest.mark.parametrize(("last", "scale"), [(0.01, "log"), (0.8, "linear"), (0.0, "linear")])
def test_what_falls_by_factors_is_drawn_on_a_logarithmic_axis(tmp_path, last, scale):
    metric = {"name": "mae", "unit": "eV", "higher_is_better": False}
    write(tmp_path, "adam", 1, [50.0, 1.0, 0.9, 0.85, last], metric=metric, target=0.5)
    ax = figure(load_comparable(tmp_path, TASK, SCALE)).axes[2]
    assert ax.get_yscale() == scale
    low, high = ax.get_ylim()
    assert low < last
    assert 1.0 < high < 2.0


def test_a_metric_that_grows_is_drawn_on_a_linear_axis(results):
    assert figure(load_comparable(results, TASK, SCALE)).axes[2].get_yscale() == "linear"


def test_a_standard_error_is_no_curve_of_its_own(tmp_path):
    add_others(write(tmp_path, "adam", 1, HIT_1), "top1 standard error", [0.1, 0.1, 0.1, 0.1, 0.1])
    labels = [panel.label for panel in panels(load_comparable(tmp_path, TASK, SCALE))]
    assert labels == ["training loss", "test top1 (fraction)"]


def test_the_legend_names_another_device_than_the_references(results):
    for seed in (1, 2, 3):
        write(results, "ngplus", seed, HIT_1, device="another")
    assert legend_of(figure(load_comparable(results, TASK, SCALE))) == ["sgd", "ngplus (on another)"]


def test_a_legend_of_long_names_takes_fewer_columns_and_stays_inside_the_figure():
    made = Figure(figsize=(6.0, 3.0), layout="constrained")
    FigureCanvasAgg(made)
    ax = made.subplots()
    for number in range(6):
        ax.plot([0, 1], label=f"optimizer {number} (on a machine with a long name)")
    legend_below(made, ax)
    (legend,) = made.legends
    assert legend.get_window_extent().width <= made.bbox.width
    assert len(legend.get_texts()) == 6


def test_a_long_title_is_broken_and_stays_inside_the_figure(tmp_path):
    name = "Django's documentation, 273 pages, 1,680,887 tokens; an epoch is 100 batches"
    dataset = {"name": name, "sha256": "0" * 64, "licence": "MIT", "train_size": 1, "eval_size": 1}
    write_run(tmp_path, "adamw", 1, HIT_4, task="gpt-text", dataset=dataset)
    made = figure(load_comparable(tmp_path, "gpt-text", SCALE))
    title = made.get_suptitle()
    assert " ".join(title.split()) == f"gpt-text, scale {SCALE}: {name} (beyond the paper)"
    assert made._suptitle.get_window_extent().width <= made.bbox.width
