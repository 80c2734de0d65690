import errno
import io

import pytest
import torch
from torch import nn

from experiments.training.checkpoint import (
    Checkpointed,
    CheckpointError,
    Position,
    load_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from experiments.training.timing import TimeSplit

IDENTITY = {"task": "toy", "seed": 0, "optimizer.lr": 0.1}


def parts(width: int = 3, layers: int = 1) -> Checkpointed:
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    return Checkpointed(model=model, optimizer=optimizer, schedules=[schedule])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "toy" / "sgd.pt"


def test_what_was_saved_is_restored(path):
    saved, fresh = parts(), parts()
    saved.optimizer.step()
    saved.schedules[0].step()
    times = TimeSplit(curvature_s=1.0, inverse_s=None, apply_s=2.0)
    position = Position(epoch=2, step=7, batches=3, seconds=1.25, times=times, ranks=[{"rng": rng_state()}])
    save_checkpoint(path, saved, position, IDENTITY)
    loaded = load_checkpoint(path, fresh, IDENTITY)
    assert (loaded.epoch, loaded.step, loaded.batches, loaded.seconds, loaded.times) == (2, 7, 3, 1.25, times)
    for own, other in zip(saved.model.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(own, other)
        buffers = [each.optimizer.state[p]["momentum_buffer"] for each, p in ((saved, own), (fresh, other))]
        assert torch.equal(*buffers)
    assert fresh.schedules[0].last_epoch == 1


def test_the_random_state_is_restored(path):
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002

    state = rng_state()
    first = draw()
    draw()
    save_checkpoint(path, parts(), Position(ranks=[state]), IDENTITY)
    set_rng_state(load_checkpoint(path, parts(), IDENTITY).ranks[0])
    assert draw() == first


def test_a_checkpoint_of_another_run_is_refused(path):
    save_checkpoint(path, parts(), Position(), IDENTITY)
    with pytest.raises(CheckpointError, match=r"sgd\.pt: is of another run: optimizer\.lr is 0\.1 there and 0\.2 here"):
        load_checkpoint(path, parts(), IDENTITY | {"optimizer.lr": 0.2})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (parts(width=4), r"0\.bias is \(3,\) there and \(4,\) here; 0\.weight is \(3, 3\) there and \(4, 4\) here"),
        (parts(layers=2), r"1\.bias is missing there and \(3,\) here"),
        (parts(layers=4), "and 3 more"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(path, other, message):
    save_checkpoint(path, parts(), Position(), IDENTITY)
    before = [parameter.clone() for parameter in other.model.parameters()]
    with pytest.raises(CheckpointError, match="is of another model: .*" + message):
        load_checkpoint(path, other, IDENTITY)
    assert all(map(torch.equal, before, other.model.parameters()))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_damaged_file_is_refused(path, content):
    save_checkpoint(path, parts(), Position(), IDENTITY)
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    with pytest.raises(CheckpointError, match=r"not a checkpoint, or damaged; start over with --force"):
        load_checkpoint(path, parts(), IDENTITY)


def test_a_file_of_another_program_is_refused(path):
    path.parent.mkdir()
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of this program"):
        load_checkpoint(path, parts(), IDENTITY)


class EndingFile(io.FileIO):
    """A file whose third write ends in an exception."""

    def __init__(self, path, exception):
        super().__init__(path, "w")
        self._exception, self._writes = exception, 0

    def write(self, data):
        self._writes += 1
        if self._writes == 3:
            raise self._exception
        return super().write(data)


@pytest.mark.parametrize(
    ("exception", "seen"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), CheckpointError),
        (SystemExit(130), SystemExit),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_what_ends_a_write_half_way_is_raised_and_the_checkpoint_before_stays(path, monkeypatch, exception, seen):
    save_checkpoint(path, parts(), Position(step=1), IDENTITY)
    with monkeypatch.context() as patch:
        patch.setattr(type(path), "open", lambda self, *_: EndingFile(self, exception))
        with pytest.raises(seen):
            save_checkpoint(path, parts(), Position(step=2), IDENTITY)
    assert load_checkpoint(path, parts(), IDENTITY).step == 1


def test_a_full_disk_is_said_and_the_checkpoint_before_stays(path, monkeypatch):
    save_checkpoint(path, parts(), Position(step=1), IDENTITY)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"sgd\.pt: could not be written: the disk is full"):
        save_checkpoint(path, parts(), Position(step=2), IDENTITY)
    assert load_checkpoint(path, parts(), IDENTITY).step == 1
    assert [each.name for each in path.parent.iterdir()] == ["sgd.pt"]


@pytest.mark.parametrize("where", [0.3, 0.5, 0.7])
def test_a_changed_byte_is_noticed(path, where):
    save_checkpoint(path, parts(width=100), Position(), IDENTITY)
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a checkpoint, or damaged; start over with --force"):
        load_checkpoint(path, parts(width=100), IDENTITY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identity": []}, "not a checkpoint of this program"),
        ({"schedules": None}, "not a checkpoint of this program"),
        ({"schedules": []}, "has 0 schedules where there are 1"),
        ({"position": {"epoch": 1}}, "does not say where the run was"),
        ({"position": {"colour": 1, "times": {}}}, "does not say where the run was"),
    ],
)
def test_a_checkpoint_of_another_form_is_refused(path, change, message):
    save_checkpoint(path, parts(), Position(), IDENTITY)
    torch.save(torch.load(path) | change, path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, parts(), IDENTITY)
