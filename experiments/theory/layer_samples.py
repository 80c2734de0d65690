"""Gradients of single samples of real layers, of the models that the five tasks build and briefly train.

One sample at a time, in float64, by autograd on the parameter itself: nothing here goes through `ngplus`. A sample is
what the task calls one: an image, a molecule, a crystal, a pair of sentences, a click. Models are in evaluation mode,
where batch normalisation makes no sample depend on another.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.config.recipe import load_recipe
from experiments.tasks import TASKS
from experiments.tasks.protocol import Task
from experiments.tasks.schnet.structure_batches import TARGET
from experiments.theory.kronecker_forms import LayerSamples
from experiments.theory.weight_uses import CONVOLUTIONS, LOOKUPS, Use, record_uses

SCALE = "tiny"
RATE = 2e-3


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is sampled in a task's model.

    Attributes:
        size: samples in one of the task's batches.
        layers: names of modules: early and late ones of each kind, none of them with a tied weight.
    """

    size: Callable[[Any], int]
    layers: tuple[str, ...]


_SCHNET = Subject(
    size=lambda batch: len(batch[TARGET]),
    layers=(
        "representation.embedding",
        "representation.interactions.0.filter_network.0",
        "representation.interactions.0.in2f",
        "representation.interactions.1.filter_network.1",
        "representation.interactions.1.f2out.1",
        "output_modules.0.outnet.0",
    ),
)

SUBJECTS: Mapping[str, Subject] = {
    "resnet50-imagenet": Subject(
        size=lambda batch: len(batch[1]),
        layers=("conv1", "layer1.0.conv1", "layer2.0.conv1", "layer4.0.downsample.0", "fc"),
    ),
    "schnet-qm9": _SCHNET,
    "schnet-matproj": _SCHNET,
    "transformer-iwslt14": Subject(
        size=lambda batch: len(batch["target"]),
        layers=(
            "encoder.embed_tokens",
            "encoder.layers.0.self_attn.q_proj",
            "encoder.layers.0.fc1",
            "decoder.layers.0.self_attn.v_proj",
            "decoder.layers.0.encoder_attn.out_proj",
            "decoder.layers.0.fc2",
        ),
    ),
    "dlrm-criteo": Subject(
        size=lambda batch: len(batch[2]),
        layers=("tables.6", "tables.9", "bottom.0", "bottom.4", "top.0", "top.2"),
    ),
}


def load_task(name: str, data_dir: Path) -> Task:
    """The task at scale tiny, on the data that is embedded in the repository."""
    return TASKS[name](load_recipe(name, SCALE).task_settings, scale=SCALE, data_dir=data_dir)


def train(task: Task, *, steps: int, seed: int) -> nn.Module:
    """The task's model after a few steps of Adam, so that gradients look like those within a training."""
    torch.manual_seed(seed)
    model = task.build_model().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    batches = (batch for epoch in count(1) for batch in task.train_batches(epoch, seed))
    for batch in islice(batches, steps):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    return model.eval()


def to_double(batch: Any) -> Any:
    """A batch whose floating-point tensors are float64."""
    if isinstance(batch, Mapping):
        return {key: to_double(value) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(map(to_double, batch))
    return batch.double() if isinstance(batch, Tensor) and batch.is_floating_point() else batch


def split_batch(task: Task, index: int, size: int, seed: int) -> Iterator[Any]:
    """The samples of training batch `index` of epoch 0, each as a batch of its own.

    The joint batch is cut into as many parts as it has samples, for as many workers; the mean over the workers of
    what `task.loss` gives them is the batch's loss, so that the mean of the gradients is the batch's gradient.
    """
    for rank in range(size):
        part = task.train_batches(0, seed, rank=rank, world_size=size)
        yield to_double(next(islice(part, index, None)))


class Sample(NamedTuple):
    """One sample's gradient of a layer, 𝒢 = Σ g aᵀ: (m, n), and the factors of (8), (κ, m) and (κ, n)."""

    gradient: Tensor
    g: Tensor
    a: Tensor


def to_matrix(module: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A parameter's gradient as the paper's matrix: out × in, a bias as one more column; a table is width × rows."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return weight.mT
    matrix = weight.flatten(1)
    return matrix if bias is None else torch.cat([matrix, bias[:, None]], dim=1)


def factors(use: Use, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """(g, a) of one use of a weight by one sample, given the gradient of its output: (κ, m) and (κ, n).

    Args:
        use: of a weight by one sample.
        gradient: of its output.

    Returns:
        Output gradients (κ, m) and inputs (κ, n).

    Raises:
        ValueError: for a function whose factors are not known here, or a grouped convolution.
    """
    module = use.module
    if use.function in LOOKUPS:
        rows = F.one_hot(use.inputs.flatten(), module.num_embeddings).to(gradient.dtype)
        bag = len(rows) // gradient[..., 0].numel()  # rows that are added up in one output
        return gradient.flatten(0, -2).repeat_interleave(bag, dim=0), rows
    if use.function in CONVOLUTIONS:
        if use.function != "conv2d" or module.groups > 1:
            raise ValueError(f"{use.layer}: {use.function} with {module.groups=}: only conv2d without groups")
        shape = module.kernel_size, module.dilation, module.padding, module.stride
        g, a = gradient.flatten(2).mT.flatten(0, 1), F.unfold(use.inputs, *shape).mT.flatten(0, 1)
    else:
        g, a = gradient.flatten(0, -2), use.inputs.flatten(0, -2)
    return g, a if module.bias is None else F.pad(a, (0, 1), value=1.0)


def take(task: Task, model: nn.Module, batch: Any, layers: Sequence[str]) -> dict[str, Sample]:
    """Gradient and factors of each of `layers` for a batch of one sample."""
    with record_uses(model) as seen:
        loss = task.loss(model, batch)
    uses = {layer: [use for use in seen if use.layer == layer] for layer in layers}
    outputs = [use.output for each in uses.values() for use in each]
    found = iter(torch.autograd.grad(loss, outputs + get_parameters(model, layers)))
    pairs = {layer: [factors(use, next(found)) for use in each] for layer, each in uses.items()}
    samples = {}
    for layer in layers:
        g, a = (torch.cat(parts).detach() for parts in zip(*pairs[layer], strict=True))
        samples[layer] = Sample(next_matrix(model, layer, found), g, a)
    return samples


def get_parameters(model: nn.Module, layers: Sequence[str]) -> list[Tensor]:
    """Weight and bias, if there is one, of each of `layers`."""
    modules = [model.get_submodule(layer) for layer in layers]
    pairs = [(module.weight, getattr(module, "bias", None)) for module in modules]
    return [parameter for pair in pairs for parameter in pair if parameter is not None]


def next_matrix(model: nn.Module, layer: str, gradients: Iterator[Tensor]) -> Tensor:
    """The matrix of `layer`, from gradients in the order of `get_parameters`."""
    module = model.get_submodule(layer)
    weight = next(gradients)
    return to_matrix(module, weight, None if getattr(module, "bias", None) is None else next(gradients))


class LayerPair(NamedTuple):
    """A layer's samples, and the gradients of as many others, (N, m, n)."""

    samples: LayerSamples
    others: Tensor


def gather(task: Task, model: nn.Module, *, samples: int, seed: int) -> list[LayerPair]:
    """The layers of a model on twice `samples` samples of the training data.

    Args:
        task: whose training data is sampled.
        model: of the task, in evaluation mode; it is converted to float64, in place.
        samples: of each of the two sets.
        seed: of the order in which the data is read.

    Returns:
        A pair of sets for each layer.
    """
    subject, model = SUBJECTS[task.name], model.double()
    sizes = (subject.size(batch) for batch in task.train_batches(0, seed))
    parts = (part for index, size in enumerate(sizes) for part in split_batch(task, index, size, seed))
    taken = [take(task, model, part, subject.layers) for part in islice(parts, 2 * samples)]
    return [_pair(layer, [each[layer] for each in taken]) for layer in subject.layers]


def _pair(layer: str, taken: Sequence[Sample]) -> LayerPair:
    """What `kronecker_forms.compare` needs of a layer."""
    half = len(taken) // 2
    own = taken[:half]
    samples = LayerSamples(
        name=layer,
        gradients=torch.stack([sample.gradient for sample in own]),
        outputs=sum(sample.g.mT @ sample.g for sample in own) / half,
        inputs=sum(sample.a.mT @ sample.a for sample in own) / half,
        kappa=sum(len(sample.g) for sample in own) / half,
    )
    return LayerPair(samples, torch.stack([sample.gradient for sample in taken[half:]]))


def sample_task(name: str, *, samples: int, steps: int, seed: int, data_dir: Path) -> tuple[str, list[LayerPair]]:
    """The name of a task's data, and the layers of its model after `steps` steps of training.

    Args:
        name: of the task.
        samples: of each of the two sets.
        steps: of training before.
        seed: of weights and batches.
        data_dir: where the datasets are kept.

    Returns:
        The name, and a pair of sets for each layer.
    """
    task = load_task(name, data_dir)
    return task.dataset.name, gather(task, train(task, steps=steps, seed=seed), samples=samples, seed=seed)
