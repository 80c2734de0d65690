"""Where a challenge keeps what it has."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from experiments.challenge.question import FILE
from experiments.errors import UserError

CHALLENGES = Path("build/challenges")


@dataclass(frozen=True)
class Folder:
    """The folder of one challenge.

    Attributes:
        root: the folder.
    """

    root: Path

    @property
    def file(self) -> Path:
        """What was asked, and what it takes to ask it again."""
        return self.root / FILE

    @property
    def recipes(self) -> Path:
        """The recipes with the challenger in them, ``<task>/<scale>.toml``."""
        return self.root / "recipes"

    @property
    def results(self) -> Path:
        """Records and tables, as `results` has them."""
        return self.root / "results"

    @property
    def tuning(self) -> Path:
        """The searches."""
        return self.root / "tuning"

    @property
    def result(self) -> Path:
        """What came out, for a program to read."""
        return self.root / "result.json"

    @property
    def page(self) -> Path:
        """What came out, for a person to read."""
        return self.root / "index.html"

    def probe(self, task: str) -> Path:
        """What the first steps on a task were like."""
        return self.root / "probes" / f"{task}.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others out.

        Yields:
            Nothing.

        Raises:
            UserError: another process is at work there.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.root / "lock", timeout=0):
                yield
        except Timeout:
            raise UserError(
                f"{self.root}: another process is at work on the challenge of this name; wait for it, "
                "or give this one another --name"
            ) from None
