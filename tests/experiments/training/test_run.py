import dataclasses
import math
import re
import time

import pytest
import pytorch_optimizer
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from experiments.errors import UserError
from experiments.records.provenance import device_name
from experiments.records.run_record import read_run
from experiments.training.run import run
from tests.experiments.cases import toy

EVERY_STEP = 0.0


def checkpoint(options, name):
    return torch.load(options.results_dir / "checkpoints" / "toy" / "tiny" / f"{name}.pt", weights_only=True)


def assert_same(a, b):
    """Equal to the bit, however nested."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


class InterruptedRunError(Exception):
    pass


@pytest.fixture
def interrupt(monkeypatch):
    """Make the toy's loss fail at a given call from now on; ``None`` lets it work again."""
    real = toy.Toy.loss

    def at(call):
        calls = iter(range(1, 1000))

        def loss(self, model, batch):
            if next(calls) == call:
                raise InterruptedRunError
            return real(self, model, batch)

        monkeypatch.setattr(toy.Toy, "loss", loss if call else real)

    return at


def break_off(interrupt, call, recipe, name, options):
    """Leave a run at a call of the loss, which works again afterwards."""
    interrupt(call)
    with pytest.raises(InterruptedRunError):
        run(recipe, name, 0, options)
    interrupt(None)


def test_a_run_is_recorded_from_the_untrained_model_to_its_end(load, options):
    record = run(load(), "sgd", 0, options)
    assert [epoch.epoch for epoch in record.epochs] == [0, 1, 2, 3]
    assert [epoch.step for epoch in record.epochs] == [0, 6, 12, 18]
    assert record.epochs[0].train_loss is None
    assert record.epochs[3].metric < record.epochs[0].metric
    assert record.epochs[0].lr == pytest.approx(0.1 / 3)
    assert record.epochs[3].damping is record.epochs[3].curvature_s is None
    assert record.epochs[3].peak_memory_mb > 1
    assert record.end.reason == "finished"
    assert record.end.seconds == record.epochs[3].seconds > record.epochs[1].seconds > 0
    assert record.end.load > 0
    assert record.manifest.target == 0.5
    assert record.manifest.recipe["optimizer"]["momentum"] == 0.9
    assert record.manifest.dataset == toy.Toy.dataset


def test_ngplus_reports_its_damping_and_where_its_time_goes(load, options):
    last = run(load(), "ngplus", 0, options).epochs[-1]
    assert last.damping == pytest.approx(0.5 * 0.8**3)
    assert 0 < last.curvature_s + last.inverse_s + last.apply_s < last.seconds


def test_weights_and_batches_depend_on_the_seed_alone(load, options, monkeypatch):
    seen = []
    real = toy.Toy.loss
    monkeypatch.setattr(toy.Toy, "loss", lambda self, model, batch: seen.append(batch[0]) or real(self, model, batch))
    records = {}
    for name in ("sgd", "adam", "ngplus"):
        records[name] = run(load("run.epochs=1"), name, 0, options)
    other = run(load("run.epochs=1"), "sgd", 1, options)
    batches = torch.stack(seen).unflatten(0, (4, 6))
    assert torch.equal(batches[0], batches[1])
    assert torch.equal(batches[0], batches[2])
    assert not torch.equal(batches[0], batches[3])
    assert len({record.epochs[0].eval_loss for record in records.values()}) == 1
    assert other.epochs[0].eval_loss != records["sgd"].epochs[0].eval_loss


@pytest.mark.parametrize("name", ["sgd", "adam", "ngplus"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("every_s", [EVERY_STEP, 1e9])
def test_an_interrupted_run_ends_with_the_same_numbers_to_the_bit(
    load, options, tmp_path, interrupt, name, accumulate, every_s
):
    recipe = load(f"run.accumulate={accumulate}")
    whole = dataclasses.replace(options, results_dir=tmp_path / "whole")
    broken = dataclasses.replace(options, results_dir=tmp_path / "broken", checkpoint_every_s=every_s)
    expected = run(recipe, name, 0, whole)
    for call in (3, 4, 9):  # in the first epoch twice, then in a later one
        interrupt(call)
        with pytest.raises(InterruptedRunError):
            run(recipe, name, 0, broken)
    interrupt(None)
    record = run(recipe, name, 0, broken)
    assert record.resumed
    assert toy.reproducible_values(record) == toy.reproducible_values(expected)
    ours, theirs = checkpoint(broken, f"{name}-seed0"), checkpoint(whole, f"{name}-seed0")
    for key in ("model", "optimizer", "schedules"):
        assert_same(ours[key], theirs[key])
    assert_same(ours["position"]["ranks"], theirs["position"]["ranks"])


SCHEDULE_FREE = """
[optimizers.averaging]
kind = { value = "pytorch_optimizer:ScheduleFreeAdamW", source = "made up" }
lr = { value = 0.05, source = "made up" }

[optimizers.ngplus-averaging]
lr = { value = 0.05, source = "made up" }
damping = { value = 0.5, source = "made up" }
update_every = { value = 4, source = "made up" }

[optimizers.ngplus-averaging.base]
kind = { value = "pytorch_optimizer:ScheduleFreeAdamW", source = "made up" }
"""


@pytest.mark.parametrize("name", ["averaging", "ngplus-averaging"])
def test_an_optimizer_that_averages_is_evaluated_at_its_average_and_resumes(
    load, recipes, options, tmp_path, interrupt, monkeypatch, name
):
    path = recipes / "toy" / "tiny.toml"
    path.write_text(path.read_text() + SCHEDULE_FREE)
    broken = dataclasses.replace(options, results_dir=tmp_path / "broken", checkpoint_every_s=EVERY_STEP)
    for call in (4, 9):
        break_off(interrupt, call, load(), name, broken)
    expected = run(load(), name, 0, options)
    assert toy.reproducible_values(run(load(), name, 0, broken)) == toy.reproducible_values(expected)
    monkeypatch.delattr(pytorch_optimizer.ScheduleFreeAdamW, "eval")
    trained = run(load(), name, 0, dataclasses.replace(options, results_dir=tmp_path / "trained"))
    assert trained.epochs[0].metric == expected.epochs[0].metric
    assert trained.epochs[-1].metric != expected.epochs[-1].metric


def test_without_checkpoints_an_interrupted_run_begins_again(load, options, tmp_path, interrupt):
    expected = run(load(), "sgd", 0, options)
    broken = dataclasses.replace(options, results_dir=tmp_path / "broken", checkpoints=False, checkpoint_every_s=0.0)
    break_off(interrupt, 9, load(), "sgd", broken)
    record = run(load(), "sgd", 0, broken)
    assert not record.resumed
    assert not list(broken.results_dir.rglob("*.pt"))
    assert toy.reproducible_values(record) == toy.reproducible_values(expected)


def test_the_clock_and_the_time_split_are_carried_on(load, options, interrupt, monkeypatch):
    options = dataclasses.replace(options, checkpoint_every_s=EVERY_STEP)
    recipe = load("task.pause=0.01")
    break_off(interrupt, 9, recipe, "ngplus", options)
    record = run(recipe, "ngplus", 0, options)
    (resumed,) = record.resumed
    assert (resumed.epoch, resumed.step) == (1, 8)
    assert resumed.seconds >= 8 * 0.01
    figures = [vars(epoch) for epoch in record.epochs]
    for name in ("seconds", "curvature_s", "inverse_s", "apply_s", "peak_memory_mb"):
        column = [row[name] for row in figures]
        assert column == sorted(column)
    assert record.end.seconds >= 18 * 0.01


def test_evaluation_is_off_the_clock(load, options, monkeypatch):
    real = toy.Toy.evaluate

    def slow(self, model, split):
        time.sleep(0.3)
        return real(self, model, split)

    monkeypatch.setattr(toy.Toy, "evaluate", slow)
    assert run(load("run.epochs=2"), "sgd", 0, options).end.seconds < 0.3


def test_a_finished_run_is_not_run_again_unless_asked(load, options):
    first = run(load(), "sgd", 0, options)
    content = first.path.read_bytes()
    assert run(load(), "sgd", 0, options) == first
    assert first.path.read_bytes() == content
    again = run(load(), "sgd", 0, dataclasses.replace(options, force=True))
    assert again.manifest.started_at != first.manifest.started_at
    assert toy.reproducible_values(again) == toy.reproducible_values(first)


def test_a_run_finished_with_other_settings_is_not_taken_for_this_one(load, options):
    run(load(), "sgd", 0, options)
    with pytest.raises(UserError, match=r"finished with other settings: optimizer\.lr was 0\.1 and is 0\.2; .*--force"):
        run(load("optimizers.sgd.lr=0.2"), "sgd", 0, options)
    with pytest.raises(UserError, match=r"finished with other settings: task\.hidden was not set and is 7; .*--force"):
        run(load("task.hidden=7"), "sgd", 0, options)
    run(load("task.hidden=7"), "sgd", 1, options)
    with pytest.raises(UserError, match=r"finished with other settings: task\.hidden was 7 and is not set; .*--force"):
        run(load(), "sgd", 1, options)
    assert run(load("run.target=0.1", "run.seeds=[7]"), "sgd", 0, options).end


def test_a_run_from_before_a_setting_was_there_is_one_without_it(load, options):
    first = run(load(), "sgd", 0, options)
    manifest, *events = first.path.read_text().splitlines(keepends=True)
    for name in ("clip_norm", "decay"):
        assert f'"{name}": null' in manifest
        manifest = re.sub(rf', "{name}": null', "", manifest)
    first.path.write_text("".join([manifest, *events]))
    assert run(load(), "sgd", 0, options).epochs == first.epochs
    with pytest.raises(UserError, match=r"finished with other settings: run\.clip_norm was not set and is 2\.0"):
        run(load("run.clip_norm=2.0"), "sgd", 0, options)


@pytest.fixture
def steps():
    """Of every optimizer step: the gradients it is given, as one vector, and each group's decay and size."""
    seen = []

    def record(optimizer, *_):
        groups = optimizer.param_groups
        gradient = torch.cat([each.grad.flatten() for group in groups for each in group["params"]])
        seen.append((gradient, [(group["weight_decay"], len(group["params"])) for group in groups]))

    hook = register_optimizer_step_pre_hook(record)
    yield seen
    hook.remove()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_steps_gradient_is_scaled_down_to_the_norm_given(load, options, tmp_path, steps, accumulate):
    changes = ("task.dropout=0.0", "run.epochs=1", f"run.accumulate={accumulate}")
    run(load(*changes), "sgd", 0, options)
    free = [gradient for gradient, _ in steps]
    limit = 0.8 * min(gradient.norm().item() for gradient in free)
    steps.clear()
    run(
        load(*changes, f"run.clip_norm={limit}"),
        "sgd",
        0,
        dataclasses.replace(options, results_dir=tmp_path / "clipped"),
    )
    assert len(steps) == len(free)
    torch.testing.assert_close(steps[0][0], free[0] * limit / free[0].norm(), rtol=1e-4, atol=1e-7)
    assert all(gradient.norm().item() == pytest.approx(limit, rel=1e-4) for gradient, _ in steps)


def test_a_gradient_within_the_norm_is_left_as_it_is(load, options, tmp_path):
    free = run(load(), "ngplus", 0, options)
    within = run(load("run.clip_norm=1e6"), "ngplus", 0, dataclasses.replace(options, results_dir=tmp_path / "within"))
    assert toy.reproducible_values(within) == toy.reproducible_values(free)


def test_decay_may_be_for_matrices_alone(load, options, steps):
    run(load("run.epochs=1", "run.decay=matrices", "optimizers.sgd.weight_decay=0.1"), "sgd", 0, options)
    assert steps[0][1] == [(0.1, 2), (0.0, 2)]  # two weights, two biases


def test_an_interrupted_run_does_not_go_on_with_other_settings(load, options, interrupt):
    options = dataclasses.replace(options, checkpoint_every_s=EVERY_STEP)
    break_off(interrupt, 9, load(), "sgd", options)
    path = options.results_dir / "toy" / "tiny" / "runs" / "sgd-seed0.jsonl"
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"is unfinished, begun with other settings: task\.hidden was not set and is 7"):
        run(load("task.hidden=7"), "sgd", 0, options)
    assert path.read_bytes() == before
    assert run(load("task.hidden=7"), "sgd", 0, dataclasses.replace(options, force=True)).end


def test_an_unfinished_record_without_its_checkpoint_is_not_thrown_away(load, options, interrupt):
    break_off(interrupt, 15, load(), "sgd", options)
    (options.results_dir / "checkpoints" / "toy" / "tiny" / "sgd-seed0.pt").unlink()
    with pytest.raises(UserError, match=r"its checkpoint .* is missing; start over with --force"):
        run(load(), "sgd", 0, options)


def test_a_record_behind_its_checkpoint_is_said_before_anything_is_trained(load, options, interrupt):
    break_off(interrupt, 15, load(), "sgd", options)
    path = options.results_dir / "toy" / "tiny" / "runs" / "sgd-seed0.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    before = path.read_bytes()
    interrupt(1)
    with pytest.raises(UserError, match=r"ends after epoch 0, its checkpoint .* is of epoch"):
        run(load(), "sgd", 0, options)
    assert path.read_bytes() == before


def test_a_resumed_run_names_what_it_was_resumed_on(load, options, interrupt):
    break_off(interrupt, 15, load(), "sgd", options)
    record = run(load(), "sgd", 0, options)
    assert [each.device for each in record.resumed] == [device_name("cpu")]
    assert record.devices == (device_name("cpu"),)
    elsewhere = dataclasses.replace(record.resumed[0], device="another")
    assert dataclasses.replace(record, resumed=(elsewhere,)).devices == tuple(sorted(["another", device_name("cpu")]))


def test_an_evaluation_that_cannot_begin_leaves_the_record_before(load, options, interrupt, monkeypatch):
    break_off(interrupt, 9, load(), "sgd", options)
    path = options.results_dir / "toy" / "tiny" / "runs" / "sgd-seed0.jsonl"
    before = path.read_bytes()

    def fails(*_):
        raise UserError("the split is empty")

    monkeypatch.setattr(toy.Toy, "evaluate", fails)
    with pytest.raises(UserError, match="the split is empty"):
        run(load(), "sgd", 0, dataclasses.replace(options, force=True))
    assert path.read_bytes() == before


def test_a_record_cut_off_in_its_last_line_is_mended(load, options, interrupt):
    break_off(interrupt, 9, load(), "sgd", options)
    path = options.results_dir / "toy" / "tiny" / "runs" / "sgd-seed0.jsonl"
    with path.open("ab") as file:
        file.write(b'{"event": "epoch", "epo')
    assert len(run(load(), "sgd", 0, options).epochs) == 4


def test_a_damaged_record_is_left_alone(load, options):
    path = run(load(), "sgd", 0, options).path
    path.write_text("{}\n")
    with pytest.raises(UserError, match="line 1: not a line of a run record"):
        run(load(), "sgd", 0, options)
    assert path.read_text() == "{}\n"


def test_a_step_on_two_batches_is_a_step_on_the_joint_batch(load, options, tmp_path):
    joint = run(load("task.dropout=0.0"), "ngplus", 0, options)
    other = dataclasses.replace(options, results_dir=tmp_path / "accumulated")
    halves = run(load("task.dropout=0.0", "task.batch_size=4", "run.accumulate=2"), "ngplus", 0, other)
    assert [epoch.step for epoch in halves.epochs] == [epoch.step for epoch in joint.epochs]
    for ours, theirs in zip(halves.epochs, joint.epochs, strict=True):
        assert ours.eval_loss == pytest.approx(theirs.eval_loss, rel=1e-4)
        assert ours.lr == theirs.lr


def test_the_last_step_of_an_epoch_takes_the_batches_that_are_left(load, options):
    record = run(load("run.accumulate=4"), "sgd", 0, options)
    assert [epoch.step for epoch in record.epochs] == [0, 2, 4, 6]


def test_bf16_differs_from_float32_by_its_rounding_only(load, options, tmp_path):
    exact = run(load(), "ngplus", 0, options)
    rounded = run(
        load('run.precision="bf16"'), "ngplus", 0, dataclasses.replace(options, results_dir=tmp_path / "bf16")
    )
    assert rounded.epochs[3].eval_loss != exact.epochs[3].eval_loss
    assert rounded.epochs[3].eval_loss == pytest.approx(exact.epochs[3].eval_loss, rel=0.1)


def test_a_run_that_is_no_number_any_more_ends_as_diverged(load, options):
    record = run(load("task.poison=2", "task.dropout=0.0"), "sgd", 0, options)
    assert record.end.reason == "diverged"
    assert len(record.epochs) == 2
    assert record.epochs[1].eval_loss is None


def test_ngplus_skips_a_batch_that_is_no_number_and_goes_on(load, options):
    record = run(load("task.poison=2", "task.dropout=0.0"), "ngplus", 0, options)
    assert record.end.reason == "finished"
    assert all(math.isfinite(epoch.train_loss) for epoch in record.epochs[1:])
    assert record.epochs[3].metric < record.epochs[0].metric


def test_an_unknown_optimizer_lists_what_there_is(load, options):
    with pytest.raises(UserError, match=r"optimizer = 'kfac': not in .*tiny\.toml; must be one of adam, ngplus, sgd"):
        run(load(), "kfac", 0, options)


def test_a_setting_that_the_optimizer_refuses_names_the_recipe(load, options):
    with pytest.raises(UserError, match=r"tiny\.toml: \[optimizers\.ngplus\]: damping"):
        run(load("optimizers.ngplus.damping=-1.0"), "ngplus", 0, options)


def test_cuda_is_not_asked_for_where_there_is_none(load, options, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch finds no CUDA device"):
        run(load(), "sgd", 0, dataclasses.replace(options, device="cuda"))
    with pytest.raises(UserError, match="device = 'tpu': must be one of auto, cpu, cuda"):
        run(load(), "sgd", 0, dataclasses.replace(options, device="tpu"))


def test_a_task_that_yields_less_than_it_says_is_a_bug_and_said(load, options, monkeypatch):
    monkeypatch.setattr(toy.Toy, "steps_per_epoch", lambda self: 7)
    with pytest.raises(RuntimeError, match=r"toy: steps_per_epoch\(\) is 7"):
        run(load(), "sgd", 0, options)


def test_tensorboard_files_are_written_where_asked_for(load, options):
    run(load(), "sgd", 0, dataclasses.replace(options, tensorboard=True))
    assert list((options.results_dir / "tensorboard" / "toy" / "tiny" / "sgd-seed0").glob("events*"))


def test_one_line_an_epoch_where_there_is_no_terminal(load, options, capsys):
    run(load(), "sgd", 0, options)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"sgd seed 0: toy tiny, toy numbers, {device_name('cpu')}"
    assert lines[2].startswith("sgd seed 0: epoch 1/3  train loss 0.")
    assert lines[-1].startswith("sgd seed 0: finished after")


def test_the_record_on_disk_is_the_record_returned(load, options):
    record = run(load(), "adam", 1, options)
    assert read_run(options.results_dir / "toy" / "tiny" / "runs" / "adam-seed1.jsonl") == record
