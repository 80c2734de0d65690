"""Errors that a user can fix: the command line prints them as one line and exits with status 2."""

import errno
from pathlib import Path


class UserError(Exception):
    """Something in a recipe, a file or a command that its owner can put right; the message says how."""


def write_failure(path: Path, error: OSError) -> str:
    """What to tell a user whose disk did not take a line or a checkpoint.

    Args:
        path: that was written to.
        error: what the system said.

    Returns:
        One line that names the file, the reason and the remedy.
    """
    what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error.strerror or error)
    return (
        f"{path}: could not be written: {what}; nothing written before is lost: "
        "make room, and the same command goes on from the last checkpoint"
    )
