"""NG+ where schnetpack's users train: under Lightning, and with ``spktrain``."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from schnetpack import AtomisticTask
from schnetpack.atomistic import Atomwise, PairwiseDistances
from schnetpack.data import AtomsDataModule, AtomsLoader
from schnetpack.data.splitting import SplittingStrategy
from schnetpack.model import NeuralNetworkPotential
from schnetpack.nn import CosineCutoff, GaussianRBF
from schnetpack.representation import SchNet
from schnetpack.task import ModelOutput
from schnetpack.transform import CastTo32, MatScipyNeighborList, RemoveOffsets
from torchmetrics.regression import MeanAbsoluteError

from experiments.integrations.schnetpack_rows import sample_index
from experiments.integrations.schnetpack_task import NGPlusTask
from experiments.records.provenance import REPOSITORY
from ngplus import NGPlus
from tests.experiments.cases import molecules
from tests.pages import DOCS, find_code, find_commands

# Lightning's, of its own code and of a model that schnetpack's task keeps among its hyperparameters.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Attribute 'model' is an instance of `nn.Module`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
]

NGPLUS = {"base": torch.optim.Adam, "lr": 1e-3, "damping": 0.17, "update_every": 2}


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "some.db"
    molecules.write_database(molecules.molecules(30), path, "energy_U0")
    return path


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    """Schnetpack leaves lock files where it works."""
    monkeypatch.chdir(tmp_path)


class FirstOnes(SplittingStrategy):
    """Splits in the database's order: two loops would draw different random numbers."""

    def split(self, dataset, *sizes):
        return [part.tolist() for part in np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])]


class Unshuffled(AtomsDataModule):
    def train_dataloader(self):
        return AtomsLoader(self.train_dataset, batch_size=self.batch_size)


def data(database):
    transforms = [RemoveOffsets("energy_U0", remove_mean=True), MatScipyNeighborList(cutoff=4.0), CastTo32()]
    return Unshuffled(
        str(database),
        batch_size=8,
        num_train=16,
        num_val=4,
        num_test=4,
        split_file=None,
        splitting=FirstOnes(),
        transforms=transforms,
        num_workers=0,
        pin_memory=False,
    )


def model():
    torch.manual_seed(0)
    return NeuralNetworkPotential(
        representation=SchNet(8, 2, GaussianRBF(6, 4.0), CosineCutoff(4.0)),
        input_modules=[PairwiseDistances()],
        output_modules=[Atomwise(8, output_key="energy_U0")],
    )


def task(cls=NGPlusTask, optimizer_cls=NGPlus, **changes):
    output = ModelOutput("energy_U0", loss_fn=torch.nn.MSELoss(), metrics={"mae": MeanAbsoluteError()})
    return cls(model(), [output], optimizer_cls=optimizer_cls, optimizer_args=NGPLUS | changes)


def fit(task, database, folder, **options):
    pl.seed_everything(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"max_epochs": 3, "enable_checkpointing": False} | options),
    )
    trainer.fit(task, datamodule=data(database))
    return trainer


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def plain_loop(database, epochs, samples):
    """The same training by hand."""
    pl.seed_everything(0)
    loaded = data(database)
    loaded.setup()
    net = model()
    net.initialize_transforms(loaded)
    optimizer = NGPlus(net, **NGPLUS, samples=samples)
    for _ in range(epochs):
        for batch in loaded.train_dataloader():
            optimizer.sample_index = sample_index(batch)
            # The model writes its output into the dictionary it is given.
            torch.nn.functional.mse_loss(net(dict(batch))["energy_U0"], batch["energy_U0"]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return net


@pytest.mark.parametrize("samples", ["rows", "batch"])
def test_lightning_trains_like_a_plain_loop(samples, database, tmp_path):
    made = task(samples=samples)
    fit(made, database, tmp_path)
    torch.testing.assert_close(weights(made.model), weights(plain_loop(database, 3, samples)), rtol=1e-5, atol=1e-6)
    assert not torch.equal(weights(made.model), weights(model()))


def test_molecules_as_samples_make_other_steps_than_rows(database, tmp_path):
    rows, molecule = (plain_loop(database, 1, samples) for samples in ("rows", "batch"))
    assert (weights(rows) - weights(molecule)).abs().max() > 1e-5


def test_other_optimizers_train_as_in_schnetpacks_own_task(database, tmp_path):
    output = ModelOutput("energy_U0", loss_fn=torch.nn.MSELoss(), metrics={})
    trained = []
    for cls in (NGPlusTask, AtomisticTask):
        made = cls(model(), [output], optimizer_cls=torch.optim.SGD, optimizer_args={"lr": 1e-4})
        fit(made, database, tmp_path)
        trained.append(weights(made.model))
    assert torch.equal(*trained)


def test_schedulers_see_the_optimizer_and_the_task_keeps_its_class(database, tmp_path):
    made = task()
    made.scheduler_cls, made.scheduler_kwargs = torch.optim.lr_scheduler.StepLR, {"step_size": 1, "gamma": 0.5}
    trainer = fit(made, database, tmp_path)
    assert made.optimizer_cls is NGPlus
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(NGPLUS["lr"] / 8)


def test_a_checkpoint_is_gone_on_from(database, tmp_path):
    whole = task()
    fit(whole, database, tmp_path, max_epochs=4)
    first = fit(task(), database, tmp_path, max_epochs=2)
    first.save_checkpoint("half.ckpt")
    second = task()
    trainer = pl.Trainer(accelerator="cpu", max_epochs=4, logger=False, enable_checkpointing=False)
    trainer.fit(second, datamodule=data(database), ckpt_path="half.ckpt", weights_only=False)
    torch.testing.assert_close(weights(second.model), weights(whole.model), rtol=0, atol=0)


def test_the_snippet_of_the_page_trains(database, tmp_path):
    """Its hundred epochs are three, on a small model and database."""
    (snippet,) = find_code(DOCS / "schnetpack.md", "python")
    output = ModelOutput("energy_U0", loss_fn=torch.nn.MSELoss(), metrics={"mae": MeanAbsoluteError()})
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainers = SimpleNamespace(
        Trainer=lambda max_epochs: pl.Trainer(max_epochs=max_epochs // 33, enable_checkpointing=False, **quiet)
    )
    names = {"model": model(), "outputs": [output], "data": data(database), "pytorch_lightning": trainers}
    exec(snippet, names)
    assert not torch.equal(weights(names["task"].model), weights(model()))


def own_database(path):
    """What the page says to change for a database of one's own, filled in, and that it has no energies of atoms."""
    text = (DOCS / "schnetpack.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"Your own database: `([^`]*)`", text)
    (without_atoms,) = re.findall(r"Without energies of\s+single atoms in it, also `([^`]*)`", text)
    filled = line.replace("/path/to/my.db", str(path)).replace("=…", "={}").format(16, 4, 8)
    return [*filled.split(), *without_atoms.split()]


@pytest.mark.slow
def test_spktrain_trains_as_the_page_says(database, tmp_path):
    """From another folder, on a database of one's own, with a seed; smaller and for two epochs."""
    (command,) = (each for each in find_commands(DOCS / "schnetpack.md") if each.words[0] == "spktrain")
    words = [word.replace("=experiments/", f"={REPOSITORY}/experiments/") for word in command.words[1:]]
    smaller = ["model.representation.n_atom_basis=8", "model.representation.n_interactions=1", "trainer.max_epochs=2"]
    here = ["data.num_workers=0", "+data.pin_memory=False", "trainer.accelerator=cpu", "logger=csv", "run.id=it"]
    environment = os.environ | dict(command.environment) | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [Path(sys.executable).with_name("spktrain"), *words, *own_database(database), "++seed=1", *smaller, *here],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "runs" / "it"
    assert (folder / "best_model").is_file()
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False, map_location="cpu")
    state = checkpoint["optimizer_states"][0]
    assert "damping" in state["param_groups"][0]
