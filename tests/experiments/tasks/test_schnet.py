"""SchNet on made-up molecules and crystals: batches, errors and targets, and what NG+ sees of schnetpack's model."""

import numpy as np
import pytest
import torch
from molecules import crystals, joined, molecules
from schnetpack import properties
from schnetpack.nn import GaussianRBF

from experiments.data import materials, qm9
from experiments.data.structure_batches import TARGET, assemble
from experiments.data.structure_cache import StructureSet
from experiments.data.structure_splits import composition_groups, draw_order, one_a_group
from experiments.settings import SettingsError
from experiments.tasks import TASKS
from experiments.tasks._schnet import RadialBasis, ahead
from ngplus import NGPlus

MODEL = {"features": 6, "interactions": 2, "cutoff": 4.0, "gaussians": 5}
SETTINGS = {
    "schnet-qm9": {"batch_size": 4, "validation_size": 5, "test_size": 7},
    "schnet-matproj": {"batch_size": 4, "validation_size": 4, "test_size": 6},
}
DAMPING = 0.3
NAMES = list(SETTINGS)


def structure_set(entries, grouping):
    structures = joined(entries)
    groups = grouping(structures)
    return StructureSet(
        name="made up", structures=structures, order=draw_order(groups), groups=groups, sha256="0", licence="none",
        folder=None,
    )  # fmt: skip


@pytest.fixture
def make(monkeypatch, tmp_path):
    """A task on 30 made-up molecules or 24 crystals, with other settings."""
    monkeypatch.setattr(qm9, "load_embedded", lambda: structure_set(molecules(30), one_a_group))
    monkeypatch.setattr(materials, "load_embedded", lambda: structure_set(spread(crystals(24)), composition_groups))
    return lambda name, **changed: TASKS[name](
        {"data": "embedded", "model": MODEL} | SETTINGS[name] | changed, scale="tiny", data_dir=tmp_path
    )


def spread(entries):
    """The crystals with metals of many elements, so that there are more formulas than four."""
    for k, entry in enumerate(entries):
        entry.numbers[0] = 20 + k // 2
    return entries


def model_of(task):
    torch.manual_seed(0)
    model = task.build_model().double()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero at first, where a wrong column would not show
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def double(batch):
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def first_batch(task):
    """One batch in float64; targets of the size of one, lest the damping of NG+ be lost beside its curvature."""
    batch = double(next(task.train_batches(0, 0)))
    return batch | {TARGET: batch[TARGET] / batch[TARGET].abs().max()}


def one_at_a_time(batch):
    """The batch's structures as batches of one, cut out by hand."""
    for k in range(len(batch[TARGET])):
        atoms = (batch[properties.idx_m] == k).nonzero().ravel()
        pairs = (batch[properties.idx_m][batch[properties.idx_i]] == k).nonzero().ravel()
        yield {
            properties.Z: batch[properties.Z][atoms],
            properties.R: batch[properties.R][atoms],
            properties.idx_m: torch.zeros_like(atoms),
            properties.idx_i: batch[properties.idx_i][pairs] - atoms[0],
            properties.idx_j: batch[properties.idx_j][pairs] - atoms[0],
            properties.offsets: batch[properties.offsets][pairs],
            properties.n_atoms: batch[properties.n_atoms][k : k + 1],
            TARGET: batch[TARGET][k : k + 1],
        }


# --- batches


@pytest.mark.parametrize("name", NAMES)
def test_batches_depend_on_seed_and_epoch_alone(make, name):
    task = make(name)
    torch.manual_seed(1)
    first = list(task.train_batches(3, 5))
    torch.manual_seed(2)
    again = list(make(name).train_batches(3, 5))
    assert len(first) == task.steps_per_epoch() == len(again)
    for one, two in zip(first, again, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
    for epoch, seed in ((4, 5), (3, 6)):
        assert not torch.equal(targets(task.train_batches(epoch, seed)), targets(first))


def targets(batches):
    return torch.cat([batch[TARGET] for batch in batches])


@pytest.mark.parametrize("name", NAMES)
def test_an_epoch_holds_every_training_structure_once_but_for_the_incomplete_batch(make, name):
    task = make(name)
    seen = targets(task.train_batches(0, 0)).tolist()
    assert len(set(seen)) == len(seen) == task.dataset.train_size // 4 * 4
    assert task.dataset.train_size == {"schnet-qm9": 18, "schnet-matproj": 14}[name]


def test_two_processes_share_the_batches_of_one(make):
    task = make("schnet-qm9")
    joint = list(task.train_batches(1, 2))
    parts = [list(task.train_batches(1, 2, rank=rank, world_size=2)) for rank in (0, 1)]
    for batch, one, two in zip(joint, *parts, strict=True):
        assert torch.equal(batch[TARGET], torch.cat([one[TARGET], two[TARGET]]))


def test_the_next_item_is_made_ahead_in_order_and_its_error_arrives():
    made = []

    def make(k):
        made.append(k)
        return 10 // k

    items = ahead(make, [5, 2, 1, 0])
    assert [next(items), next(items), next(items)] == [2, 5, 10]
    with pytest.raises(ZeroDivisionError):
        next(items)
    assert made == [5, 2, 1, 0]
    assert list(ahead(make, [])) == []


# --- targets and errors


def test_molecules_are_learnt_without_their_free_atoms_and_the_mean_binding_energy(make):
    task = make("schnet-qm9")
    structures, train = task._structures, task._split.train
    bare = [
        sum(qm9.ATOM_ENERGIES[int(z)] * qm9.HARTREE for z in structures.select(np.array([k])).numbers)
        for k in range(30)
    ]
    binding = structures.target - bare
    mean = np.mean([binding[k] / structures.n_atoms[k] for k in train])
    expected = binding - mean * structures.n_atoms
    found = double(assemble(structures, task._neighbours, task._residual, train))[TARGET].numpy()
    np.testing.assert_allclose(found, expected[train], rtol=1e-6, atol=1e-4)


def test_references_fitted_on_the_training_split_leave_a_residual_with_no_part_by_element(make):
    task = make("schnet-qm9", references="linear-fit")
    train = task._split.train
    counts = task._structures.select(train).element_counts()
    assert np.abs(counts.T @ task._residual[train]).max() < 1e-6 * np.abs(task._structures.target).max()
    assert np.abs(task._residual[task._split.test]).max() > 1e-3


def test_crystals_are_learnt_beside_the_training_mean(make):
    task = make("schnet-matproj")
    assert task._residual[task._split.train].mean() == pytest.approx(0, abs=1e-12)
    spread = task._structures.target - task._residual
    assert spread == pytest.approx(np.full(24, task._structures.target[task._split.train].mean()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_errors_are_those_of_one_structure_after_another(make, name, split):
    task = make(name)
    model = model_of(task).float()
    indices = getattr(task._split, split)
    batch = assemble(task._structures, task._neighbours, task._residual, indices)
    errors = []
    for one, target in zip(one_at_a_time(batch), task._residual[indices], strict=True):
        inputs = {key: value for key, value in one.items() if key != TARGET}
        errors.append(model(inputs)["energy"].item() - target)
    with torch.no_grad():
        found = task.evaluate(model.eval(), split)
    assert found.loss == pytest.approx(np.mean(np.square(errors)), rel=1e-5)
    assert found.metric == pytest.approx(np.mean(np.abs(errors)), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_can_be_learnt_by_heart(make, name):
    task = make(name)
    model, batch = model_of(task), first_batch(task)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        loss = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_the_radial_basis_is_schnetpacks_but_for_numbers_too_small_to_matter():
    distances = torch.linspace(0, 12, 500)
    found, whole = RadialBasis(50, 10.0)(distances), GaussianRBF(50, 10.0)(distances)
    tiny = whole < 1e-20
    assert tiny.any()
    assert torch.equal(found[~tiny], whole[~tiny])
    assert not found[tiny].any()


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"train_size": 19}, "train_size = 31: there are 30 structures only"),
        ({"train_size": 2}, "train_size = 2: must hold one batch of 4"),
        ({"batch_size": 19}, "batch_size = 19: must not exceed the 18 training structures"),
        ({"batch_size": 0}, "batch_size = 0: must be at least 1"),
        ({"test_size": -1}, "test_size = -1: must be at least 0"),
        ({"model": MODEL | {"cutoff": 0.0}}, "cutoff = 0.0: must be positive"),
        ({"model": MODEL | {"cutoff": 0.001}}, "cutoff = 0.001: must be at least 0.1 Å"),
        ({"model": MODEL | {"interactions": 0}}, "interactions = 0: must be at least 1"),
        ({"references": "none"}, "references"),
        ({"data": "elsewhere"}, "data"),
        ({"width": 3}, "width"),
    ],
)
def test_settings_that_do_not_fit_are_named_with_the_recipe(make, changed, complaint):
    with pytest.raises(SettingsError, match=complaint) as raised:
        make("schnet-qm9", **changed)
    assert "schnet-qm9/tiny, [task]" in str(raised.value)


def test_an_empty_split_is_not_evaluated(make):
    task = make("schnet-qm9", test_size=0)
    with pytest.raises(ValueError, match="the test split is empty: set test_size"):
        task.evaluate(task.build_model(), "test")


# --- what NG+ sees


def layers_of(model):
    return {layer.name: (layer.weight, layer.bias) for layer in NGPlus(model, lr=1.0, damping=1.0)._layers}


def matrix(weight, bias):
    return weight.grad.clone() if bias is None else torch.cat([weight.grad, bias.grad[:, None]], dim=1)


def solved(G, samples):
    """(λI + L)⁻¹G of (6), or with R, from the samples' gradients: a dense solve."""
    m, n = G.shape
    moment = sum(g @ g.T if m <= n else g.T @ g for g in samples) / len(samples)
    damped = moment + DAMPING * torch.eye(len(moment), dtype=G.dtype)
    return torch.linalg.solve(damped, G) if m <= n else torch.linalg.solve(damped, G.T).T


def directions(task, model, batch, samples):
    """What a step of NG+ leaves in the gradients, by layer."""
    optimizer = NGPlus(model, lr=1e-9, damping=DAMPING, update_every=1, samples=samples)
    optimizer.sample_index = task.sample_index(batch)
    task.loss(model, batch).backward()
    optimizer.step()
    assert set(optimizer.curvature) == set(layers_of(model))
    return {name: matrix(*layer) for name, layer in layers_of(model).items()}


def assert_close(found, expected):
    assert set(found) == set(expected)
    for name, D in expected.items():
        assert D.norm() > 0
        assert (found[name] - D).norm() <= 1e-9 * D.norm(), name


@pytest.mark.parametrize("name", NAMES)
def test_a_structure_as_sample_is_the_gradient_of_that_structure_alone(make, name):
    task = make(name)
    model, batch = model_of(task), first_batch(task)
    samples = {layer: [] for layer in layers_of(model)}
    for one in one_at_a_time(batch):
        model.zero_grad()
        for parameter in model.parameters():  # a lone atom leaves the filters without a gradient
            parameter.grad = torch.zeros_like(parameter)
        task.loss(model, one).backward()
        for layer, own in layers_of(model).items():
            samples[layer].append(matrix(*own))
    model.zero_grad()
    expected = {layer: solved(sum(own) / len(own), own) for layer, own in samples.items()}
    assert_close(directions(task, model, batch, "batch"), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_as_sample_is_what_the_loss_says_through_that_row_alone(make, name):
    """Filters have a row a pair, all other layers a row an atom; of the mean loss its gradient is taken N times."""
    task = make(name)
    model, batch = model_of(task), first_batch(task)
    rows = {layer: rows_of(task, model, batch, layer) for layer in layers_of(model)}
    atoms, pairs = len(batch[properties.Z]), len(batch[properties.idx_i])
    assert {len(own) for own in rows.values()} == {atoms, pairs}
    assert all((len(own) == pairs) == ("filter_network" in layer) for layer, own in rows.items())
    expected = {layer: solved(sum(own), [len(own) * row for row in own]) for layer, own in rows.items()}
    model.zero_grad()
    assert_close(directions(task, model, batch, "rows"), expected)


def rows_of(task, model, batch, layer):
    """The gradient of the layer through each row of its output, the other rows cut off the graph."""
    module, found, count = model.get_submodule(layer.removesuffix(".weight")), [], 1
    while len(found) < count:
        kept = len(found)

        def only(_module, _inputs, output, kept=kept):
            nonlocal count
            count = len(output)
            return torch.cat([output[:kept].detach(), output[kept : kept + 1], output[kept + 1 :].detach()])

        handle = module.register_forward_hook(only)
        model.zero_grad()
        task.loss(model, batch).backward()
        handle.remove()
        found.append(matrix(*layers_of(model)[layer]))
    return found


def test_a_batch_with_lone_atoms_has_finite_steps(make):
    task = make("schnet-qm9")
    lone = task._structures.n_atoms == 1
    chosen = np.concatenate([np.flatnonzero(lone)[:2], np.flatnonzero(~lone)[:2]])
    batch = double(assemble(task._structures, task._neighbours, task._residual, chosen))
    for samples in ("rows", "batch"):
        found = directions(task, model_of(task), batch, samples)
        assert all(D.isfinite().all() for D in found.values())
