"""What the two tasks with SchNet share: settings, splits, batches, model, loss, metric.

The model is schnetpack's, as its own command line puts it together; only the loading of the data is ours, from
arrays whose neighbour lists are kept.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from schnetpack.atomistic import Atomwise, PairwiseDistances
from schnetpack.model import NeuralNetworkPotential
from schnetpack.nn import CosineCutoff, GaussianRBF
from schnetpack.representation import SchNet
from torch import Tensor, nn
from torch.nn.functional import mse_loss, threshold

from experiments.data_io.atoms.neighbours import Neighbours, find_neighbours, prepare_neighbours
from experiments.data_io.atoms.structure_cache import StructureSet
from experiments.data_io.atoms.structure_splits import cut
from experiments.data_io.sampling import epoch_batches
from experiments.dataclass_io import SettingsError
from experiments.integrations.schnetpack_rows import sample_index
from experiments.tasks.protocol import DatasetInfo, Evaluation, Metric, Split
from experiments.tasks.schnet.structure_batches import TARGET, Batch, assemble

EVAL_BATCH = 200
OUTPUT = "energy"


@dataclass(frozen=True, kw_only=True)
class SchNetSettings:
    """The recipe's ``[task.model]`` table.

    Attributes:
        features: width of the embeddings and filters.
        interactions: number of interaction blocks.
        cutoff: in Å.
        gaussians: radial basis functions between 0 and the cutoff.
    """

    features: int
    interactions: int
    cutoff: float
    gaussians: int = 50

    def __post_init__(self) -> None:
        for name, least in (("features", 2), ("interactions", 1), ("gaussians", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {least}")
        if not self.cutoff > 0:
            raise ValueError(f"cutoff = {self.cutoff}: must be positive")


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """What both tasks' ``[task]`` tables have.

    Attributes:
        batch_size: structures of a joint batch.
        validation_size: structures that settings are chosen on.
        test_size: structures that are reported.
        model: see `SchNetSettings`.
        train_size: structures trained on; ``None`` for all that are left.
    """

    batch_size: int
    validation_size: int
    test_size: int
    model: SchNetSettings
    train_size: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("validation_size", 0), ("test_size", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {least}")
        if self.train_size is not None and self.train_size < self.batch_size:
            raise ValueError(f"train_size = {self.train_size}: must hold one batch of {self.batch_size}")


class RadialBasis(GaussianRBF):
    """Schnetpack's row of Gaussians, whose tails are zero instead of denormal numbers.

    With denormal numbers in it a training step on a CPU takes four times as long. `torch.set_flush_denormal`
    would do as well, but only in threads that are started after it.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """``exp(−(d − μ_k)² / 2σ²)``, 0 where that is below 1e-20: (P,) → (P, K)."""
        return threshold(super().forward(inputs), 1e-20, 0.0)


class SchNetTask:
    """SchNet on structures with one target each. The two tasks say which structures, and what is learnt.

    Args:
        settings: the recipe's ``[task]`` table, checked.
        data: the structures.
        where: the recipe, for error messages.

    Raises:
        SettingsError: the sizes or the cutoff do not fit the data.
    """

    name: str
    metric: Metric
    aggregation: str
    """schnetpack's name for how atoms make up a structure's target: ``"sum"`` or ``"avg"``."""
    kind: str
    """What a structure is called in tables."""

    def __init__(self, settings: SplitSettings, data: StructureSet, *, where: str) -> None:
        self.settings, self._structures = settings, data.structures
        try:
            self._split = cut(
                data.order,
                data.groups,
                train_size=settings.train_size,
                validation_size=settings.validation_size,
                test_size=settings.test_size,
            )
            self._neighbours = _neighbours(data, settings.model.cutoff)
            self._residual = data.structures.target - self.baseline(self._split.train)
        except ValueError as error:
            raise SettingsError(f"{where}: {error}") from None
        train_size = len(self._split.train)
        if train_size < settings.batch_size:
            raise SettingsError(
                f"{where}: batch_size = {settings.batch_size}: must not exceed the {train_size} training structures"
            )
        self.dataset = DatasetInfo(
            name=f"{data.name}, {train_size:,} {self.kind}",
            sha256=data.sha256,
            licence=data.licence,
            train_size=train_size,
            eval_size=len(self._split.test),
        )

    def baseline(self, train: np.ndarray) -> np.ndarray:
        """The part of every structure's target that needs no network, float64, (N,).

        Args:
            train: indices of the structures it may be fitted on.

        Returns:
            In eV, float64, (N,).
        """
        raise NotImplementedError

    def build_model(self) -> NeuralNetworkPotential:
        """Schnetpack's SchNet and Atomwise; the initial weights depend on torch's global generator only."""
        chosen = self.settings.model
        return NeuralNetworkPotential(
            representation=SchNet(
                n_atom_basis=chosen.features,
                n_interactions=chosen.interactions,
                radial_basis=RadialBasis(n_rbf=chosen.gaussians, cutoff=chosen.cutoff),
                cutoff_fn=CosineCutoff(chosen.cutoff),
            ),
            input_modules=[PairwiseDistances()],
            output_modules=[Atomwise(n_in=chosen.features, output_key=OUTPUT, aggregation_mode=self.aggregation)],
        )

    def steps_per_epoch(self) -> int:
        """Whole batches in the training set."""
        return len(self._split.train) // self.settings.batch_size

    def train_batches(self, epoch: int, seed: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """One epoch of batches, see `assemble`."""
        train = self._split.train
        order = epoch_batches(
            len(train), self.settings.batch_size, seed=seed, epoch=epoch, rank=rank, world_size=world_size
        )
        return self._assembled(train[positions] for positions in order)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error over the batch, in the square of the metric's unit."""
        return mse_loss(_predict(model, batch), batch[TARGET])

    def evaluate(self, model: nn.Module, split: Split) -> Evaluation:
        """Mean squared and mean absolute error over a split.

        Args:
            model: in ``eval()``.
            split: which one.

        Returns:
            Loss and error.

        Raises:
            SettingsError: the split is empty.
        """
        indices = {"validation": self._split.validation, "test": self._split.test}[split]
        if not len(indices):
            raise SettingsError(f"the {split} split is empty: set {split}_size in the recipe's [task] table")
        device = next(model.parameters()).device
        squared, absolute = torch.zeros(2, dtype=torch.float64, device=device)
        parts = (indices[start : start + EVAL_BATCH] for start in range(0, len(indices), EVAL_BATCH))
        for batch in (self.to_device(batch, device) for batch in self._assembled(parts)):
            error = (_predict(model, batch).float() - batch[TARGET]).double()
            squared += error.square().sum()
            absolute += error.abs().sum()
        return Evaluation(loss=squared.item() / len(indices), metric=absolute.item() / len(indices))

    def to_device(self, batch: Batch, device: str | torch.device) -> Batch:
        """The batch on a device."""
        return {key: value.to(device, non_blocking=True) for key, value in batch.items()}

    def sample_index(self, batch: Batch) -> dict[str, Tensor]:
        """The structure of each row of a layer's input; see `integrations.schnetpack_rows`."""
        return sample_index(batch)

    def _assembled(self, order: Iterable[np.ndarray]) -> Iterator[Batch]:
        return map_ahead(partial(assemble, self._structures, self._neighbours, self._residual), order)


def map_ahead[Index, Item](make: Callable[[Index], Item], order: Iterable[Index]) -> Iterator[Item]:
    """``map(make, order)``, the next item made in a thread while this one is used.

    On a GPU the training step synchronizes with the device, and the next batch is gathered meanwhile.
    """
    with ThreadPoolExecutor(1) as thread:
        pending = None
        for index in order:
            following = thread.submit(make, index)
            if pending:
                yield pending.result()
            pending = following
        if pending:
            yield pending.result()


def _predict(model: nn.Module, batch: Batch) -> Tensor:
    """The model's energies, (B,); it writes what it computes into the dictionary it is given."""
    return model({key: value for key, value in batch.items() if key != TARGET})[OUTPUT]


def _neighbours(data: StructureSet, cutoff: float) -> Neighbours:
    if data.folder is None:
        return find_neighbours(data.structures, cutoff)
    return prepare_neighbours(data.folder, data.structures, cutoff, remedy=f"delete the folder {data.folder.parent}")
