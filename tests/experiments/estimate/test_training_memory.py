import pytest
import torch
from torch import nn

from experiments.estimate.training_memory import MemoryUse, kept_bytes, memory_use, start_of_peak
from ngplus import NGPlus

CPU = torch.device("cpu")


def test_what_is_kept_is_weights_gradients_and_state():
    model = nn.Linear(10, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2, 10)).sum().backward()
    optimizer.step()
    assert kept_bytes(model, optimizer) == 3 * 33 * 4


def test_ngplus_keeps_the_smaller_sides_inverse():
    model = nn.Linear(10, 3)
    optimizer = NGPlus(model, lr=0.1, damping=1.0)
    model(torch.ones(2, 10)).sum().backward()
    before = kept_bytes(model, optimizer)
    optimizer.step()
    assert kept_bytes(model, optimizer) - before == 3 * 3 * 4


def test_gradients_of_sparse_tables_are_not_kept():
    tables = nn.ModuleList([nn.EmbeddingBag(100, 4, sparse=True, mode="sum"), nn.Linear(4, 2)])
    optimizer = torch.optim.SGD(tables.parameters(), lr=0.1)
    assert kept_bytes(tables, optimizer) == 4 * (100 * 4 + 2 * 10)


def test_the_peak_is_seen_though_it_is_over_and_earlier_peaks_are_not():
    earlier = torch.ones(64 * 2**18)
    del earlier
    baseline = start_of_peak(CPU)
    if baseline is None:
        pytest.skip("the system does not tell")
    later = torch.ones(32 * 2**18)
    del later
    model = nn.Linear(2, 2)
    found = memory_use(model, torch.optim.SGD(model.parameters(), lr=0.1), CPU, baseline)
    assert found.peak == pytest.approx(32, abs=8)


def test_only_what_is_not_kept_grows_with_the_batch():
    assert MemoryUse(kept=100.0, peak=130.0).extrapolate(4.0) == pytest.approx(220.0)
    assert MemoryUse(kept=100.0, peak=None).extrapolate(4.0) is None
