"""Writing run records: each line is on the disk before the run goes on."""

import fcntl
import json
import math
import os
from pathlib import Path
from typing import Any

from experiments.dataclass_io import to_table
from experiments.errors import write_failure
from experiments.records.run_record import End, Epoch, Event, RecordError, parse_event, record_lines


class RecordWriter:
    """Appends events to a record; each line is on the disk before `write` returns.

    Holds a lock on the file, so that two processes cannot run the same run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise RecordError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise RecordError(f"{path}: another process is writing this run") from None

    def rewind(self, epoch: int | None) -> None:
        """Go back to where `epoch` was the last one recorded; ``None`` drops everything."""
        self._file.truncate(0 if epoch is None else _find_end_of_epoch(self.path, epoch))

    def write(self, event: Event) -> None:
        """Append one event.

        Args:
            event: what is written as one line.

        Raises:
            RecordError: when the disk is full or fails; the lines before are kept whole.
        """
        fields = {"event": event.event} | _replace_nonfinite(to_table(event))
        line = json.dumps(fields, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        before = os.fstat(self._file.fileno()).st_size
        try:
            _write_all(self._file.fileno(), line)
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(before)
            raise RecordError(write_failure(self.path, error)) from error

    def close(self) -> None:
        """Release the file and its lock."""
        self._file.close()

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _replace_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _replace_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _find_end_of_epoch(path: Path, epoch: int) -> int:
    """The offset of the first line that is later than `epoch` or was cut off."""
    offset = 0
    for number, line in enumerate(record_lines(path), 1):
        if not line.endswith(b"\n"):
            break
        event = parse_event(line, path, number)
        if isinstance(event, End) or (isinstance(event, Epoch) and event.epoch > epoch):
            break
        offset += len(line)
    return offset
