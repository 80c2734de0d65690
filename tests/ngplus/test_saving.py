"""Saving, loading and copying: at any step, in another process, and of what does not fit."""

import collections
import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from ngplus import NGPlus
from ngplus.baselines import KFAC, SENG, Shampoo
from tests.ngplus.cases import mlp, parameters_equal, through_a_file, train
from tests.ngplus.training.processes import in_a_fresh_process

SETTINGS = {
    "sgd": {"base": SGD, "momentum": 0.9, "weight_decay": 0.01},
    "ema": {"base": SGD, "ema": 0.7, "block_size": 4},
    "adam": {"base": Adam},
    "low rank": {"base": SGD, "solver": "low_rank", "max_samples": 2},
    "sketched": {"base": SGD, "solver": "sketched", "sketch_size": 2},
    "sketched columns": {"base": SGD, "solver": "sketched", "sketch_size": 2, "curvature": "mini_batch"},
}


def optimizer_for(model, settings, **options):
    return NGPlus(model, lr=0.01, damping=0.3, update_every=3, **SETTINGS[settings], **options)


@pytest.mark.parametrize("settings", SETTINGS)
def test_saved_at_any_step_it_resumes_to_the_bit(settings):
    whole = mlp(4, 6, 3)
    train(whole, optimizer_for(whole, settings), range(8))
    for stop in range(8):
        model = mlp(4, 6, 3)
        optimizer = optimizer_for(model, settings)
        train(model, optimizer, range(stop))
        weights, state = through_a_file((model.state_dict(), optimizer.state_dict()))
        model = mlp(4, 6, 3, seed=5)
        optimizer = optimizer_for(model, settings)
        train(model, optimizer, range(20, 20 + stop % 3))
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        train(model, optimizer, range(stop, 8))
        assert parameters_equal(model, whole), stop


def resume(folder, settings):
    """The end of a run, in a process that did not begin it."""
    saved = torch.load(folder / "saved.pt", weights_only=True)
    model = mlp(4, 6, 3, seed=9)
    optimizer = optimizer_for(model, settings)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(4, 8))
    return model


def test_a_fresh_process_goes_on_to_the_bit(tmp_path):
    model = mlp(4, 6, 3)
    optimizer = optimizer_for(model, "ema")
    train(model, optimizer, range(4))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    train(model, optimizer, range(4, 8))
    assert parameters_equal(model, in_a_fresh_process(resume, tmp_path, "ema"))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_together_with_its_model_goes_on_identically(copied, settings):
    model = mlp(4, 6, 3)
    optimizer = optimizer_for(model, settings)
    train(model, optimizer, range(4))
    other_model, other = copied((model, optimizer))
    assert [id(p) for p in other_model.parameters()] == [id(p) for p in other.param_groups[0]["params"]]
    train(model, optimizer, range(4, 8))
    train(other_model, other, range(4, 8))
    assert parameters_equal(model, other_model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_alone_brings_its_own_model(copied):
    model = mlp(4, 6, 3)
    optimizer = optimizer_for(model, "adam")
    train(model, optimizer, range(4))
    other = copied(optimizer)
    train(model, optimizer, range(4, 8))
    assert not parameters_equal(model, other._model)
    train(other._model, other, range(4, 8))
    assert parameters_equal(model, other._model)


def test_a_copy_of_plain_parameters_goes_on_identically():
    model = mlp(4, 6, 3)
    optimizer = NGPlus(model.named_parameters(), lr=0.01, update_every=3, ema=0.5, curvature="mini_batch")
    train(model, optimizer, range(4))
    other_model, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(4, 8))
    train(other_model, other, range(4, 8))
    assert parameters_equal(model, other_model)


@pytest.mark.parametrize("optimizer", [NGPlus, KFAC, SENG])
@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "state"])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("event", ["frozen", "freed", "added"])
def test_a_bias_that_left_or_joined_its_matrix_is_no_hindrance(event, steps, copied, optimizer):
    """A copy made so many steps after it goes on identically, and so does what a state is loaded into."""
    model = mlp(4, 6, 3)
    bias = model[0].bias
    bias.requires_grad_(event != "freed")
    groups = [{"params": [p for p in model.parameters() if p is not bias]}, {"params": [bias]}]
    trained = optimizer(model, lr=0.01, update_every=5, params=groups[:1] if event == "added" else groups)
    train(model, trained, range(2))
    if event == "added":
        trained.add_param_group(groups[1])
    else:
        bias.requires_grad_(event == "freed")
        bias.grad = None
    train(model, trained, range(2, 2 + steps))
    if copied == "deepcopy":
        other_model, other = copy.deepcopy((model, trained))
    elif copied == "pickle":
        other_model, other = pickle.loads(pickle.dumps((model, trained)))
    else:
        other_model = copy.deepcopy(model)
        others = dict(zip(model.parameters(), other_model.parameters(), strict=True))
        same_groups = [{"params": [others[p] for p in group["params"]]} for group in groups]
        other = optimizer(other_model, lr=0.01, update_every=5, params=same_groups)
        other.load_state_dict(trained.state_dict())
    train(model, trained, range(2 + steps, 9))
    train(other_model, other, range(2 + steps, 9))
    assert parameters_equal(model, other_model)
    assert trained.curvature["0.weight"].shape.columns == (4 if event == "frozen" else 5)


@pytest.mark.parametrize("frozen", [("weight", "bias"), ("weight",), ("bias",)])
@pytest.mark.parametrize("frozen_before", [False, True])
@pytest.mark.parametrize("layer", [0, 2])  # whose longer side is the output, and the input
@pytest.mark.parametrize("bias_is_trained", [True, False])
def test_what_is_frozen_when_it_is_saved_keeps_its_curvature(frozen, frozen_before, layer, bias_is_trained):
    def freeze(model, flag):
        for name in frozen:
            getattr(model[layer], name).requires_grad_(not flag and (name == "weight" or bias_is_trained))

    model, other_model = mlp(4, 6, 3), mlp(4, 6, 3)
    for each in (model, other_model):
        each[layer].bias.requires_grad_(bias_is_trained)
    optimizer = NGPlus(model, lr=0.01, update_every=20)
    train(model, optimizer, range(1))
    freeze(model, True)
    train(model, optimizer, range(1, 3))
    other_model.load_state_dict(model.state_dict())
    freeze(other_model, frozen_before)
    other = NGPlus(other_model, lr=0.01, update_every=20)
    freeze(other_model, True)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (other_model, other)):
        freeze(each, False)
        train(each, its, range(3, 6))
    assert parameters_equal(model, other_model)
    assert set(other.curvature) == {"0.weight", "2.weight"}


def test_a_state_dict_does_not_change_with_later_steps():
    model = mlp(4, 6, 3)
    optimizer = optimizer_for(model, "ema")
    train(model, optimizer, range(4))
    kept = optimizer.state_dict()
    copied = copy.deepcopy(kept)
    train(model, optimizer, range(4, 8))
    torch.testing.assert_close(groups_apart(kept), groups_apart(copied), rtol=0, atol=0)
    assert kept["param_groups"][0]["ngplus"]["steps"] == 4


def groups_apart(state):
    """The tensors of a state and its steps, without the name of the base, which is no number."""
    return [*state["state"].values(), state["param_groups"][0]["ngplus"]["steps"]]


def matrices_alone():
    """As many parameters as in `mlp(4, 6, 3)`, all of them weights."""
    return nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(4)]).double()


FOREIGN = {
    "another shape": (lambda: mlp(4, 6, 5), "2.weight is for a matrix 1×5×7 .* but the model's is 1×3×7"),
    "more layers": (lambda: mlp(4, 6, 3, 2), r"parameter groups of \[6\] parameters, but this optimizer's have \[4\]"),
    "other places": (matrices_alone, "curvature of parameters that are no layers here: 1, 3"),
}


def refused(state, words):
    """Try to load it in the middle of a run, which must end as if nothing had happened."""
    model, plain = mlp(4, 6, 3), mlp(4, 6, 3)
    optimizer, reference = optimizer_for(model, "sgd"), optimizer_for(plain, "sgd")
    train(model, optimizer, range(4))
    train(plain, reference, range(4))
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(state)
    train(model, optimizer, range(4, 8))
    train(plain, reference, range(4, 8))
    assert parameters_equal(model, plain)


@pytest.mark.parametrize("other", FOREIGN)
def test_a_state_of_another_model_is_refused_and_nothing_changes(other):
    make, words = FOREIGN[other]
    model = make()
    optimizer = NGPlus(model, lr=0.5, update_every=1)
    train(model, optimizer, range(2))
    refused(optimizer.state_dict(), words)


def test_a_state_of_another_optimizer_is_refused_and_nothing_changes():
    refused(
        SGD(mlp(4, 6, 3).parameters(), lr=0.1).state_dict(),
        r"no state of NGPlus: its keys are \['param_groups', 'state'\], and 'ngplus' is in none of",
    )


def test_a_state_around_another_base_is_refused_and_nothing_changes():
    model = mlp(4, 6, 3)
    refused(optimizer_for(model, "adam").state_dict(), "is of NGPlus around Adam, but this one is around SGD")


def test_a_state_of_other_groups_is_refused_and_nothing_changes():
    model = mlp(4, 6, 3)
    groups = [{"params": list(layer.parameters())} for layer in (model[0], model[2])]
    refused(NGPlus(model, update_every=1, params=groups).state_dict(), "parameter group")


@pytest.mark.parametrize("lost", ["steps", "skipped", "generator", "base"])
def test_a_state_without_a_counter_is_refused_and_nothing_changes(lost):
    model = mlp(4, 6, 3)
    optimizer = optimizer_for(model, "sgd")
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    del state["param_groups"][0]["ngplus"][lost]
    refused(state, f"the state of NGPlus has no {lost}")


@pytest.mark.parametrize("lost", ["matrix", "updates", "damping", "form", "rank", "inverse0", "tries", "pending"])
def test_a_state_without_an_entry_of_a_layer_is_refused_and_nothing_changes(lost):
    model = mlp(4, 6, 3)
    optimizer = optimizer_for(model, "sgd")
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    del state["state"][2][f"ngplus_{lost}"]
    refused(state, f"the state of 2.weight has no {lost}")


def test_a_state_without_an_average_is_refused_where_averages_are_kept():
    model = mlp(4, 6, 3)
    optimizer = optimizer_for(model, "ema")
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    for name in [name for name in state["state"][2] if name.startswith("ngplus_average")]:
        if name != "ngplus_averaged":
            del state["state"][2][name]
    with pytest.raises(ValueError, match=r"2\.weight has no average0"):
        optimizer_for(mlp(4, 6, 3), "ema").load_state_dict(state)


def test_a_layer_missing_from_a_state_is_named_and_starts_without_curvature():
    model = mlp(4, 6, 3)
    optimizer = optimizer_for(model, "sgd")
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    state["state"][2] = {"momentum_buffer": state["state"][2]["momentum_buffer"]}
    loaded = optimizer_for(mlp(4, 6, 3), "sgd")
    with pytest.warns(UserWarning, match="^the state says nothing of 2.weight: without curvature until"):
        loaded.load_state_dict(state)
    assert list(loaded.curvature) == ["0.weight"]


# The layout ------------------------------------------------------------------------------------------------------


def test_a_layer_has_its_entries_under_its_weight_and_every_parameter_has_some():
    """As `torch.distributed.checkpoint` wants it, with sizes that are known before there is curvature."""
    model = mlp(4, 6, 3)
    optimizer = optimizer_for(model, "low rank")
    before = optimizer.state_dict()
    train(model, optimizer, range(2))
    after = optimizer.state_dict()
    assert set(after) == {"state", "param_groups"}
    assert list(after["state"]) == [0, 1, 2, 3]
    assert after["state"][1] == {"ngplus_updates": 0}
    assert before["state"][0].keys() == after["state"][0].keys()
    for name, entry in after["state"][0].items():
        assert type(entry) is type(before["state"][0][name])
        if isinstance(entry, torch.Tensor):
            assert (entry.shape, entry.dtype) == (before["state"][0][name].shape, before["state"][0][name].dtype)
    assert after["state"][0]["ngplus_updates"] == 1
    W = optimizer.curvature["0.weight"].preconditioner.columns
    assert after["state"][0]["ngplus_rank"] == W.shape[1] == 2
    assert torch.equal(after["state"][0]["ngplus_inverse0"][0, :, :2], W)


def test_the_state_of_a_running_optimizer_shows_what_is_kept():
    model = mlp(4, 6, 3)
    optimizer = optimizer_for(model, "adam")
    assert not optimizer.state
    train(model, optimizer, range(2))
    entries = optimizer.state[model[0].weight]
    assert torch.equal(entries["ngplus_inverse0"], optimizer.curvature["0.weight"].tensors()[0])
    assert int(entries["step"]) == 2
    assert not any(name.startswith("ngplus") for name in optimizer.base.state[model[0].weight])


def test_reading_the_state_at_any_time_changes_nothing():
    """Adam tells by an empty state that a parameter is new: here the second layer is first used later."""

    def run(asked):
        model = mlp(4, 6, 3)
        optimizer = optimizer_for(model, "adam")
        for step in range(6):
            model[2].requires_grad_(step > 2)
            train(model, optimizer, [step])
            if asked:
                assert len(optimizer.state) >= 2
        return model

    assert parameters_equal(run(asked=True), run(asked=False))


def test_a_state_that_is_put_in_place_of_the_old_is_the_bases():
    """Assigning an empty one is how some loops start an optimizer over."""
    model = mlp(4, 6, 3)
    optimizer = optimizer_for(model, "adam")
    train(model, optimizer, range(2))
    optimizer.state = collections.defaultdict(dict)
    assert not optimizer.base.state
    train(model, optimizer, [2])
    assert int(optimizer.state[model[0].weight]["step"]) == 1


@pytest.mark.parametrize("settings", ["sgd", "ema"])
def test_states_with_and_without_parameter_names_load_into_each_other(settings):
    whole = mlp(4, 6, 3)
    train(whole, optimizer_for(whole, settings), range(8))
    for named in (False, True):
        model, other = mlp(4, 6, 3), mlp(4, 6, 3, seed=3)
        given = {one: list(one.named_parameters()) if is_named else None for one, is_named in
                 ((model, named), (other, not named))}  # fmt: skip
        optimizer, loaded = (optimizer_for(one, settings, params=params) for one, params in given.items())
        train(model, optimizer, range(5))
        other.load_state_dict(model.state_dict())
        loaded.load_state_dict(through_a_file(optimizer.state_dict()))
        train(other, loaded, range(5, 8))
        assert parameters_equal(other, whole)


def test_states_of_plain_parameters_with_and_without_names_load_into_each_other():
    def make(model, named):
        return NGPlus(
            model.named_parameters() if named else model.parameters(), lr=0.1, curvature="mini_batch", ema=0.5
        )

    for named in (False, True):
        model, other = mlp(4, 6, 3), mlp(4, 6, 3)
        optimizer, loaded = make(model, named), make(other, not named)
        train(model, optimizer, range(3))
        other.load_state_dict(model.state_dict())
        loaded.load_state_dict(through_a_file(optimizer.state_dict()))
        train(model, optimizer, range(3, 6))
        train(other, loaded, range(3, 6))
        assert parameters_equal(model, other)


def test_pending_layers_retries_and_skipped_steps_survive_saving():
    """A layer that is pending, one that is given up as unsupported, and skipped steps."""
    model = mlp(4, 6, 3)
    optimizer = NGPlus(model, lr=0.01, update_every=100)
    optimizer._coverage.pending, optimizer._coverage.tries = optimizer._layers[::-1], {optimizer._layers[0]: 2}
    optimizer._coverage.unsupported, optimizer._skipped = {optimizer._layers[1]}, torch.tensor(3)
    loaded = NGPlus(mlp(4, 6, 3), lr=0.01, update_every=100)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    for other in (loaded, pickle.loads(pickle.dumps(optimizer))):
        assert [layer.name for layer in other._coverage.pending] == ["2.weight", "0.weight"]
        assert {layer.name: count for layer, count in other._coverage.tries.items()} == {"0.weight": 2}
        assert {layer.name for layer in other._coverage.unsupported} == {"2.weight"}
        assert other.skipped_steps == 3


# Hooks -----------------------------------------------------------------------------------------------------------


def test_hooks_of_saving_see_the_curvature_and_can_change_it():
    model = mlp(4, 6, 3)
    optimizer = optimizer_for(model, "sgd")
    train(model, optimizer, range(2))
    order = []

    def halve(optimizer, state):
        order.append("in place")
        state["state"][0]["ngplus_inverse0"] = state["state"][0]["ngplus_inverse0"] / 2

    optimizer.register_state_dict_pre_hook(lambda optimizer: order.append(len(optimizer.curvature)))
    optimizer.register_state_dict_post_hook(halve)
    optimizer.register_state_dict_post_hook(lambda optimizer, state: {**state, "note": "of a hook"})
    state = optimizer.state_dict()
    assert order == [2, "in place"]
    assert state["note"] == "of a hook"
    assert torch.equal(2 * state["state"][0]["ngplus_inverse0"], optimizer.curvature["0.weight"].tensors()[0])


def test_hooks_of_loading_see_the_curvature_and_can_change_it():
    model = mlp(4, 6, 3)
    optimizer, loaded = optimizer_for(model, "sgd"), optimizer_for(mlp(4, 6, 3), "sgd")
    train(model, optimizer, range(2))
    after = []

    def double(optimizer, state):
        first = {**state["state"][0], "ngplus_inverse0": 2 * state["state"][0]["ngplus_inverse0"]}
        return {**state, "state": {**state["state"], 0: first}}

    loaded.register_load_state_dict_pre_hook(double)
    loaded.register_load_state_dict_post_hook(lambda optimizer: after.append(list(optimizer.curvature)))
    loaded.load_state_dict(optimizer.state_dict())
    assert after == [["0.weight", "2.weight"]]
    [ours], [theirs] = (each.curvature["0.weight"].tensors() for each in (loaded, optimizer))
    assert torch.equal(ours, 2 * theirs)


# Files of the first layout ---------------------------------------------------------------------------------------

FIRST_LAYOUT = Path(__file__).with_name("first_layout.pt")
"""For each way: weights and a state after 4 steps, and the weights after 8, all by commit 90141de."""

BASELINES = {"kfac": KFAC, "seng": SENG, "shampoo": Shampoo}


def first_made(model, way):
    if way in BASELINES:
        return BASELINES[way](model, base=SGD, lr=0.01, damping=0.3, update_every=3, momentum=0.9)
    return optimizer_for(model, way)


@pytest.mark.parametrize("way", ["ema", "adam", "low rank", "sketched", "sketched columns", *BASELINES])
def test_a_file_of_the_first_layout_goes_on_where_it_was_saved(way):
    """To the bit, where products round as they did where the file was written."""
    saved = torch.load(FIRST_LAYOUT, weights_only=True)[way]
    whole = mlp(4, 6, 3)
    train(whole, first_made(whole, way), range(4))
    rounds_alike = all(torch.equal(value, saved["model"][name]) for name, value in whole.state_dict().items())
    for again in (False, True):
        model = mlp(4, 6, 3, seed=5)
        optimizer = first_made(model, way)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))  # which torch's bases go on in
        if again:  # through a file of today's
            state = through_a_file(optimizer.state_dict())
            optimizer = first_made(model, way)
            optimizer.load_state_dict(state)
        train(model, optimizer, range(4, 8))
        assert optimizer.state_dict()["param_groups"][0][optimizer.key]["steps"] == 8
        rtol, atol = (0, 0) if rounds_alike else (1e-12, 1e-14)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, saved["end"][name], rtol=rtol, atol=atol)


def test_a_file_of_the_first_layout_with_a_part_missing_is_refused_and_nothing_changes():
    state = torch.load(FIRST_LAYOUT, weights_only=True)["ema"]["optimizer"]
    del state["ngplus"]["generator"]
    refused(state, "no generator")


def test_a_file_of_the_first_layout_with_other_layers_is_refused_and_nothing_changes():
    state = torch.load(FIRST_LAYOUT, weights_only=True)["ema"]["optimizer"]
    state["ngplus"]["base"] = "SGD"
    state["ngplus"]["layers"]["4.weight"] = state["ngplus"]["layers"]["0.weight"]
    refused(state, "layers that this model does not: 4.weight; it has 0.weight, 2.weight")


def stepped(lr=0.5):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = NGPlus(model, base=Adam, lr=lr, damping=0.1, update_every=3)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def without_adams_step(state):
    del state["state"][0]["step"]


def with_a_generator_of_floats(state):
    state["param_groups"][0]["ngplus"]["generator"] = torch.ones(3)


def with_an_inverse_of_integers(state):
    state["state"][0]["ngplus_inverse0"] = state["state"][0]["ngplus_inverse0"].long()


def without_a_matrix(state):
    state["state"][0]["ngplus_matrix"] = None


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (without_adams_step, KeyError, "step"),
        (with_a_generator_of_floats, ValueError, "no state of a generator"),
        (
            with_an_inverse_of_integers,
            ValueError,
            "weight cannot be read: its inverse0 must hold real numbers",
        ),
        (without_a_matrix, ValueError, "weight cannot be read"),
    ],
)
def test_a_state_that_is_refused_changes_nothing(spoil, error, message):
    state = copy.deepcopy(stepped(lr=0.01)[1].state_dict())
    spoil(state)
    model, optimizer = stepped()
    twin, same = stepped()
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.5
    for each, its in ((model, optimizer), (twin, same)):
        torch.manual_seed(1)
        for _ in range(3):
            its.zero_grad()
            each(torch.randn(5, 4)).square().mean().backward()
            its.step()
    assert parameters_equal(model, twin)


def test_an_average_of_another_size_is_refused():
    model = nn.Linear(4, 3)
    optimizer = NGPlus(model, base=Adam, lr=0.1, basis="eigen", ema=0.5)
    model(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["ngplus_average0"] = torch.ones(1, 4)
    with pytest.raises(ValueError, match=r"average0 of shape \(1, 4\), and the layer's is"):
        optimizer.load_state_dict(state)
