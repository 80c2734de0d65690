"""A miniature of the official archive, in its layout, through to a folder of fairseq-preprocess."""

import re
import shutil
import sys
import tarfile

import pytest

from experiments.data_io.checksum import DataFileError
from experiments.tasks.transformer import iwslt14, iwslt14_archive
from tests.experiments.cases import sentences

TRAIN = 50


@pytest.fixture
def archive(tmp_path):
    """The folder ``de-en`` as ``de-en.tgz`` unpacks to it."""
    folder = tmp_path / "raw" / "de-en"
    folder.mkdir(parents=True)
    texts = list(sentences.translations(TRAIN, longest=5))
    for side, language in enumerate(("de", "en")):
        talk = ["<url>http://www.ted.com/talks/x.html</url>", f"<keywords>talks, {language}</keywords>",
                "<talkid>1</talkid>", f"<title>Ein Titel {language}</title>",
                f"<description>TED Talk Subtitles and Transcript: {language}.</description>"]  # fmt: skip
        if language == "de":  # what one language alone may have
            talk.append('<reviewer href="http://www.ted.com">Jemand</reviewer>')
        lines = [*talk, *(pair[side] for pair in texts)]
        (folder / f"train.tags.de-en.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for number, name in enumerate(iwslt14_archive.EVAL_SETS):
            evaluation = list(sentences.translations(3, seed=number + 1))
            segments = "\n".join(f'<seg id="{i + 1}"> {pair[side]} </seg>' for i, pair in enumerate(evaluation))
            xml = (
                f'<?xml version="1.0" encoding="UTF-8"?>\n<mteval>\n<srcset setid="{name}" srclang="{language}">\n'
                f'<doc docid="1" genre="lectures">\n<title>Nicht</title>\n{segments}\n</doc>\n</srcset>\n</mteval>\n'
            )
            (folder / f"IWSLT14.{name}.de-en.{language}.xml").write_text(xml, encoding="utf-8")
    return folder


def test_the_archive_becomes_the_three_splits(archive):
    splits, dropped = iwslt14_archive.read_official(archive)
    texts = list(sentences.translations(TRAIN, longest=5))
    kept = [("ein titel de", "ein titel en"), *splits["train"], *splits["valid"]]
    assert len(splits["valid"]) == 2  # every 23rd of 52
    assert splits["train"][:2] == [
        ("ein titel de", "ein titel en"),
        ("ted talk subtitles and transcript : de .", "ted talk subtitles and transcript : en ."),
    ]
    assert splits["valid"][0] == tuple(side.lower() for side in texts[20])
    assert {tuple(side.lower() for side in pair) for pair in texts} <= set(kept)
    assert len(splits["test"]) == 15
    assert splits["test"][0] == tuple(side.lower() for side in next(sentences.translations(1, seed=1)))
    assert dropped == {}


def test_a_set_that_is_written_otherwise_counts_in_full(archive):
    expected, _ = iwslt14_archive.read_official(archive)
    for language in ("de", "en"):
        path = archive / f"IWSLT14.TED.tst2011.de-en.{language}.xml"
        text = path.read_text(encoding="utf-8").replace('<seg id="', "<seg id='").replace('"> ', "'>\n")
        path.write_text(text, encoding="utf-8")
    splits, _ = iwslt14_archive.read_official(archive)
    assert splits == expected


def test_sentences_end_as_in_moses_own_script(archive):
    for language in ("de", "en"):
        path = archive / f"IWSLT14.TED.tst2011.de-en.{language}.xml"
        text = re.sub(r'(<seg id="2">).*(</seg>)', r"\1 U.S. 3. \2", path.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8")
    splits, _ = iwslt14_archive.read_official(archive)
    assert splits["test"][10] == ("u.s. 3 .", "u.s. 3 .")


@pytest.mark.parametrize("packed", [False, True])
def test_archive_and_folder_both_convert(archive, tmp_path, packed):
    raw = archive
    if packed:
        raw = tmp_path / "de-en.tgz"
        with tarfile.open(raw, "w:gz") as opened:
            opened.add(archive, "de-en")
    folder = iwslt14_archive.convert(raw, tmp_path / "data", merges=20)
    assert folder.sizes == {"train": 50, "valid": 2, "test": 15}
    assert iwslt14.name_folder(folder) == "IWSLT14 de-en"
    assert iwslt14.prepare(tmp_path / "data") == tmp_path / "data" / "iwslt14"
    assert "@@" in (folder.path / "text" / "train.de").read_text(encoding="utf-8")


# --- archives that are damaged


def pack(archive, mode="w:gz", **options):
    path = archive.parent.parent / "de-en.tgz"
    with tarfile.open(path, mode, **options) as opened:
        opened.add(archive, "de-en")
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_every_compression_is_read(mode, archive, tmp_path):
    assert iwslt14_archive.convert(pack(archive, mode), tmp_path / "data", merges=20).sizes["train"] == 50


@pytest.mark.parametrize("old", [b"talks, de", b"Transcript: en", b"</mteval>"])
def test_a_letter_that_the_checksum_does_not_fit_is_refused(old, archive, tmp_path):
    """Kept as it is in the archive, without compression, the letter could be another and nothing else be wrong."""
    raw = pack(archive, compresslevel=0)
    content = raw.read_bytes()
    place = content.index(old)
    raw.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(
        DataFileError, match=r"de-en\.tgz: neither a folder nor a tar archive that can be read: CRC check"
    ):
        iwslt14_archive.convert(raw, tmp_path / "data", merges=20)
    assert not (tmp_path / "data" / "iwslt14").exists()


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_an_archive_that_is_damaged_anywhere_is_refused_by_its_own_name(mode, archive, tmp_path):
    raw = pack(archive, mode)
    content = raw.read_bytes()
    step = len(content) // 9
    for place in range(step, len(content) - step, step):
        if mode == "w":  # without a checksum only the headers tell
            place = content.index(b"de-en/IWSLT14", place) if b"de-en/IWSLT14" in content[place:] else 0
        raw.write_bytes(
            content[:place] + bytes(letter ^ 255 for letter in content[place : place + 20]) + content[place + 20 :]
        )
        with pytest.raises(DataFileError, match=r"de-en\.tgz: neither a folder nor a tar archive that can be read: "):
            iwslt14_archive.convert(raw, tmp_path / "data", merges=20)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archive_that_is_cut_short_is_refused_by_its_own_name(mode, archive, tmp_path):
    raw = pack(archive, mode)
    content = raw.read_bytes()
    stops = [len(content) // 2, len(content) - 9]
    if mode == "w":  # between two files, where nothing but the missing end tells
        stops = [content.index(b"de-en/IWSLT14.TED.tst2012")]
    for stop in stops:
        raw.write_bytes(content[:stop])
        with pytest.raises(DataFileError, match=r"de-en\.tgz: neither a folder nor a tar archive that can be read: "):
            iwslt14_archive.convert(raw, tmp_path / "data", merges=20)


def test_a_fault_in_an_archive_is_named_by_its_place_there(archive, tmp_path):
    (archive / "IWSLT14.TEDX.dev2012.de-en.de.xml").unlink()
    with pytest.raises(DataFileError, match=r"/de-en\.tgz/de-en/IWSLT14\.TEDX\.dev2012\.de-en\.de\.xml is missing$"):
        iwslt14_archive.convert(pack(archive), tmp_path / "data", merges=20)


def test_two_copies_of_the_training_files_are_refused(archive, tmp_path):
    shutil.copytree(archive, archive / "old")
    with pytest.raises(DataFileError, match=r"de-en must hold train\.tags\.de-en\.de once, has .*old/train.* and "):
        iwslt14_archive.convert(archive, tmp_path / "data", merges=20)


def test_a_folder_of_fairseq_preprocess_is_taken_as_it_is(archive, tmp_path):
    made = iwslt14_archive.convert(archive, tmp_path / "elsewhere", merges=20)
    (made.path / "about.json").unlink()
    taken = iwslt14_archive.convert(made.path, tmp_path / "data")
    assert taken.sha256 == made.sha256
    assert iwslt14.name_folder(taken) == "de-en folder of fairseq-preprocess"
    assert iwslt14_archive.convert(taken.path, tmp_path / "data") == taken


def test_a_half_written_folder_is_not_taken(archive, tmp_path):
    made = iwslt14_archive.convert(archive, tmp_path / "elsewhere", merges=20)
    (made.path / "test.de-en.en.idx").unlink()
    with pytest.raises(DataFileError, match=r"test\.de-en\.en\.idx missing"):
        iwslt14_archive.convert(made.path, tmp_path / "data")
    assert not (tmp_path / "data" / "iwslt14").exists()


def test_a_line_without_counterpart_is_named(archive):
    path = archive / "train.tags.de-en.de"
    path.write_text(path.read_text(encoding="utf-8") + "Noch eine Zeile.\n", encoding="utf-8")
    with pytest.raises(DataFileError, match=r"train\.tags\.de-en\.de, line 57 has no counterpart.* 53 German and 52"):
        iwslt14_archive.read_official(archive)


def test_bytes_that_are_not_utf8_are_named(archive):
    path = archive / "IWSLT14.TED.tst2011.de-en.en.xml"
    path.write_bytes(path.read_bytes().replace(b"genre", b"gen\xffre"))
    with pytest.raises(DataFileError, match=r"tst2011\.de-en\.en\.xml, line 4: not UTF-8"):
        iwslt14_archive.read_official(archive)


def test_a_missing_file_is_named(archive):
    (archive / "IWSLT14.TEDX.dev2012.de-en.de.xml").unlink()
    with pytest.raises(DataFileError, match=r"IWSLT14\.TEDX\.dev2012\.de-en\.de\.xml is missing"):
        iwslt14_archive.read_official(archive)


def test_empty_and_unequal_sentences_are_counted(archive):
    for language, lines in {"de": ["", "a b c d e f"], "en": ["nothing there", "a"]}.items():
        path = archive / f"train.tags.de-en.{language}"
        path.write_text("\n".join([path.read_text(encoding="utf-8").rstrip("\n"), *lines]) + "\n", encoding="utf-8")
    _, dropped = iwslt14_archive.read_official(archive)
    assert dropped == {"empty": 1, "one side more than 1.5 times as long": 1}


@pytest.mark.parametrize("content", [b"no archive", None])
def test_what_is_neither_is_refused(tmp_path, content):
    raw = tmp_path / "raw.tgz"
    if content is None:
        raw.mkdir()
    else:
        raw.write_bytes(content)
    with pytest.raises(DataFileError, match=r"raw\.tgz"):
        iwslt14_archive.convert(raw, tmp_path / "data")


def test_data_that_is_not_there_says_how_to_get_it(tmp_path):
    with pytest.raises(DataFileError, match="make data-iwslt14 RAW="):
        iwslt14.prepare(tmp_path)


def test_the_command_prints_what_it_made_or_one_line_of_error(archive, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["convert", "--data-dir", str(tmp_path / "data"), str(archive)])
    iwslt14_archive.main()
    assert "IWSLT14 de-en: 50 train, 2 valid, 15 test pairs" in capsys.readouterr().out
    shutil.rmtree(archive)
    with pytest.raises(SystemExit, match="2"):
        iwslt14_archive.main()
    assert capsys.readouterr().err.startswith(f"error: {archive}: neither a folder nor a tar archive")
