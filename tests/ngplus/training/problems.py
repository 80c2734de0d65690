"""Small problems for training loops, and the plain float64 loop that they are compared with."""

import copy
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ngplus import NGPlus
from tests.ngplus.cases import seed_cpu
from tests.ngplus.oracle import PlainLoop

SETTINGS = {"lr": 0.1, "damping": 0.3, "update_every": 2}


@dataclass
class Problem:
    """A model and a batch of which every sample has its own loss."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor

    def loss(self, model: Callable[[Tensor], Tensor], samples: slice = slice(None)) -> Tensor:
        """The mean loss of some of the samples."""
        return (model(self.inputs[samples]) - self.targets[samples]).square().mean(0).sum()

    def sample_losses(self) -> list[Callable[[nn.Module], Tensor]]:
        """Each sample's loss as a function of the model, in float64."""
        inputs = self.inputs.double() if self.inputs.is_floating_point() else self.inputs
        exact = Problem(self.model, inputs, self.targets.double())
        return [lambda model, i=i: exact.loss(model, slice(i, i + 1)) for i in range(len(inputs))]

    def train(
        self,
        optimizer: torch.optim.Optimizer,
        steps: int,
        *,
        through: Callable[[Tensor], Tensor] | None = None,
        samples: slice = slice(None),
    ) -> None:
        """The plain loop of anyone, on some of the samples, through a wrapper of the model where there is one."""
        for _ in range(steps):
            self.loss(self.model if through is None else through, samples).backward()
            optimizer.step()
            optimizer.zero_grad()

    def plain_run(self, steps: int, **settings) -> nn.Module:
        """The model after NG+ by the oracle's loop, one sample at a time in float64."""
        model = copy.deepcopy(self.model).double()
        loop = PlainLoop(model, **{**SETTINGS, **settings})
        for _ in range(steps):
            loop.step(self.sample_losses())
        return model


def perceptron(dtype: torch.dtype = torch.float64, samples: int = 6) -> Problem:
    """Layers of both sides: 7×6 keeps R, 3×8 keeps L."""
    seed_cpu(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    return Problem(model, torch.randn(samples, 5, dtype=dtype), torch.randn(samples, 3, dtype=dtype))


def convolutional(dtype: torch.dtype = torch.float64, samples: int = 4) -> Problem:
    """A convolution, one with groups, batch-independent norms and a linear layer."""
    seed_cpu(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(24, 3),
    ).to(dtype)
    return Problem(model, torch.randn(samples, 2, 6, 6, dtype=dtype), torch.randn(samples, 3, dtype=dtype))


class Attentive(nn.Module):
    """An embedding, attention and a linear layer over the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, index: Tensor) -> Tensor:
        x = self.table(index)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


def attentive(dtype: torch.dtype = torch.float64, samples: int = 4) -> Problem:
    """Token indices in, attention between."""
    seed_cpu(0)
    return Problem(Attentive().to(dtype), torch.randint(11, (samples, 5)), torch.randn(samples, 3, dtype=dtype))


def distance(model: nn.Module, reference: nn.Module, start: nn.Module | None = None) -> float:
    """Relative distance of two models' parameters; of what they moved from ``start``, where that is given."""
    ours, theirs = flat(model), flat(reference)
    moved = theirs if start is None else theirs - flat(start)
    return float((ours - theirs).norm() / moved.norm())


def flat(model: nn.Module) -> Tensor:
    """All parameters as one float64 vector."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def without_curvature(optimizer: NGPlus, names: Sequence[str]) -> bool:
    """Whether none of these weights has a curvature."""
    return not set(names) & set(optimizer.curvature)


def collect_optimizers() -> None:
    """Let go of the optimizers of a test that is over, which may still capture.

    Where the test failed, Python keeps its variables with the traceback.
    """
    sys.last_exc = sys.last_value = sys.last_traceback = None
    gc.collect()
