"""Arrays kept as a folder of ``.npy`` files with a manifest: written once, opened in seconds, checked each time.

Where they were parsed from files that may change, ``source.json`` says which these were, see `source_identity`.

A folder appears under its name only when it is whole, so that a kill at any moment leaves nothing half
written; two processes that prepare the same one agree by a lock file, and the later finds it done.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from experiments.data_io.checksum import DataFileError, compute_sha256, verify
from experiments.data_io.source_identity import SOURCE, Identity, check_unchanged, read_table, write_identity

VERSION = 1
MANIFEST = "manifest.json"


def prepare_folder(
    folder: Path,
    description: Mapping[str, Any],
    build: Callable[[], Mapping[str, np.ndarray]],
    *,
    remedy: str,
    source: Callable[[], Identity] | None = None,
) -> Path:
    """Make the folder unless a whole one of this description and source is there, and return it.

    A damaged folder, or one of another version, description or source, is replaced.

    Args:
        folder: where the arrays go.
        description: what they are, plain values; another description is another content.
        build: makes them.
        remedy: see `open_folder`.
        source: what the files that `build` reads are known by now; left out if none of them can change.

    Returns:
        The folder.

    Raises:
        DataFileError: the source was changed while it was read.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        before = source() if source else None
        if not _is_whole(folder, description, before):
            arrays = build()
            if source:
                check_unchanged(f"the source of {folder}", before, source())
            _write(folder, description, before, arrays)
    return folder


def _is_whole(folder: Path, description: Mapping[str, Any], source: Identity | None) -> bool:
    try:
        open_folder(folder, description, remedy="")
    except DataFileError:
        return False
    return read_table(folder / SOURCE) == source


def open_folder(folder: Path, description: Mapping[str, Any], *, remedy: str) -> dict[str, np.ndarray]:
    """The arrays by name, mapped from disk, read-only.

    Args:
        folder: made by `prepare_folder`.
        description: what they must be.
        remedy: what the reader of an error can do about it, e.g. ``"run `make data-qm9`"``.

    Returns:
        Arrays by name.

    Raises:
        DataFileError: the folder is missing, of another version or content, or a file in it is missing, cut
            short or changed. Names the file, what was expected and what was found.
    """
    manifest = _read_manifest(folder / MANIFEST, remedy)
    for key, wanted in {"version": VERSION, "description": dict(description)}.items():
        if manifest.get(key) != wanted:
            raise DataFileError(f"{folder}: {key} is {manifest.get(key)!r}, must be {wanted!r}: {remedy}")
    for name, digest in manifest["sha256"].items():
        verify(folder / f"{name}.npy", digest, remedy=remedy)
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in manifest["sha256"]}


def folder_sha256(folder: Path) -> str:
    """The SHA-256 of the manifest, which holds those of the arrays.

    Args:
        folder: from `prepare_folder`.

    Returns:
        In hexadecimal.
    """
    return compute_sha256(folder / MANIFEST)


def _read_manifest(path: Path, remedy: str) -> dict[str, Any]:
    if not path.is_file():
        raise DataFileError(f"{path} is missing: {remedy}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataFileError(f"{path} is damaged: {error}: {remedy}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("sha256"), dict):
        raise DataFileError(f"{path} is no manifest of arrays: {remedy}")
    return manifest


def _write(
    folder: Path, description: Mapping[str, Any], source: Identity | None, arrays: Mapping[str, np.ndarray]
) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: the lock is ours
    partial.mkdir()
    try:
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array, allow_pickle=False)
        digests = {name: compute_sha256(partial / f"{name}.npy") for name in arrays}
        manifest = {"version": VERSION, "description": dict(description), "sha256": digests}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if source is not None:
            write_identity(partial, source)
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
