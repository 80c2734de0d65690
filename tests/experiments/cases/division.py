"""Something to do that may fail, importable by the process that it is sent to."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Division:
    by: int

    @property
    def name(self) -> str:
        return f"division by {self.by}"

    def run(self) -> None:
        assert 1 / self.by > 0
