import pytest
import torch


@pytest.fixture(autouse=True)
def _double_precision():
    """What a test makes is float64, unless it says otherwise."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
