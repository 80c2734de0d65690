import gzip
import json
import resource
import threading
from collections import Counter

import numpy as np
import pytest

from experiments.data_io.checksum import DataFileError
from experiments.data_io.source_identity import SOURCE
from experiments.tasks.datasets import PREPARE
from experiments.tasks.dlrm import criteo, criteo_columns, criteo_format, criteo_pieces
from experiments.tasks.dlrm.criteo_columns import make_columns, rank_column
from experiments.tasks.dlrm.criteo_pieces import make_pieces
from tests.experiments.cases.criteo_text import make_lines, put_log, text_of

LINES = make_lines(500)
TEXT = text_of(LINES)
PIECE = 10_000  # bytes, a dozen pieces


@pytest.fixture
def source(tmp_path):
    return put_log(tmp_path, TEXT)


def prepare(source, data_dir):
    make_columns(source, criteo_format.columns_path(data_dir), piece_size=PIECE)
    return criteo.load(data_dir)


def content(folder):
    """Of the columns and their manifest, without the marks of when they were written."""
    marks = (SOURCE, criteo_format.CHECKED)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in marks}


def test_the_columns_are_what_the_lines_say_in_their_order(source, tmp_path):
    clicks, _ = prepare(source, tmp_path)
    assert clicks.labels.tolist() == [int(fields[0]) for fields in LINES]
    assert np.allclose(clicks.dense, [[np.log1p(max(int(f or 0), 0)) for f in fields[1:14]] for fields in LINES])
    assert (clicks.dense.dtype, clicks.categories.dtype, clicks.labels.dtype) == (np.float32, np.int32, np.uint8)
    for j in range(26):
        column = [int(fields[14 + j] or "0", 16) for fields in LINES]
        counter = Counter(column[: 500 - 71])
        expected = sorted(set(column), key=lambda value: (-counter[value], value))
        values, counts = clicks.vocabulary.column(j)
        assert values.tolist() == expected
        assert counts.tolist() == [counter[value] for value in expected]
        assert [expected[rank] for rank in clicks.categories[:, j]] == column


def test_the_last_seventh_is_the_test_and_the_columns_are_maps(source, tmp_path):
    clicks, _ = prepare(source, tmp_path)
    assert clicks.parts == {"train": (0, 429), "validation": (429, 429), "test": (429, 500)}
    assert all(isinstance(array, np.memmap) for array in (clicks.dense, clicks.categories, clicks.labels))
    held_out, _ = criteo.load(tmp_path, validation_size=100)
    assert held_out.parts == {"train": (0, 329), "validation": (329, 429), "test": (429, 500)}
    with pytest.raises(ValueError, match="validation_size = 429: must be less than the 429 lines"):
        criteo.load(tmp_path, validation_size=429)


@pytest.mark.parametrize("size", [1, 100, 201, 1000, 10**6])
def test_pieces_of_any_size_hold_the_same_lines(size, tmp_path):
    lines = LINES[:30]
    pieces = make_pieces(put_log(tmp_path, text_of(lines)), tmp_path / "pieces", size=size)
    labels = np.concatenate([piece.array("labels") for piece in pieces])
    categories = np.concatenate([piece.array("categories") for piece in pieces], axis=1)
    assert labels.tolist() == [int(fields[0]) for fields in lines]
    assert categories.T.tolist() == [[int(field or "0", 16) for field in fields[14:]] for fields in lines]


def test_ranking_a_column_is_counting_its_values():
    column = np.random.default_rng(0).integers(0, 50, 400).astype(np.uint32) * np.uint32(85_899_345)
    ranks, values, counts = rank_column(column, 300)
    counter = Counter(column[:300].tolist())
    expected = sorted(set(column.tolist()), key=lambda value: (-counter[value], value))
    assert values.tolist() == expected
    assert counts.tolist() == [counter[value] for value in expected]
    assert values[ranks].tolist() == column.tolist()


def test_prepared_once_it_is_not_read_again(source, tmp_path, monkeypatch):
    folder = PREPARE["criteo"](tmp_path)
    before = content(folder)
    source.unlink()
    assert PREPARE["criteo"](tmp_path) == folder
    assert content(folder) == before
    assert sorted(path.name for path in (tmp_path / "criteo").iterdir()) == [".prepared.lock", "prepared"]


@pytest.mark.parametrize("stage", ["parse", "rank_column", "_write_manifest"])
def test_a_preparation_that_was_stopped_goes_on_from_there_and_ends_the_same(stage, source, tmp_path, monkeypatch):
    prepare(source, tmp_path / "whole")
    module = criteo_pieces if stage == "parse" else criteo_columns
    original, calls = getattr(module, stage), []

    def stopping(*arguments):
        calls.append(threading.current_thread())
        if len(calls) > 4 or stage == "_write_manifest":
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(module, stage, stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path)
    assert not criteo_format.columns_path(tmp_path).exists()

    again = []
    monkeypatch.setattr(module, stage, lambda *arguments: again.append(1) or original(*arguments))
    prepare(source, tmp_path)
    total = {"parse": -(-len(TEXT) // PIECE), "rank_column": 26, "_write_manifest": 1}[stage]
    finished = 0 if stage == "_write_manifest" else 4
    assert len(again) == total - finished
    assert content(criteo_format.columns_path(tmp_path)) == content(criteo_format.columns_path(tmp_path / "whole"))


def test_a_piece_cut_short_is_made_again(source, tmp_path):
    pieces = make_pieces(source, tmp_path / "pieces", size=PIECE)
    for name, number in (("dense", 1), ("categories", 2), ("labels", 3)):
        path = pieces[number].stem.with_suffix(f".{name}.npy")
        path.write_bytes(path.read_bytes()[:-1])
    again = make_pieces(source, tmp_path / "pieces", size=PIECE)
    assert np.concatenate([piece.array("labels") for piece in again]).tolist() == [int(f[0]) for f in LINES]
    assert sum(len(piece.array("dense")) for piece in again) == 500
    assert sum(piece.array("categories").shape[1] for piece in again) == 500


def test_pieces_of_another_file_are_not_taken(source, tmp_path):
    make_pieces(source, tmp_path / "pieces", size=PIECE)
    source.write_bytes(text_of(LINES[::-1]))
    pieces = make_pieces(source, tmp_path / "pieces", size=PIECE)
    labels = np.concatenate([piece.array("labels") for piece in pieces])
    assert labels.tolist() == [int(fields[0]) for fields in LINES[::-1]]


def test_a_wrong_line_is_named_with_the_file_and_its_number_and_mended_it_goes_on(source, tmp_path):
    lines = make_lines(500)
    lines[321][20] = "nothex"
    source.write_bytes(text_of(lines))
    with pytest.raises(DataFileError, match=r"criteo/train\.txt, line 322: category 7 = 'nothex'"):
        prepare(source, tmp_path)
    assert not criteo_format.columns_path(tmp_path).exists()
    source.write_bytes(TEXT)
    assert len(prepare(source, tmp_path)[0].labels) == 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty"),
        (gzip.compress(TEXT), r"is compressed \(gzip\): unpack it"),
        (TEXT.replace(b"\n", b"\r\n"), "line 1: ends as on Windows"),
        (TEXT.replace(b"\n", b"\t"), "is longer than 65,536 bytes|has 20,000 columns"),
        (TEXT[: TEXT.index(b"\n") - 40], "line 1: has [0-9]+ columns"),
        (TEXT[: TEXT.rindex(b"\t") + 3], "line 500: category 26 = '[0-9a-f]{2}', where the file ends: it may be cut"),
        (TEXT[: TEXT.rindex(b"\t") + 1], "line 500: category 26 = '', where the file ends: it may be cut"),
    ],
)
def test_a_file_of_another_form_is_refused(text, message, tmp_path):
    source = put_log(tmp_path, text)
    with pytest.raises(DataFileError, match=rf"criteo/train\.txt.*({message})"):
        prepare(source, tmp_path)


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path):
    source = put_log(tmp_path, b"0" * 300_000)
    with pytest.raises(DataFileError, match="is longer than 65,536 bytes"):
        prepare(source, tmp_path)


def test_a_missing_file_says_what_to_put_where(tmp_path):
    with pytest.raises(DataFileError, match=r"criteo/train\.txt is missing: put train\.txt of the Criteo Kaggle"):
        PREPARE["criteo"](tmp_path)


@pytest.mark.parametrize("name", criteo_format.FILES)
def test_a_prepared_folder_cut_short_is_refused_and_made_again(name, source, tmp_path):
    folder = PREPARE["criteo"](tmp_path)
    before = content(folder)
    path = folder / f"{name}.npy"
    path.write_bytes(before[path.name][:-1])
    with pytest.raises(DataFileError, match=rf"{name}\.npy is cut short or damaged.*make data-criteo"):
        criteo.load(tmp_path)
    path.unlink()
    with pytest.raises(DataFileError, match=rf"{name}\.npy is missing.*make data-criteo"):
        criteo.load(tmp_path)
    PREPARE["criteo"](tmp_path)
    assert content(folder) == before


def test_a_manifest_that_is_missing_damaged_or_of_another_version_is_refused(source, tmp_path):
    path = PREPARE["criteo"](tmp_path) / criteo_format.MANIFEST
    manifest = json.loads(path.read_text())
    for text, message in [
        (json.dumps(manifest | {"version": 0}), "version = 0, must be 2"),
        ('{"version": 2', "is damaged"),
        ("[]", "is damaged"),
    ]:
        path.write_text(text)
        with pytest.raises(DataFileError, match=rf"manifest\.json.*{message}.*make data-criteo"):
            criteo.load(tmp_path)
    path.unlink()
    with pytest.raises(DataFileError, match=r"manifest\.json is missing: run `make data-criteo`"):
        criteo.load(tmp_path)


def test_a_disk_that_takes_no_more_is_reported_and_what_was_made_is_gone_on_from(source, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # pieces fit, the columns of all lines do not
    try:
        with pytest.raises(DataFileError, match=r"could not be written: File too large; .* goes on from"):
            prepare(source, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not criteo_format.columns_path(tmp_path).exists()
    assert not list((tmp_path / "criteo").rglob("*.partial"))
    assert (tmp_path / "criteo" / ".prepared.work" / "ranks-25.npy").is_file()
    assert len(prepare(source, tmp_path)[0].labels) == 500


def test_a_full_disk_is_called_so(source, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(criteo_columns, "write_npy", full)
    with pytest.raises(DataFileError, match="somewhere: could not be written: the disk is full: make room"):
        prepare(source, tmp_path)


def test_the_digest_names_the_data_and_not_when_it_was_read(source, tmp_path):
    _, first = prepare(source, tmp_path)
    other = put_log(tmp_path / "other", TEXT)
    assert prepare(other, tmp_path / "other")[1] == first
    lines = make_lines(500)
    lines[-1][0] = str(1 - int(lines[-1][0]))
    third = put_log(tmp_path / "third", text_of(lines))
    assert prepare(third, tmp_path / "third")[1] != first


def test_only_the_whole_log_is_called_criteo_kaggle(source, tmp_path, monkeypatch):
    clicks, _ = prepare(source, tmp_path)
    assert criteo.name_log(clicks) == "log in Criteo's format, 500 lines"
    monkeypatch.setattr(criteo, "OFFICIAL_LINES", 500)
    assert criteo.name_log(clicks) == "Criteo Kaggle"


def stopped_at(stage, source, tmp_path, monkeypatch):
    """A preparation that ends in the middle."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(criteo_columns, stage, stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, tmp_path)


@pytest.mark.parametrize("count", [500, 30])
@pytest.mark.parametrize("stage", ["_put_together", "_write_manifest"])
def test_nothing_that_was_made_of_another_file_is_taken(stage, count, source, tmp_path, monkeypatch):
    stopped_at(stage, source, tmp_path, monkeypatch)
    other = text_of(make_lines(500)[::-1][:count])
    source.write_bytes(other)
    prepare(source, tmp_path)
    prepare(put_log(tmp_path / "other", other), tmp_path / "other")
    assert content(criteo_format.columns_path(tmp_path)) == content(criteo_format.columns_path(tmp_path / "other"))


@pytest.mark.parametrize("missing", ["ranks", "values", "counts"])
def test_a_ranked_column_that_lacks_a_file_is_ranked_again(missing, source, tmp_path, monkeypatch):
    stopped_at("_put_together", source, tmp_path, monkeypatch)
    (tmp_path / "criteo" / ".prepared.work" / f"{missing}-05.npy").unlink()
    assert len(prepare(source, tmp_path)[0].labels) == 500


def test_another_file_is_not_trained_on_as_it_was_and_is_prepared_again(source, tmp_path):
    PREPARE["criteo"](tmp_path)
    source.write_bytes(text_of(LINES[:100]))
    with pytest.raises(
        DataFileError, match=r"train\.txt is not the file that .*prepared was made of.*make data-criteo"
    ):
        criteo.load(tmp_path)
    PREPARE["criteo"](tmp_path)
    assert len(criteo.load(tmp_path)[0].labels) == 100


def test_a_file_that_grows_while_it_is_read_is_refused(source, tmp_path, monkeypatch):
    put_together = criteo_columns._put_together

    def growing(*arguments):
        put_together(*arguments)
        source.write_bytes(TEXT + TEXT)

    with monkeypatch.context() as patch:
        patch.setattr(criteo_columns, "_put_together", growing)
        with pytest.raises(DataFileError, match=r"train\.txt was changed while it was read"):
            prepare(source, tmp_path)
    assert not criteo_format.columns_path(tmp_path).exists()
    assert len(prepare(source, tmp_path)[0].labels) == 1000


def test_what_a_kill_at_the_very_end_left_is_cleared_away(source, tmp_path):
    folder = PREPARE["criteo"](tmp_path)
    work = tmp_path / "criteo" / ".prepared.work"
    work.mkdir()
    (work / "000000.json").write_text("{}")
    PREPARE["criteo"](tmp_path)
    assert not work.exists()
    assert folder.is_dir()


@pytest.mark.parametrize("name", criteo_format.FILES)
def test_a_changed_file_of_the_same_size_is_refused(name, source, tmp_path):
    folder = PREPARE["criteo"](tmp_path)
    path = folder / f"{name}.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + bytes(each ^ 1 for each in whole[-8:]))
    with pytest.raises(DataFileError, match=rf"{name}\.npy is truncated or damaged.*make data-criteo"):
        criteo.load(tmp_path)
    path.write_bytes(whole)
    criteo.load(tmp_path)


def test_files_are_hashed_once_where_they_are_copied_to(source, tmp_path, monkeypatch):
    folder = PREPARE["criteo"](tmp_path)
    copy = criteo_format.columns_path(tmp_path / "copy")
    copy.mkdir(parents=True)
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    hashed = []
    monkeypatch.setattr(criteo_format, "verify", lambda path, *_, **__: hashed.append(path.stem))
    criteo.load(tmp_path)
    assert not hashed
    criteo.load(tmp_path / "copy")
    assert sorted(hashed) == sorted(criteo_format.FILES)
    criteo.load(tmp_path / "copy")
    assert len(hashed) == len(criteo_format.FILES)


@pytest.mark.parametrize("change", [{"lines": 30}, {"lines": None}, {"bytes": []}, {"sha256": {}}])
def test_a_manifest_that_does_not_fit_its_files_is_refused(change, source, tmp_path):
    path = PREPARE["criteo"](tmp_path) / criteo_format.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataFileError, match=r"manifest\.json is damaged.*make data-criteo"):
        criteo.load(tmp_path)


def test_a_log_without_a_last_seventh_is_refused(tmp_path):
    put_log(tmp_path, text_of(LINES[:6]))
    PREPARE["criteo"](tmp_path)
    with pytest.raises(DataFileError, match="6 lines have no last seventh to test on; there must be 7 at least"):
        criteo.load(tmp_path)


def test_a_link_to_another_disk_is_followed(source, tmp_path):
    (tmp_path / "large").mkdir()
    folder = criteo_format.columns_path(tmp_path)
    folder.symlink_to(tmp_path / "large")
    assert len(prepare(source, tmp_path)[0].labels) == 500
    assert folder.is_symlink()
    (folder / "dense.npy").write_bytes(b"")
    assert len(prepare(source, tmp_path)[0].labels) == 500
