"""Schnetpack's `Dense` applies its activation inside its own forward; NG+ must see the gradient before it."""

import pytest
import torch
from torch import nn

from tests.ngplus import oracle
from tests.ngplus.cases import seed_cpu

schnetpack = pytest.importorskip("schnetpack")

from schnetpack import properties  # noqa: E402
from schnetpack.atomistic import Atomwise, PairwiseDistances  # noqa: E402
from schnetpack.model import NeuralNetworkPotential  # noqa: E402
from schnetpack.nn import CosineCutoff, Dense, GaussianRBF  # noqa: E402
from schnetpack.representation import SchNet  # noqa: E402

from ngplus import NGPlus  # noqa: E402

DAMPING = 0.17
SIZES = [1, 3, 2, 4]  # atoms a molecule; the first has no pairs


def model(aggregation: str) -> NeuralNetworkPotential:
    seed_cpu(0)
    made = NeuralNetworkPotential(
        representation=SchNet(5, 2, GaussianRBF(4, 4.0), CosineCutoff(4.0), n_filters=3),
        input_modules=[PairwiseDistances()],
        output_modules=[Atomwise(5, output_key="energy", aggregation_mode=aggregation)],
    )
    return made.double()


def batch(molecules: list[int]) -> dict[str, torch.Tensor]:
    """The molecules of these numbers, all atoms of each paired with each other, and their target."""
    parts, pairs, start = [], [], 0
    for number in molecules:
        generator = torch.Generator().manual_seed(number)
        size = SIZES[number]
        numbers = torch.randint(1, 9, (size,), generator=generator)
        positions = torch.rand(size, 3, generator=generator, dtype=torch.float64) * 2
        target = torch.randn(1, generator=generator, dtype=torch.float64)
        parts.append((numbers, positions, target))
        pairs += [(start + i, start + j) for i in range(size) for j in range(size) if i != j]
        start += size
    numbers, positions, targets = (torch.cat(each) for each in zip(*parts, strict=True))
    centres, others = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    sizes = torch.tensor([SIZES[number] for number in molecules])
    return {
        properties.Z: numbers,
        properties.R: positions,
        properties.idx_m: torch.arange(len(molecules)).repeat_interleave(sizes),
        properties.idx_i: centres,
        properties.idx_j: others,
        properties.offsets: torch.zeros(len(centres), 3, dtype=torch.float64),
        properties.n_atoms: sizes,
        "target": targets,
    }


def loss(molecules: list[int]) -> oracle.Loss:
    """The mean squared error of some molecules."""

    def evaluate(net: nn.Module) -> torch.Tensor:
        inputs = batch(molecules)
        target = inputs.pop("target")
        return (net(inputs)["energy"] - target).square().mean()

    return evaluate


EVERYONE = [0, 1, 2, 3]


@pytest.mark.parametrize("aggregation", ["sum", "avg"])
def test_rows_are_preconditioned_as_by_the_gradients_of_single_rows(aggregation):
    net = model(aggregation)
    expected = oracle.directions(oracle.row_gradients(net, loss(EVERYONE)), DAMPING)
    assert len(expected) == 1 + 2 * 5 + 2  # the embedding, five layers an interaction, two of the output network
    oracle.descend(net, loss(EVERYONE), damping=DAMPING, samples="rows")
    assert oracle.error(net, expected) < 1e-10


@pytest.mark.parametrize("aggregation", ["sum", "avg"])
def test_molecules_are_preconditioned_as_by_the_gradients_of_single_molecules(aggregation):
    net = model(aggregation)
    alone = oracle.sample_gradients(net, [loss([number]) for number in EVERYONE])
    optimizer = NGPlus(net, lr=1e-9, damping=DAMPING, update_every=1)
    inputs = batch(EVERYONE)
    atoms = inputs[properties.idx_m]
    optimizer.sample_index = {"*.filter_network.*": atoms[inputs[properties.idx_i]], "*": atoms}
    loss(EVERYONE)(net).backward()
    optimizer.step()
    assert oracle.error(net, oracle.directions(alone, DAMPING)) < 1e-10


def test_a_dense_layer_is_a_linear_layer_before_its_activation():
    seed_cpu(0)
    inside = Dense(4, 3, activation=nn.Tanh()).double()
    outside = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()
    outside[0].load_state_dict(inside.state_dict(), strict=False)
    inputs = torch.randn(6, 4, dtype=torch.float64)
    for net in (inside, outside):
        oracle.descend(net, oracle.batch_loss(inputs), damping=DAMPING)
    torch.testing.assert_close(inside.weight.grad, outside[0].weight.grad, rtol=1e-12, atol=1e-14)
