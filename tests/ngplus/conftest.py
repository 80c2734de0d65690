import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    """Every test draws the same numbers, alone or after others."""
    torch.manual_seed(0)
