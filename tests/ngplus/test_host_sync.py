"""A plain step never synchronizes with the device: on fake tensors, of which reading a value raises."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ngplus import NGPlus


def make(rows=9, **options):
    model = nn.Sequential(nn.EmbeddingBag(rows, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    optimizer = NGPlus(model, lr=0.1, update_every=100, **options)
    model(torch.randint(9, (5, 2))).square().mean().backward()
    optimizer.step()
    return model, optimizer


def plain_step_on_fakes(model, optimizer):
    """The second step, with everything that the optimizer holds replaced by tensors without values."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for parameter in model.parameters():
            parameter.grad = mode.from_tensor(parameter.grad)
        optimizer._apply_plan.forget()  # which keeps memory for directions: it is made again, without values
        optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": 2},
        {"solver": "low_rank"},
        {"weight_decay": 0.1, "momentum": 0.9},
        {"base": torch.optim.Adam, "fused": True},  # unfused it asks for its count of steps, which is on the CPU
    ],
)
def test_a_plain_step_never_synchronizes(options):
    model, optimizer = make(**options)
    assert len(optimizer.curvature) == 3
    assert not optimizer._recorder.armed
    plain_step_on_fakes(model, optimizer)


def test_a_large_table_is_not_searched_for_nonzero_rows(set_tuning):
    set_tuning(apply_chunk=8, zero_rows_from=8)
    plain_step_on_fakes(*make(rows=64))


def test_reading_a_value_would_be_noticed():
    model, optimizer = make(nonfinite="raise")
    with pytest.raises(DataDependentOutputException):
        plain_step_on_fakes(model, optimizer)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"block_size": 2}, {"solver": "low_rank"}, {"momentum": 0.9}])
def test_a_plain_step_on_a_gpu_never_synchronizes(options):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).cuda()
    optimizer = NGPlus(model, lr=0.1, update_every=100, **options)
    x = torch.randn(5, 4, device="cuda")
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert optimizer.skipped_steps == 0
