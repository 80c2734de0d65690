"""The files of IWSLT14's archive to sentence pairs, each with its place, so that every fault has a file and a line.

    train.tags.de-en.{de,en}             a sentence a line, between lines of tags
    IWSLT14.<set>.de-en.{de,en}.xml      <seg id="1"> a sentence </seg>, in <doc docid="…"> … </doc>

Of well-formed files the sentences are those that fairseq's recipe takes, to the letter: it leaves entities as they are.
The recipe looks for one way of writing a segment, on a line of its own; here another way that means the same is read
too. Files whose two languages do not agree on what a sentence is called, or in which one is empty, are refused, and so
are those that may be cut short: a training file whose last line is a sentence without a line feed, and a set in which a
``<doc>``, or an element around it, has no end.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from experiments.data_io.checksum import DataFileError
from experiments.data_io.text_lines import BYTE_ORDER_MARK, ends_its_last_line, read_lines

_ANY_CASE = re.IGNORECASE

# A line with <url>, <talkid> or <keywords> anywhere is left out by the recipe too.
_LEFT_OUT = re.compile(
    r"^\s*<(url|talkid|keywords|speaker|reviewer|translator)\b|^\s*</?doc\b|<(?:url|talkid|keywords)>", _ANY_CASE
)
_TALK = re.compile(r"<talkid\b[^>]*>(.*?)</talkid\s*>", _ANY_CASE)
_TITLE = re.compile(r"</?(title|description)\s*>", _ANY_CASE)

_MARKUP = re.compile(
    r"<!--.*?-->|(?P<comment><!--)|<(?P<end>/?)(?P<part>mteval|srcset|refset|tstset|doc)\b(?P<given>[^<>]*)>"
    r"|<seg\b(?P<seg>[^<>]*?)(?:/>|>(?P<text>.*?)</seg\s*>)|(?P<stray></?seg\b)",
    _ANY_CASE | re.DOTALL,
)
_NEXT = re.compile(r"<seg\b|</?doc\b", _ANY_CASE)
_ATTRIBUTE = r"""(?:^|\s){}\s*=\s*["']?\s*([^"'\s]+)"""
_SEGMENT_ID = re.compile(_ATTRIBUTE.format("id"), _ANY_CASE)
_DOCUMENT_ID = re.compile(_ATTRIBUTE.format("docid"), _ANY_CASE)


class Sentence(NamedTuple):
    """One side of a pair.

    Attributes:
        place: file and line.
        name: what the file calls it; its counterpart has the same.
        text: what it says.
    """

    place: str
    name: str
    text: str


def training_pairs(folder: Path) -> list[tuple[str, str]]:
    """The German and English training sentences; lines of tags are left out, titles and descriptions are sentences.

    Args:
        folder: that the archive unpacks to.

    Returns:
        The pairs, in the order of the files.

    Raises:
        DataFileError: a file is missing, not UTF-8, without a sentence or a line feed at the end of its last one; a tag
            has no end on its line; or a sentence has no counterpart, or one of another talk.
    """
    paths = [folder / f"train.tags.de-en.{language}" for language in ("de", "en")]
    german, english = (_read(_between_tags, path) for path in paths)
    for path, sentences in zip(paths, (german, english), strict=True):
        _check_last_line(path, sentences[-1])
    return _pair(german, english)


def _check_last_line(path: Path, last: Sentence) -> None:
    """A sentence at the very end of a file is whole if its line has an end; a line of tags has its own."""
    if not ends_its_last_line(path) and last.place == f"{path}, line {len(read_lines(path))}":
        raise DataFileError(
            f"{last.place}: {last.text[:60]!r} has no line feed after it: the file may be cut in it; "
            "must end in a line feed, add it if the line is whole"
        )


def evaluation_pairs(folder: Path, name: str) -> list[tuple[str, str]]:
    """The German and English sentences of a dev or test set, such as ``"TED.tst2010"``.

    Args:
        folder: that the archive unpacks to.
        name: of the set.

    Returns:
        The pairs, in the order of the files.

    Raises:
        DataFileError: a file is missing, not UTF-8 or without a sentence; a segment is empty, has no id, one that is
            there before, or no end; a document has no end; or the languages have not the same ids in the same order.
    """
    return _pair(*(_read(_segments, folder / f"IWSLT14.{name}.de-en.{language}.xml") for language in ("de", "en")))


def _read(parse: Callable[[Path, list[str]], Iterator[Sentence]], path: Path) -> list[Sentence]:
    lines = [line.lstrip(BYTE_ORDER_MARK) for line in read_lines(path)]
    sentences = list(parse(path, lines))
    if not sentences:
        raise DataFileError(f"{path}: no sentence in its {len(lines):,} lines: it is cut short, or another file")
    return sentences


def _pair(german: list[Sentence], english: list[Sentence]) -> list[tuple[str, str]]:
    for de, en in zip(german, english, strict=False):
        if de.name != en.name:
            raise DataFileError(
                f"{de.place} has {de.name}, but its counterpart {en.place} has {en.name}: "
                "the languages must have the same sentences in the same order"
            )
    short = min(len(german), len(english))
    if len(german) != len(english):
        longer = german if len(german) > short else english
        raise DataFileError(
            f"{longer[short].place} has no counterpart: "
            f"there are {len(german):,} German and {len(english):,} English sentences"
        )
    return [(de.text, en.text) for de, en in zip(german, english, strict=True)]


def _between_tags(path: Path, lines: list[str]) -> Iterator[Sentence]:
    name = "a sentence of no talk"
    for number, line in enumerate(lines, 1):
        place = f"{path}, line {number}"
        left_out = _LEFT_OUT.search(line)
        if left_out is None:
            yield Sentence(place, name, _TITLE.sub("", line).strip())
            continue
        tag = left_out[1]
        if tag and not re.search(rf"</{tag}\s*>|/>\s*$", line, _ANY_CASE):
            raise DataFileError(f"{place}: <{tag}> has no end on its line; must end with </{tag}> there")
        if talk := _TALK.search(line):
            name = f"a sentence of talk {talk[1].strip()}"


def _segments(path: Path, lines: list[str]) -> Iterator[Sentence]:
    text, document = "\n".join(lines), ""
    seen: dict[str, str] = {}
    open_parts: list[tuple[str, str]] = []
    for found in _MARKUP.finditer(text):
        place = f"{path}, line {text.count('\n', 0, found.start()) + 1}"
        if found["comment"]:
            raise DataFileError(f"{place}: <!-- has no end; must end with -->")
        if found["part"] is not None:
            _open_or_close(open_parts, found, place)
            if found["part"].lower() == "doc" and not found["end"]:
                given = _DOCUMENT_ID.search(found["given"])
                document = f" of document {given[1]}" if given else ""
                seen = seen if given else {}
        elif found["stray"] or _NEXT.search(found["text"] or ""):
            raise DataFileError(f'{place}: a segment must begin with <seg id="…"> and end with </seg> before the next')
        elif found["seg"] is not None:
            segment = _segment(found, document, place)
            if (first := seen.setdefault(segment.name, place)) is not place:
                raise DataFileError(f"{place}: {segment.name} is in {first} already; must be there once")
            yield segment
    for part, place in open_parts:
        raise DataFileError(f"{place}: <{part}> has no end; must end with </{part}>: the file is cut short")


def _open_or_close(open_parts: list[tuple[str, str]], found: re.Match[str], place: str) -> None:
    """Keep what has begun and not ended, in place; an element ends before the one around it."""
    part = found["part"].lower()
    if not found["end"]:
        if part in (name for name, _ in open_parts):
            raise DataFileError(f"{place}: <{part}> must come after the end of the one before, </{part}>")
        if not found["given"].endswith("/"):
            open_parts.append((part, place))
    elif not open_parts or open_parts[-1][0] != part:
        awaited = f"</{open_parts[-1][0]}>" if open_parts else "nothing"
        raise DataFileError(f"{place}: </{part}> where {awaited} is to end")
    else:
        open_parts.pop()


def _segment(found: re.Match[str], document: str, place: str) -> Sentence:
    number = _SEGMENT_ID.search(found["seg"])
    if number is None:
        raise DataFileError(f'{place}: a segment without an id; must be such as <seg id="1">')
    name = f"segment {number[1]}{document}"
    text = " ".join((found["text"] or "").split()).replace("’", "'")
    if not text:
        raise DataFileError(f"{place}: {name} is empty; must hold a sentence, or be left out in both languages")
    return Sentence(place, name, text)
