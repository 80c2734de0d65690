"""Challenges on the template's task, all in one process."""

import contextlib
import os

import pytest

from experiments.challenge import asking, conduct
from experiments.challenge.folder import Folder
from experiments.challenge.new_task import write_task

OPTIMIZERS = """
import torch

class Sign(torch.optim.Optimizer):
    def __init__(self, params, lr: float = 0.003, decay: float = 0.0):
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(1 - group["lr"] * group["decay"]).sub_(parameter.grad.sign(), alpha=group["lr"])

class Poison(Sign):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.fill_(float("nan"))

class Hidden(Sign):
    '''What it counts is not in its state dict.'''

    count = 0

    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            group["decay"] = 1 / self.count
        super().step()

class Refusing(Sign):
    def step(self, closure=None):
        if closure is None:
            raise RuntimeError("I need a closure, and no sparse gradients")

def momentum(model, lr=0.05, momentum=0.9):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
"""


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a task in ``spirals`` and optimizers in ``mine.py``."""
    folder = tmp_path_factory.mktemp("challenges")
    write_task("spirals", folder / "spirals")
    recipe = folder / "spirals" / "spirals" / "recipes" / "spirals" / "tiny.toml"
    recipe.write_text(recipe.read_text().replace("epochs = { value = 6", "epochs = { value = 3"))
    (folder / "mine.py").write_text(OPTIMIZERS)
    return folder


@pytest.fixture(scope="session")
def task(place):
    return f"{place / 'spirals' / 'spirals' / 'spirals.py'}:Spirals"


def run_here(works, **_):
    """As `run_in_processes`, one after the other in this process."""
    failed = {}
    for work in works:
        try:
            # What a process says goes nowhere here.
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
                work.run_in_one_line()
        except SystemExit as error:
            failed[work.name] = f"failed with exit status {error.code}"
    return failed


@pytest.fixture(scope="session")
def challenge(place, task):
    """Conduct a challenge of an optimizer in ``mine.py``, or from elsewhere; returns its folder and the problems."""

    def conduct_one(optimizer, name, *, root=None, path=None, settings=(), search=(), workers=1, **given):
        spec = f"{place / 'mine.py'}:{optimizer}" if optimizer and ":" not in optimizer else optimizer
        asked = {
            "tasks": [task],
            "trials": 6,
            "seeds": [1, 2],
            "baselines": ["adam"],
            **given,
            "optimizer": spec,
            "name": name,
        }
        question, file = asking.ask(asked, settings=settings, search=search, path=path)
        folder = Folder((root or place / "build") / question.name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(conduct, "run_in_processes", run_here)
            return folder, conduct.conduct(question, folder, conduct.Options(device="cpu", workers=workers), file)

    return conduct_one


@pytest.fixture(scope="session")
def sign(challenge):
    """The folder of a challenge that went well; read it only."""
    folder, problems = challenge("Sign", "sign")
    assert problems == []
    return folder
