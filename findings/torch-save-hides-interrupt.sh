#!/usr/bin/env bash
# torch 2.14.1: an exception that is raised while `torch.save` writes to a file object never arrives. The archive's
# writer is closed on the way out, finds fewer bytes than it expects, and raises "unexpected pos" instead. So a full
# disk, a KeyboardInterrupt, or the SystemExit of a signal's handler (which is how job managers ask for a checkpoint and
# an end) becomes a RuntimeError: `except OSError` and `except KeyboardInterrupt` do not catch it, and a process that was
# to exit with status 130 ends with a traceback and status 1. The exception is left in `__context__`. One that is raised
# at the first write arrives as it is.
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
cd "$dir"
venv/bin/pip install --quiet torch==2.14.1 numpy==2.3.5 >pip.log 2>&1 ||
  { cat pip.log; exit 2; }

cat >check.py <<'PY'
import io
from importlib.metadata import version

import torch


class Ending(io.BytesIO):
    """A file of which one write ends in an exception."""

    def __init__(self, exception, at):
        super().__init__()
        self.exception, self.left = exception, at

    def write(self, data):
        self.left -= 1
        if self.left == 0:
            raise self.exception
        return super().write(data)


def arrives(exception, at):
    try:
        torch.save({"weight": torch.zeros(1000)}, Ending(exception, at))
    except BaseException as error:
        return type(error).__name__, str(error).partition(" . ")[2][:14], type(error.__context__).__name__
    return "nothing", "", ""


print("torch", version("torch"))
for exception in (OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(130)):
    name = type(exception).__name__
    first, later = arrives(exception, 1), arrives(exception, 3)
    print(f"{name:18} at the first write: {first[0]}; at the third: {later[0]} ({later[1]}), its __context__ {later[2]}")
    assert first[0] == name
    assert later == ("RuntimeError", "unexpected pos", name)
print("expected: the same exception at every write")
PY
venv/bin/python -W ignore check.py
