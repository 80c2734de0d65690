import dataclasses
import errno
import json
import math
import os

import pytest

from experiments.records.record_writer import RecordWriter
from experiments.records.run_record import End, Epoch, Manifest, RecordError, Resumed, read_run, read_runs
from experiments.tasks.protocol import DatasetInfo, Metric

MANIFEST = Manifest(
    schema=1,
    task="toy",
    scale="tiny",
    optimizer="sgd",
    seed=3,
    recipe={"task": {"batch_size": 8}, "run": {"seeds": [0, 1]}, "optimizer": {"lr": 0.1}},
    git_sha=None,
    git_dirty=None,
    versions={"python": "3.12"},
    device="cpu",
    threads=1,
    world_size=1,
    dataset=DatasetInfo(name="Zahlen, größere", sha256="0", licence="MIT", train_size=8, eval_size=2),
    metric=Metric(name="mse", unit="1", higher_is_better=False),
    target=None,
    epochs=2,
    started_at="2026-01-01T00:00:00+00:00",
)


def epoch(number: int, loss: float | None = 0.5) -> Epoch:
    return Epoch(
        epoch=number,
        step=10 * number,
        train_loss=None if number == 0 else loss,
        eval_loss=loss,
        metric=loss,
        seconds=1.5 * number,
        peak_memory_mb=100.0,
        curvature_s=None,
        inverse_s=None,
        apply_s=None,
        lr=0.1,
        damping=None,
    )


END = End(reason="finished", seconds=3.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "sgd-seed3.jsonl"


def written(path, *events):
    with RecordWriter(path) as writer:
        for event in events:
            writer.write(event)
    return path


def test_what_was_written_is_read(path):
    resumed = Resumed(epoch=1, step=12, seconds=1.8, at="2026-01-01T01:00:00+00:00")
    run = read_run(written(path, MANIFEST, epoch(0), epoch(1), resumed, epoch(2), END))
    assert run.manifest == MANIFEST
    assert run.epochs == (epoch(0), epoch(1), epoch(2))
    assert run.resumed == (resumed,)
    assert run.end == END
    assert not run.truncated


def test_a_line_is_the_documented_json(path):
    lines = [json.loads(line) for line in written(path, MANIFEST, epoch(1)).read_text().splitlines()]
    assert lines[0]["event"] == "manifest"
    assert lines[0]["schema"] == 1
    assert lines[0]["dataset"] == {
        "name": "Zahlen, größere",
        "sha256": "0",
        "licence": "MIT",
        "train_size": 8,
        "eval_size": 2,
    }
    assert list(lines[1]) == ["event", *(field.name for field in dataclasses.fields(Epoch))]


def test_each_line_is_on_the_disk_before_the_next_begins(path):
    with RecordWriter(path) as writer:
        writer.write(MANIFEST)
        writer.write(epoch(0))
        assert read_run(path).epochs == (epoch(0),)


def test_a_figure_that_is_not_finite_is_null(path):
    run = read_run(written(path, MANIFEST, epoch(0), epoch(1, math.nan), epoch(2, math.inf)))
    assert [each.train_loss for each in run.epochs] == [None, None, None]


def test_a_cut_off_last_line_is_left_out_and_reported(path):
    written(path, MANIFEST, epoch(0), epoch(1))
    path.write_bytes(path.read_bytes()[:-20])
    run = read_run(path)
    assert run.truncated
    assert run.epochs == (epoch(0),)
    assert read_runs(path.parent) == ([run], [f"{path}: the last line was cut off and is left out"])


def test_going_back_drops_later_epochs_and_a_cut_off_line(path):
    resumed = Resumed(epoch=1, step=12, seconds=1.8, at="now")
    written(path, MANIFEST, epoch(0), epoch(1), resumed, epoch(2))
    path.write_bytes(path.read_bytes() + b'{"event": "ep')
    with RecordWriter(path) as writer:
        writer.rewind(1)
        writer.write(epoch(2, 0.25))
    run = read_run(path)
    assert (run.epochs, run.resumed) == ((epoch(0), epoch(1), epoch(2, 0.25)), (resumed,))
    with RecordWriter(path) as writer:
        writer.rewind(None)
    assert path.read_bytes() == b""


def test_a_full_disk_is_said_and_nothing_earlier_is_lost(path, monkeypatch):
    written(path, MANIFEST, epoch(0))
    before = path.read_bytes()
    real = os.write

    def full_after_ten_bytes(descriptor, data):
        if len(data) < 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[:-90])

    monkeypatch.setattr(os, "write", full_after_ten_bytes)
    with RecordWriter(path) as writer, pytest.raises(RecordError, match=r"seed3\.jsonl.*the disk is full"):
        writer.write(epoch(1))
    assert path.read_bytes() == before


def test_two_processes_cannot_write_the_same_run(path):
    with RecordWriter(path), pytest.raises(RecordError, match="another process is writing this run"):
        RecordWriter(path)


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RecordError, match="cannot be written"):
        RecordWriter(tmp_path / "runs" / "x.jsonl")


def line(event, **changes) -> str:
    return json.dumps({"event": event.event} | dataclasses.asdict(event) | changes) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: not a run record"),
        (line(epoch(0)), "line 1: not a run record"),
        ("[1]\n", r"line 1: not a line of a run record \(event = None\)"),
        (line(MANIFEST) + "{broken\n" + line(epoch(0)), "line 2: not JSON"),
        (line(MANIFEST) + '{"event": "batch"}\n', "line 2: not a line of a run record"),
        (line(MANIFEST, schema=2), "line 1: schema = 2: this version reads schema 1"),
        (line(MANIFEST, colour="red"), "line 1: colour = 'red': unknown key"),
        (line(MANIFEST) + line(epoch(0), step="ten"), "line 2: step = 'ten': must be an integer"),
        (line(MANIFEST) + line(epoch(1)), "line 2: epoch 1 where epoch 0 should be"),
        (line(MANIFEST) + line(MANIFEST), "line 2: a second manifest"),
        (line(MANIFEST) + line(END) + line(epoch(0)), "line 3: something follows the end"),
        (line(MANIFEST) + line(END), "line 2: finished after 0 of .* lines of epochs"),
        (line(MANIFEST, seed=4), "is the record of .*, seed 4: must be called"),
        (line(MANIFEST) + '{"event": {}}\n', r"line 2: not a line of a run record \(event = {}\)"),
        (line(MANIFEST) + "[" * 100_000 + "\n", "line 2: not JSON"),
        (line(MANIFEST) + line(epoch(0), metric=10**400), "line 2: metric = 1000.*: must be finite"),
        (line(MANIFEST) + line(epoch(0), seconds=float("nan")), "line 2: seconds = nan: must be finite"),
        (line(MANIFEST) + line(epoch(0), seconds=2.0) + line(epoch(1), seconds=1.0), "line 3: seconds fall"),
    ],
)
def test_a_foreign_or_damaged_record_names_file_and_line(path, text, message):
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(RecordError, match=message) as error:
        read_run(path)
    assert str(path) in str(error.value)
    good = written(path.with_name("sgd-seed0.jsonl"), dataclasses.replace(MANIFEST, seed=0), epoch(0))
    runs, warnings = read_runs(path.parent)
    assert [run.path for run in runs] == [good]
    assert warnings == [str(error.value)]
