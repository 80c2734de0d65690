import json
import multiprocessing
import os
import time

import numpy as np
import pytest

from experiments.data_io import array_folder
from experiments.data_io.array_folder import folder_sha256, open_folder, prepare_folder
from experiments.data_io.checksum import DataFileError
from experiments.data_io.source_identity import identify_jointly

ARRAYS = {"numbers": np.arange(7, dtype=np.uint8), "positions": np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)}
WHAT = {"data": "made up", "cutoff": 5.0}


def prepare(folder, build=lambda: ARRAYS, what=WHAT):
    return prepare_folder(folder, what, build, remedy="make it again")


def never():
    raise AssertionError("built again")


def test_the_arrays_come_back_as_they_were(tmp_path):
    folder = prepare(tmp_path / "there")
    opened = open_folder(folder, WHAT, remedy="")
    assert opened.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert opened[name].dtype == array.dtype
        assert opened[name].tolist() == array.tolist()


def test_a_whole_folder_is_not_built_again(tmp_path):
    first = prepare(tmp_path / "there")
    assert prepare(tmp_path / "there", never) == first


def test_the_same_arrays_have_the_same_checksum(tmp_path):
    one, two = prepare(tmp_path / "one"), prepare(tmp_path / "two")
    other = prepare(tmp_path / "other", lambda: {**ARRAYS, "numbers": ARRAYS["numbers"] + 1})
    assert folder_sha256(one) == folder_sha256(two) != folder_sha256(other)


def damage_bytes(folder):
    path = folder / "positions.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")


def cut_short(folder):
    path = folder / "positions.npy"
    path.write_bytes(path.read_bytes()[:-5])


def another_version(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 0}))


DAMAGES = {
    damage_bytes: r"positions\.npy is truncated or damaged",
    cut_short: r"positions\.npy is truncated or damaged",
    lambda folder: (folder / "numbers.npy").unlink(): r"numbers\.npy is missing",
    lambda folder: (folder / "manifest.json").unlink(): r"manifest\.json is missing",
    lambda folder: (folder / "manifest.json").write_text("{"): r"manifest\.json is damaged",
    lambda folder: (folder / "manifest.json").write_text("[]"): r"manifest\.json is no manifest",
    another_version: r"version is 0, must be 1",
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.items())
def test_a_damaged_folder_is_refused_and_replaced(tmp_path, damage, message):
    folder = prepare(tmp_path / "there")
    damage(folder)
    with pytest.raises(DataFileError, match=message) as caught:
        open_folder(folder, WHAT, remedy="make it again")
    assert str(caught.value).endswith("make it again")
    prepare(folder)
    open_folder(folder, WHAT, remedy="")


def test_a_folder_of_something_else_is_refused_and_replaced(tmp_path):
    folder = prepare(tmp_path / "there")
    other = {**WHAT, "cutoff": 4.0}
    with pytest.raises(DataFileError, match=r"description is .*5\.0.*must be .*4\.0"):
        open_folder(folder, other, remedy="")
    prepare(folder, what=other)
    open_folder(folder, other, remedy="")


# --- a source that may change


@pytest.fixture
def source(tmp_path):
    """A file, and a function that puts its content into a folder."""
    path = tmp_path / "source.txt"
    path.write_text("12")

    def parse(build=None):
        def read():
            return {"digits": np.array([int(digit) for digit in path.read_text()])}

        folder = prepare_folder(
            tmp_path / "there", WHAT, build or read, remedy="", source=lambda: identify_jointly([path])
        )
        return open_folder(folder, WHAT, remedy="")["digits"].tolist()

    return path, parse


def test_a_source_that_was_corrected_in_place_is_parsed_again(source):
    path, parse = source
    assert parse() == [1, 2]
    assert parse(never) == [1, 2]
    path.write_text("13")
    assert parse() == [1, 3]


def test_what_the_folder_is_known_by_is_its_content_and_not_when_the_source_was_written(source):
    path, parse = source
    parse()
    digest = folder_sha256(path.parent / "there")
    os.utime(path, ns=(0, 0))
    parse()
    assert folder_sha256(path.parent / "there") == digest


@pytest.mark.parametrize("left", [None, "{", "[]", "{}"])
def test_a_folder_that_does_not_say_what_it_was_made_of_is_made_again(source, left):
    path, parse = source
    parse()
    mark = path.parent / "there" / "source.json"
    mark.unlink() if left is None else mark.write_text(left)
    with pytest.raises(AssertionError, match="built again"):
        parse(never)


def test_another_file_of_the_same_size_and_time_is_another_source(tmp_path):
    identities = []
    for name in ("one", "two"):
        (tmp_path / name).write_text("12")
        os.utime(tmp_path / name, ns=(0, 0))
        identities.append(identify_jointly([tmp_path / name]))
    assert identities[0] != identities[1]


def test_a_source_that_changes_while_it_is_read_leaves_nothing(source):
    path, parse = source

    def build():
        path.write_text("134")
        return ARRAYS

    with pytest.raises(DataFileError, match=r"the source of .*there was changed while it was read"):
        parse(build)
    assert not (path.parent / "there").exists()
    assert parse() == [1, 3, 4]


def test_nothing_is_left_of_a_build_that_fails(tmp_path):
    class Full(dict):
        def items(self):
            yield "numbers", ARRAYS["numbers"]
            raise OSError("no space left")

    def fails():
        raise ValueError("no good")

    for build, error in ((fails, ValueError), (Full, OSError)):
        with pytest.raises(error):
            prepare(tmp_path / "there", build)
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_what_a_killed_process_left_is_swept_away(tmp_path):
    left = tmp_path / ".there.partial"
    left.mkdir()
    (left / "numbers.npy").write_bytes(b"half")
    prepare(tmp_path / "there")
    assert not left.exists()


def slow_build(folder, log):
    def build():
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.3)
        return ARRAYS

    array_folder.prepare_folder(folder, WHAT, build, remedy="")


def test_two_processes_at_once_build_it_once(tmp_path):
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=slow_build, args=(tmp_path / "there", log)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert log.read_text() == "built\n"
    open_folder(tmp_path / "there", WHAT, remedy="")
