import pytest
import torch._dynamo  # noqa: F401  what an optimizer imports when it is made

from tests.ngplus.cases import seed_cpu


@pytest.fixture(autouse=True)
def _seed():
    """Every test draws the same numbers, alone or after others."""
    seed_cpu(0)
