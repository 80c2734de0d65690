from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from schnetpack import properties
from schnetpack.nn import GaussianRBF
from torch import nn

from experiments.config.recipe import list_scales, load_recipe
from experiments.data_io.atoms.structures import Structures
from experiments.data_io.checksum import DataFileError
from experiments.dataclass_io import SettingsError, read_settings
from experiments.optimizers.registry import NGPlusSettings, find_entry
from experiments.tasks import TASKS
from experiments.tasks.schnet import materials_project, qm9
from experiments.tasks.schnet.schnet_task import RadialBasis, map_ahead
from experiments.tasks.schnet.structure_batches import TARGET
from ngplus.layers import find_layers
from tests.experiments.cases import molecules

MODEL = {"features": 8, "interactions": 2, "cutoff": 3.0, "gaussians": 6}
SIZES = {"batch_size": 20, "train_size": 90, "validation_size": 40, "test_size": 250}
NAMES = ("schnet-qm9", "schnet-matproj")


def task(name="schnet-qm9", data_dir=Path("nowhere"), **changes):
    settings = {"data": "embedded", "model": MODEL, **SIZES} | changes
    return TASKS[name](settings, scale="tiny", data_dir=data_dir)


@pytest.fixture(scope="module", params=NAMES)
def made(request):
    return task(request.param)


@pytest.fixture
def net(made):
    torch.manual_seed(1)
    return made.build_model().eval()


def sample_of(made):
    return (qm9 if made.name == "schnet-qm9" else materials_project).load_embedded().structures


def one_at_a_time(structures: Structures, net, k):
    """The model's output for one structure, in a batch of its own, its pairs found by hand."""
    part = slice(structures.starts[k], structures.starts[k + 1])
    positions = torch.from_numpy(structures.positions[part]).double()
    size = len(positions)
    reach = range(-3, 4) if structures.cells is not None else range(1)
    rows = []
    for shift in np.array(np.meshgrid(reach, reach, reach)).reshape(3, -1).T:
        offset = shift @ structures.cells[k] if structures.cells is not None else np.zeros(3)
        distance = (positions[None] - positions[:, None] + torch.from_numpy(offset)).norm(dim=2)
        rows += [(i, j, *offset) for i, j in (distance < 3.0).nonzero().tolist() if i != j or shift.any()]
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)
    inputs = {
        properties.Z: torch.from_numpy(structures.numbers[part]).long(),
        properties.R: positions.float(),
        properties.idx_m: torch.zeros(size, dtype=torch.long),
        properties.idx_i: table[:, 0].long(),
        properties.idx_j: table[:, 1].long(),
        properties.offsets: table[:, 2:].float(),
        properties.n_atoms: torch.tensor([size]),
    }
    return net(inputs)["energy"].item()


@torch.no_grad()
def test_loss_and_metric_are_those_of_single_structures(made, net):
    structures, split = sample_of(made), made._split
    target = structures.target - made.baseline(split.train)
    errors = [one_at_a_time(structures, net, k) - target[k] for k in split.validation]
    evaluation = made.evaluate(net, "validation")
    assert evaluation.loss == pytest.approx(np.mean(np.square(errors)), rel=1e-4)
    assert evaluation.metric == pytest.approx(np.mean(np.abs(errors)), rel=1e-4)


@torch.no_grad()
def test_the_training_loss_is_the_mean_squared_error_and_leaves_the_batch_as_it_was(made, net):
    batch = next(made.train_batches(0, seed=1))
    before = {key: value.clone() for key, value in batch.items()}
    loss = made.loss(net, batch)
    assert batch.keys() == before.keys()
    energies = net({key: value for key, value in before.items() if key != TARGET})["energy"]
    assert loss.item() == pytest.approx((energies - before[TARGET]).square().mean().item(), rel=1e-6)


def test_an_epoch_is_every_structure_once_up_to_the_incomplete_batch(made):
    batches = list(made.train_batches(0, seed=1))
    assert len(batches) == made.steps_per_epoch() == 4
    seen = torch.cat([batch[TARGET] for batch in batches]).tolist()
    known = made._residual[made._split.train].astype(np.float32).tolist()
    assert len(seen) == 80
    assert set(seen) <= set(known)


def test_batches_depend_on_seed_and_epoch_alone(made):
    def targets(epoch, seed, **part):
        return torch.cat([batch[TARGET] for batch in made.train_batches(epoch, seed, **part)]).tolist()

    assert targets(0, 1) == targets(0, 1)
    assert targets(0, 1) != targets(1, 1)
    assert targets(0, 1) != targets(0, 2)
    halves = [list(made.train_batches(0, 1, rank=rank, world_size=2)) for rank in (0, 1)]
    joint = [torch.cat([left[TARGET], right[TARGET]]).tolist() for left, right in zip(*halves, strict=True)]
    assert [value for part in joint for value in part] == targets(0, 1)


def test_initial_weights_depend_on_the_global_generator_only(made):
    def weights():
        torch.manual_seed(3)
        return torch.cat([parameter.flatten() for parameter in made.build_model().parameters()])

    assert torch.equal(weights(), weights())


def test_what_is_learnt_has_no_mean(made):
    residual = made._residual[made._split.train]
    sizes = sample_of(made).n_atoms[made._split.train] if made.name == "schnet-qm9" else 1
    assert np.mean(residual / sizes) == pytest.approx(0.0, abs=1e-9)


def test_a_linear_fit_leaves_less_than_the_free_atoms():
    left = [task(references=which)._residual[task()._split.test] for which in ("free-atoms", "linear-fit")]
    assert 0 < left[1].std() < left[0].std() / 2


def test_references_are_fitted_on_the_training_split_alone():
    few = task(references="linear-fit", train_size=90)
    many = task(references="linear-fit", train_size=900)
    assert few._split.test.tolist() == many._split.test.tolist()
    assert not np.allclose(few._residual, many._residual)


def test_no_formula_of_a_crystal_is_in_two_splits():
    made = task("schnet-matproj", train_size=None)
    counts = materials_project.load_embedded().structures.element_counts()
    reduced = counts // np.gcd.reduce(counts, axis=1, keepdims=True)
    sides = [
        {row.tobytes() for row in reduced[part]}
        for part in (made._split.train, made._split.validation, made._split.test)
    ]
    assert sum(map(len, sides)) == len(set.union(*sides))
    assert made.dataset.train_size + 40 + 250 == materials_project.EMBEDDED_SIZE


def test_the_tables_name_the_data_and_its_size(made):
    names = {"schnet-qm9": "QM9, embedded, 90 molecules", "schnet-matproj": "Materials Project, Faber's set, embedded"}
    assert made.dataset.name.startswith(names[made.name])
    assert (made.dataset.train_size, made.dataset.eval_size) == (90, 250)


# --- samples


def test_every_row_of_every_layer_has_its_structure(made):
    net, batch = made.build_model(), next(made.train_batches(0, seed=1))
    index = made.sample_index(batch)
    rows = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.register_forward_hook(lambda _, args, output, name=name: rows.update({name: len(args[0])}))
    made.loss(net, batch)
    assert rows.keys() == {layer.name.removesuffix(".weight") for layer in find_layers(net, 0)}
    for name, count in rows.items():
        structures = next(value for pattern, value in index.items() if fnmatch(name, pattern))
        assert len(structures) == count
        assert structures.max() < made.settings.batch_size
    pairs = batch[properties.idx_m][batch[properties.idx_j]]
    assert torch.equal(pairs, next(iter(index.values())))  # both atoms of a pair are of one structure


@pytest.mark.parametrize("samples", ["rows", "batch"])
def test_ngplus_lowers_the_loss(made, samples):
    torch.manual_seed(0)
    net = made.build_model()
    settings = {"lr": 1e-2, "damping": 0.17, "update_every": 2, "samples": samples}
    base = {"kind": "adam"}
    optimizer = find_entry("ngplus").build(net, read_settings(NGPlusSettings, settings | {"base": base}, "here"))
    losses = []
    for epoch in range(6):
        for batch in made.train_batches(epoch, seed=1):
            optimizer.sample_index = made.sample_index(batch)
            loss = made.loss(net, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) / 2


# --- the model


def test_the_radial_basis_is_schnetpacks_without_denormal_numbers():
    distances = torch.linspace(0, 5, 4001)
    ours, theirs = RadialBasis(50, 5.0)(distances), GaussianRBF(50, 5.0)(distances)
    assert (ours - theirs).abs().max() < 1e-20
    tiny = torch.finfo(torch.float32).tiny
    assert ((theirs > 0) & (theirs < tiny)).any()
    assert not ((ours > 0) & (ours < tiny)).any()


# --- loading ahead


def test_items_come_in_order_and_one_is_made_ahead():
    made = []

    def make(index):
        made.append(index)
        return index * 10

    items = map_ahead(make, iter(range(5)))
    assert list(islice(items, 2)) == [0, 10]
    items.close()
    assert made == [0, 1, 2]
    assert list(map_ahead(make, range(5))) == [0, 10, 20, 30, 40]
    assert list(map_ahead(make, [])) == []


def test_an_error_in_the_thread_reaches_the_loop():
    def make(index):
        raise ValueError(f"no {index}")

    with pytest.raises(ValueError, match="no 7"):
        list(map_ahead(make, [7]))


# --- errors


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0: must be at least 1"),
        ({"train_size": 10}, "train_size = 10: must hold one batch of 20"),
        ({"test_size": -1}, "test_size = -1: must be at least 0"),
        ({"test_size": 5000}, r"test_size \+ validation_size \+ train_size = 5130: there are [0-9]+ structures only"),
        ({"train_size": None, "test_size": 0, "batch_size": 4001}, "batch_size = 4001: must not exceed the"),
        ({"model": MODEL | {"cutoff": 0.1}}, "cutoff = 0.1: no two atoms"),
        ({"model": MODEL | {"cutoff": -1.0}}, "cutoff = -1.0: must be positive"),
        ({"model": MODEL | {"interactions": 0}}, "interactions = 0: must be at least 1"),
        ({"data": "elsewhere"}, "data = 'elsewhere': must be one of"),
        ({"colour": 1}, "colour = 1: unknown key"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(name, changes, message):
    with pytest.raises(SettingsError, match=rf"{name}/tiny, \[task\].*{message}"):
        task(name, **changes)


def test_an_empty_split_is_an_error(made):
    empty = task(made.name, validation_size=0)
    with pytest.raises(SettingsError, match="the validation split is empty: set validation_size"):
        empty.evaluate(empty.build_model(), "validation")


@pytest.mark.parametrize(("name", "target"), [("schnet-qm9", "data-qm9"), ("schnet-matproj", "data-matproj")])
def test_missing_data_is_an_error_that_says_how_to_get_it(name, target, tmp_path):
    with pytest.raises(DataFileError, match=f"run `make {target}`"):
        task(name, data_dir=tmp_path, data="package")


def test_a_database_is_read_and_its_neighbours_are_kept(tmp_path):
    molecules.write_database(molecules.molecules(40), tmp_path / "qm9" / "qm9.db", "energy_U0")
    sizes = {"batch_size": 4, "train_size": 20, "validation_size": 5, "test_size": 5}
    first = task(data_dir=tmp_path, data="database", **sizes)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    again = task(data_dir=tmp_path, data="database", **sizes)
    assert (tmp_path / "qm9" / "database-neighbours-3" / "centres.npy") in kept
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == kept
    batches = [next(each.train_batches(0, seed=1)) for each in (first, again)]
    assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])


# --- recipes


@pytest.mark.parametrize(("name", "scale"), [(name, scale) for name in NAMES for scale in list_scales(name)])
def test_recipes_can_be_read_and_say_tuned_and_reported_on_different_structures(name, scale):
    recipe = load_recipe(name, scale)
    assert {"adam", "ngplus-adam"} <= recipe.optimizers.keys()
    if scale != "paper":
        assert recipe.run.report_split == "test"
        assert recipe.task_settings["validation_size"] > 0
