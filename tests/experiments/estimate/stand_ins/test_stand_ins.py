import numpy as np
import pytest
import torch

from experiments.config.recipe import load_recipe
from experiments.data_io.atoms.neighbours import find_neighbours
from experiments.data_io.atoms.structures import Structures
from experiments.estimate.batches import load_task_or_stand_in, parameter_mib
from experiments.estimate.stand_ins import STAND_INS
from experiments.estimate.stand_ins.made_up_structures import supercells
from experiments.tasks import TASKS
from experiments.tasks.schnet import materials_project

# Batches of an epoch of the paper's data, by its own numbers; beyond the paper, of the recipe's.
STEPS = {
    "gpt-text": 40_000,  # of nanoGPT's 600,000 · 40 batches, a 600th
    "resnet50-imagenet": 1_281_167 // 256,
    "schnet-qm9": 117_031 // 100,
    "schnet-matproj": 125_397 // 32,
    "dlrm-criteo": (45_840_617 - 45_840_617 // 7) // 128 // 4,
}


@pytest.fixture
def stand_in(tmp_path):
    """A task of the paper's scale where there are no data, its largest parts made small."""

    def make(name, *overrides):
        task, made_up = load_task_or_stand_in(load_recipe(name, "paper", overrides=overrides), tmp_path)
        assert made_up
        assert task.made_up in made_up
        return task

    return make


@pytest.mark.parametrize("name", STEPS)
def test_an_epoch_has_the_steps_of_the_papers_data(stand_in, name):
    assert stand_in(name).steps_per_epoch() == STEPS[name]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        (
            "gpt-text",
            ("task.batch_size=2", "task.context=16", "task.model.layers=1", "task.model.dim=24"),
        ),
        ("resnet50-imagenet", ("task.batch_size=2", "task.image_size=32")),
        ("schnet-qm9", ("task.batch_size=2",)),
        ("schnet-matproj", ("task.batch_size=2",)),
        ("dlrm-criteo", ("task.batch_size=2", "task.hash_rows=100")),
        ("transformer-iwslt14", ("task.max_tokens=200", "task.model.layers=1")),
    ],
)
def test_its_batches_go_through_the_model_and_back(stand_in, name, overrides):
    task = stand_in(name, *overrides)
    assert parameter_mib(task) >= 0
    model, batches = task.build_model(), task.train_batches(0, 0)
    for batch in (next(batches), next(batches)):
        loss = task.loss(model, task.to_device(batch, "cpu"))
        assert torch.isfinite(loss)
    loss.backward()


def test_processes_share_a_batch_of_random_tokens(stand_in):
    task = stand_in("gpt-text", "task.batch_size=4", "task.context=16")
    whole = next(task.train_batches(1, 0))[0]
    parts = [next(task.train_batches(1, 0, rank=rank, world_size=2))[0] for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole, next(task.train_batches(0, 0))[0])


def test_there_is_one_for_whatever_the_paper_scale_asks_for():
    for name in TASKS:
        assert (name, load_recipe(name, "paper").task_settings["data"]) in STAND_INS


def test_the_transformers_batches_hold_the_tokens_that_fairseq_counts(stand_in):
    task = stand_in("transformer-iwslt14", "task.model.layers=1")
    fullest = 160_239 * 4_035_591 / 160_239 / 4096  # no padding, no batch with room left
    assert fullest < task.steps_per_epoch() < 1.25 * fullest
    batch = next(task.train_batches(0, 0))
    assert batch["net_input"]["src_tokens"].numel() <= 4096
    assert batch["net_input"]["src_tokens"].max() < 8_848
    assert batch["target"].max() < 6_632


def test_the_tables_have_the_rows_of_criteo_kaggle():
    with torch.device("meta"):
        recipe = load_recipe("dlrm-criteo", "paper")
        model = STAND_INS["dlrm-criteo", "criteo"](recipe.task_settings, scale="paper").build_model()
    assert sum(table.num_embeddings for table in model.tables) == 33_762_577 + 26  # each one more, as the task has it
    assert all(table.sparse for table in model.tables)


def test_hashed_tables_are_estimated_as_long_as_a_run_has_them():
    with torch.device("meta"):
        recipe = load_recipe("dlrm-criteo", "paper", overrides=("task.hash_rows=10000000",))
        model = STAND_INS["dlrm-criteo", "criteo"](recipe.task_settings, scale="paper").build_model()
    assert sum(table.num_embeddings for table in model.tables) == 33_631_350


def test_a_supercell_has_the_surroundings_of_its_crystal():
    structures = materials_project.load_embedded().structures.select(np.arange(20))
    larger = supercells(structures, 40)
    assert np.abs(larger.n_atoms - 40).max() <= structures.n_atoms.max() / 2
    small, large = (find_neighbours(each, 4.0) for each in (structures, larger))
    times = larger.n_atoms // structures.n_atoms
    np.testing.assert_array_equal(np.diff(large.starts), times * np.diff(small.starts))


def test_a_crystal_larger_than_asked_for_stays_as_it_is():
    one = Structures(
        numbers=np.array([1, 2], np.uint8),
        positions=np.array([[0, 0, 0], [1, 1, 1]], np.float32),
        starts=np.array([0, 2]),
        target=np.zeros(1),
        cells=3 * np.eye(3)[None],
    )
    same = supercells(one, 1)
    np.testing.assert_array_equal(same.positions, one.positions)
    np.testing.assert_array_equal(same.cells, one.cells)
