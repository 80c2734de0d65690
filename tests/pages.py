"""The documentation as a reader has it: pages, the code in them, the commands in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted(DOCS.glob("*.md")), REPOSITORY / "findings" / "README.md"]

PROGRAMS = "python|ngplus-bench|make|torchrun|pip|bash|spktrain|fairseq-train|fairseq-generate|.venv/bin/pre-commit"
_FENCE = re.compile(r"^ *```([^\n]*)\n(.*?)^ *```$", flags=re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^ {4}\S.*\n(?:^(?: {4}.*)?\n)*)", flags=re.MULTILINE)
_INLINE = re.compile(rf"`((?:{PROGRAMS}) [^`]*)`")


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        page: where it is.
        words: of it, without the variables before it.
        environment: those variables.
    """

    page: Path
    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.page.stem}: {' '.join(self.words)}"


def find_code(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return [code for kind, code in _FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def find_commands(page: Path) -> list[Command]:
    """The commands in blocks without a language, in indented blocks, and in the text."""
    text = page.read_text(encoding="utf-8")
    prose = _FENCE.sub("", text)
    blocks = [*find_code(page, ""), *_INDENTED.findall(prose)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    lines += [" ".join(found.split()) for found in _INLINE.findall(_INDENTED.sub("", prose))]
    return list(dict.fromkeys(_parse(page, line) for line in lines))


def _parse(page: Path, line: str) -> Command:
    words = shlex.split(line, comments=True)
    variables = []
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        variables.append(tuple(words.pop(0).split("=", 1)))
    return Command(page, tuple(words), tuple(variables))
