import gc

import pytest
import torch


def pytest_collectstart(collector: pytest.Collector):
    """What a test module draws when it is imported is the same whatever was imported before it."""
    if isinstance(collector, pytest.Module):
        torch.default_generator.manual_seed(0)


def pytest_collection_finish():
    """Let a collection of garbage pass over what importing the tests has made: torch alone is a million objects."""
    gc.collect()
    gc.freeze()
