"""Fixtures of all tests of `ngplus`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch._dynamo  # noqa: F401  what an optimizer imports when it is made

from ngplus.layerwise import LayerwiseOptimizer
from ngplus.tuning import DEFAULT, Tuning
from tests.ngplus.cases import seed_cpu


@pytest.fixture(autouse=True)
def _seed():
    """Every test draws the same numbers, alone or after others."""
    seed_cpu(0)


@pytest.fixture
def set_tuning(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tuning]:
    """Give every optimizer other `Tuning`, the default but for what is named, and return it."""

    def set_(**changes: Any) -> Tuning:
        tuning = replace(DEFAULT, **changes)
        monkeypatch.setattr(LayerwiseOptimizer, "tuning", tuning)
        return tuning

    return set_
