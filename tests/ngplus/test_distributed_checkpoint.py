"""Saving and loading by `torch.distributed.checkpoint`: entries of a state, filling in, and resuming."""

import copy
import functools
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.optim import SGD, Adagrad, Adam

from ngplus import NGPlus
from ngplus.baselines import KFAC, SENG, Shampoo
from ngplus.solvers.sketched import SketchedInverse
from tests.ngplus.cases import mlp_with_norm, parameters_equal, train

SETTINGS = {
    "sgd": {"base": SGD},
    "momentum": {"base": SGD, "momentum": 0.9},
    "adam": {"base": Adam},
    "adagrad": {"base": Adagrad},  # which has a state before its first step
    "ema": {"base": Adam, "ema": 0.7, "block_size": 4},
    "low rank": {"base": SGD, "solver": "low_rank", "max_samples": 2},
    "sketched": {"base": Adam, "solver": "sketched", "sketch_size": 2},
    "sketched gradients": {"base": Adam, "solver": "sketched", "sketch_size": 2, "curvature": "mini_batch"},
    "mini-batch": {"base": SGD, "curvature": "mini_batch", "ema": 0.5},
    "K-FAC": {"kind": KFAC, "base": SGD},
    "Shampoo": {"kind": Shampoo, "base": SGD},
}
FORMS = {"plain": StateDictOptions(), "flattened": StateDictOptions(flatten_optimizer_state_dict=True)}


def optimizer_for(model, settings):
    options = dict(SETTINGS[settings])
    return options.pop("kind", NGPlus)(model, lr=0.01, damping=0.3, update_every=3, **options)


class App(dcp.stateful.Stateful):
    """What torch's tutorial saves: an object that gets the state dicts of a model and its optimizer."""

    def __init__(self, model, optimizer, options):
        self.model, self.optimizer, self.options = model, optimizer, options

    def state_dict(self):
        model, optimizer = get_state_dict(self.model, self.optimizer, options=self.options)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state):
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=self.options,
        )


def handed_over(app, folder):
    """Each way saves an app, and returns what loads it into another."""
    state = copy.deepcopy(app.state_dict())
    return lambda fresh: fresh.load_state_dict(copy.deepcopy(state))


def through_files(app, folder):
    save(app.state_dict(), folder)

    def into(fresh):
        filled = fresh.state_dict()  # of an optimizer that may have no state yet
        load(filled, folder)
        fresh.load_state_dict(filled)

    return into


def as_an_application(app, folder):
    save({"app": app}, folder)
    return lambda fresh: load({"app": fresh}, folder)


def save(state, folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")  # that there is one process
        dcp.save(state, checkpoint_id=folder)


def load(state, folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        dcp.load(state, checkpoint_id=folder)


WAYS = [handed_over, through_files, as_an_application]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_it_resumes_to_the_bit_from_any_step(settings, way, form, tmp_path):
    """Into an optimizer that has made no step, and into one that has."""
    whole, model = after_seven_steps(settings), mlp_with_norm()
    optimizer = optimizer_for(model, settings)
    for stop in (1, 2, 3, 4):
        train(model, optimizer, [stop - 1])
        into = way(App(model, optimizer, FORMS[form]), tmp_path / str(stop))
        for made in (0, 2):
            other = mlp_with_norm(seed=5)
            resumed = optimizer_for(other, settings)
            train(other, resumed, range(20, 20 + made))
            into(App(other, resumed, FORMS[form]))
            train(other, resumed, range(stop, 7))
            assert parameters_equal(other, whole), (stop, made)
    train(model, optimizer, range(4, 7))
    assert parameters_equal(model, whole)  # saving has changed nothing


@functools.cache
def after_seven_steps(settings):
    """Of which those of number 0, 3 and 6 are curvature steps."""
    model = mlp_with_norm()
    train(model, optimizer_for(model, settings), range(7))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", ["adam", "low rank", "sketched", "K-FAC"])
def test_it_resumes_to_the_bit_in_other_precisions(settings, dtype, tmp_path):
    model, other = mlp_with_norm(dtype), mlp_with_norm(dtype, seed=5)
    optimizer, resumed = optimizer_for(model, settings), optimizer_for(other, settings)
    train(model, optimizer, range(4))
    through_files(App(model, optimizer, FORMS["plain"]), tmp_path)(App(other, resumed, FORMS["plain"]))
    train(model, optimizer, range(4, 8))
    train(other, resumed, range(4, 8))
    assert parameters_equal(model, other)


@pytest.mark.parametrize("settings", ["sgd", "adam", "low rank"])
def test_files_that_were_converted_to_one_of_torch_save_resume_to_the_bit(settings, tmp_path):
    """Converting drops dictionaries that are empty, as SGD's state of a bias is."""
    model, other = mlp_with_norm(), mlp_with_norm(seed=5)
    optimizer, resumed = optimizer_for(model, settings), optimizer_for(other, settings)
    train(model, optimizer, range(4))
    save(App(model, optimizer, FORMS["plain"]).state_dict(), tmp_path / "files")
    dcp_to_torch_save(tmp_path / "files", tmp_path / "file.pt")
    App(other, resumed, FORMS["plain"]).load_state_dict(torch.load(tmp_path / "file.pt", weights_only=True))
    train(model, optimizer, range(4, 8))
    train(other, resumed, range(4, 8))
    assert parameters_equal(model, other)


@pytest.mark.parametrize("form", FORMS)
def test_a_state_is_saved_under_the_names_of_the_parameters(form):
    model = mlp_with_norm()
    optimizer = optimizer_for(model, "adam")
    train(model, optimizer, range(2))
    state = get_optimizer_state_dict(model, optimizer, options=FORMS[form])
    inverse = optimizer.curvature["3.weight"].tensors()[0]
    if form == "plain":
        assert torch.equal(state["state"]["3.weight"]["ngplus_inverse0"], inverse)
        assert state["param_groups"][0]["ngplus"]["steps"] == 2
    else:
        assert torch.equal(state["state.3.weight.ngplus_inverse0"], inverse)
        assert state["param_groups.3.weight.ngplus"]["steps"] == 2


# Asking an optimizer that has made no step -------------------------------------------------------------------------


@pytest.mark.parametrize("settings", ["sgd", "momentum", "low rank", "mini-batch", "Shampoo"])
def test_reading_the_state_before_the_first_step_is_no_step(settings):
    """torch has an optimizer initialize its state by a step of zeros with lr 0, which SGD does not mind."""
    asked, plain = mlp_with_norm(), mlp_with_norm()
    optimizer, reference = optimizer_for(asked, settings), optimizer_for(plain, settings)
    before = copy.deepcopy(asked)
    get_optimizer_state_dict(asked, optimizer)
    assert parameters_equal(asked, before)
    assert not optimizer.curvature
    assert optimizer.state_dict()["param_groups"][0][optimizer.key]["steps"] == 0
    train(asked, optimizer, range(7))
    train(plain, reference, range(7))
    assert parameters_equal(asked, plain)
    assert {name: state.updates for name, state in optimizer.curvature.items()} == {
        name: state.updates for name, state in reference.curvature.items()
    }


def test_reading_the_state_before_the_first_step_counts_for_adam_as_it_does_without_ngplus():
    """Its bias correction starts one step later, so that both runs are compared with Adam's count set."""
    asked, counted = mlp_with_norm(), mlp_with_norm()
    optimizer, reference = optimizer_for(asked, "adam"), optimizer_for(counted, "adam")
    get_optimizer_state_dict(asked, optimizer)
    for parameter in counted.parameters():
        zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        reference.base.state[parameter].update(step=torch.tensor(1.0), **zeros)
    train(asked, optimizer, range(7))
    train(counted, reference, range(7))
    assert parameters_equal(asked, counted)


def test_a_first_step_with_lr_zero_counts():
    """As a warm-up makes it: there are gradients."""
    model = mlp_with_norm()
    optimizer = NGPlus(model, lr=0.1, update_every=2)
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, [0])
    assert optimizer.state_dict()["param_groups"][0]["ngplus"]["steps"] == 1
    assert set(optimizer.curvature) == {"0.weight", "3.weight"}


def test_a_step_of_zeros_counts_where_there_were_others():
    model = mlp_with_norm()
    optimizer = NGPlus(model, lr=0.1, update_every=2)
    train(model, optimizer, [0])
    optimizer.param_groups[0]["lr"] = 0.0
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["ngplus"]["steps"] == 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("settings", ["sgd", "adam", "adagrad"])
def test_what_was_saved_before_the_first_step_starts_a_run(settings, form, tmp_path):
    model, other = mlp_with_norm(), mlp_with_norm(seed=5)
    optimizer, started = optimizer_for(model, settings), optimizer_for(other, settings)
    through_files(App(model, optimizer, FORMS[form]), tmp_path)(App(other, started, FORMS[form]))
    train(model, optimizer, range(5))
    train(other, started, range(5))
    assert parameters_equal(model, other)


def test_a_state_loaded_into_a_fresh_optimizer_still_has_every_entry(tmp_path):
    """Loading the state of no step leaves the base's state to be initialized, which torch does by a step."""
    model = mlp_with_norm()
    optimizer = optimizer_for(model, "adam")
    optimizer.load_state_dict(optimizer.state_dict())
    state = get_optimizer_state_dict(model, optimizer, options=FORMS["flattened"])
    assert {"state.0.weight.exp_avg", "state.0.weight.ngplus_inverse0", "state.1.bias.exp_avg"} <= set(state)


# What does not fit -----------------------------------------------------------------------------------------------


def test_a_sketch_is_refused_by_an_optimizer_without_a_sketched_solver(tmp_path):
    """Loading fills the tensors that there are: an optimizer of another solver offers none for it."""
    model, other = mlp_with_norm(), mlp_with_norm()
    optimizer, dense = optimizer_for(model, "sketched"), optimizer_for(other, "adam")
    train(model, optimizer, range(2))
    assert isinstance(optimizer.curvature["0.weight"].preconditioner, SketchedInverse)
    with pytest.raises(
        ValueError, match=r"0\.weight has no (core|drawn): it was cut short, or saved with other options"
    ):
        through_files(App(model, optimizer, FORMS["plain"]), tmp_path)(App(other, dense, FORMS["plain"]))


def test_seng_without_known_sample_sizes_is_loaded_from_memory_and_refused_from_files(tmp_path):
    def app(seed, steps=0):
        model = mlp_with_norm(seed=seed)
        optimizer = SENG(model, lr=0.01, damping=0.3, update_every=3, momentum=0.9)
        train(model, optimizer, range(steps))
        return App(model, optimizer, FORMS["plain"])

    saved, resumed = app(0, steps=4), app(5)
    handed_over(saved, tmp_path)(resumed)
    with pytest.raises(ValueError, match=r"0\.weight has no rows: it was cut short, or saved with other options"):
        through_files(saved, tmp_path)(app(5))
    for each in (saved, resumed):
        train(each.model, each.optimizer, range(4, 8))
    assert parameters_equal(saved.model, resumed.model)


def test_a_partial_load_names_the_layers_it_leaves_without_curvature():
    model, other = mlp_with_norm(), mlp_with_norm()
    optimizer, loaded = optimizer_for(model, "adam"), optimizer_for(other, "adam")
    train(model, optimizer, range(2))
    state = get_optimizer_state_dict(model, optimizer)
    del state["state"]["3.weight"]
    with pytest.warns(UserWarning, match=r"the state says nothing of 3\.weight"):
        set_optimizer_state_dict(other, loaded, state, options=StateDictOptions(strict=False))
    assert list(loaded.curvature) == ["0.weight"]


def test_layers_that_are_frozen_when_loaded_are_named():
    """torch leaves the state of frozen parameters out, the base's too."""
    model, other = mlp_with_norm(), mlp_with_norm()
    optimizer, loaded = optimizer_for(model, "momentum"), optimizer_for(other, "momentum")
    train(model, optimizer, range(2))
    other[3].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"the state says nothing of 3\.weight"):
        set_optimizer_state_dict(other, loaded, get_optimizer_state_dict(model, optimizer))
    assert list(loaded.curvature) == ["0.weight"]
    assert "momentum_buffer" not in loaded.base.state[other[3].weight]
