"""Models, data and training steps that several test modules share."""

import contextlib
import io
import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.ngplus import oracle


def seed_cpu(number: int) -> None:
    """Seed the generator of the CPU alone.

    `torch.manual_seed` seeds those of the other devices too, and where no device is in use it keeps a formatted stack
    for each of them: 3 ms a call inside pytest.
    """
    torch.default_generator.manual_seed(number)


def mlp(*sizes: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """Linear layers of these sizes, each followed by a tanh: the weights are "0.weight", "2.weight" and so on."""
    seed_cpu(seed)
    layers = [nn.Linear(i, o) for i, o in itertools.pairwise(sizes)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())]).to(dtype)


def mlp_with_norm(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """Linear layers "0.weight", 6×4, and "3.weight", 3×6; between them a layer norm, which goes to the base."""
    seed_cpu(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


class ActivatedLinear(nn.Linear):
    """A linear layer that applies its activation inside its own forward, as schnetpack's Dense does."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.silu(super().forward(input))


def points(*shape: int, dtype: torch.dtype = torch.float64, seed: int | None = None) -> Tensor:
    """Normal samples, with a seed the same ones in every call."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=dtype, generator=generator)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, *inputs: Tensor, times: int = 1) -> None:
    """Steps on the mean energy of a batch; the last one's directions are left in ``.grad``."""
    for _ in range(times):
        optimizer.zero_grad()
        oracle.batch_loss(*inputs)(model).backward()
        optimizer.step()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Steps of these numbers, each on five samples of four features that its number seeds.

    Two runs that make the same steps see the same data, whatever was drawn between.
    """
    dtype = next(model.parameters()).dtype
    for number in steps:
        training_step(model, optimizer, points(5, 4, dtype=dtype, seed=number))
    optimizer.zero_grad()


def parameters_equal(model: nn.Module, other: nn.Module) -> bool:
    """Whether the parameters of two models are the same to the bit."""
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def through_a_file(state: Any) -> Any:
    """What `torch.load` makes of what `torch.save` wrote, with weights only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@contextlib.contextmanager
def recorded_warnings() -> Iterator[list[str]]:
    """The messages of the warnings inside the block, every one, in order; complete when the block ends."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(warning.message) for warning in caught]
