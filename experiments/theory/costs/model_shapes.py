"""The layers of the paper's four models, read off one forward pass of the models that the tasks themselves build.

Sizes are those of the recipes at scale paper. A ResNet and a DLRM run on torch's meta device, where nothing is
allocated; SchNet and fairseq's Transformer, whose forward passes look at values, run on a small batch. Any other model
can be given to `layer_shapes` in the same way.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from experiments.config.recipe import load_recipe
from experiments.theory.costs.operations import LayerShape
from experiments.theory.weight_uses import CONVOLUTIONS, LOOKUPS, Use, record_uses

# Rows of the 26 tables of the Criteo Kaggle data as DLRM's own preprocessing leaves them (printed by its script as
# --arch-embedding-size).
CRITEO_ROWS = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27),
    *(14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
CRITEO_NUMBERS = 13
# What fairseq-preprocess and fairseq-train print for fairseq's own preparation of IWSLT14 German-English:
# 8848 and 6632 types; 160,239 pairs with 4,035,591 and 3,949,114 tokens, 25.2 and 24.6 a sentence.
IWSLT14_TYPES = 8848, 6632
IWSLT14_TOKENS = 25


class Example(NamedTuple):
    """A model and one batch for it.

    Attributes:
        model: in training mode.
        forward: runs it on the batch.
        samples: in that batch.
        batch: samples of a step in the paper.
    """

    model: nn.Module
    forward: Callable[[], Any]
    samples: int
    batch: int


def layer_shapes(model: nn.Module, forward: Callable[[], Any], samples: int) -> list[LayerShape]:
    """Every weight of a model that a forward pass multiplies by or looks up in, in the order of first use.

    Args:
        model: whose weights.
        forward: runs it on a batch.
        samples: in the batch; positions are counted a sample.

    Returns:
        A shape for each weight.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> layer_shapes(model, lambda: model(torch.ones(4, 3, requires_grad=True)), 4)
        [LayerShape(name='', m=2, n=4, kappa=1, groups=1, lookups=0, input_gradient=True)]
    """
    with record_uses(model) as uses:
        forward()
    layers = dict.fromkeys(use.layer for use in uses)
    return [layer_shape([use for use in uses if use.layer == layer], samples) for layer in layers]


def layer_shape(uses: Sequence[Use], samples: int) -> LayerShape:
    """The shape of one layer from all uses of its weight; a tied table has the matrix of its dense use."""
    products = [use for use in uses if use.function not in LOOKUPS]
    first = (products or uses)[0]
    weight, groups = first.module.weight, 1
    if products:
        m, n = weight.shape[0], weight[0].numel() + (getattr(first.module, "bias", None) is not None)
        if first.function in CONVOLUTIONS:
            groups = first.module.groups
    else:
        n, m = weight.shape
    counts = [max(1, round(use.positions / samples)) for use in uses]
    return LayerShape(
        name=first.layer,
        m=m // groups,
        n=n,
        kappa=sum(counts),
        groups=groups,
        lookups=sum(count for use, count in zip(uses, counts, strict=True) if use.function in LOOKUPS),
        input_gradient=any(use.inputs.requires_grad for use in products),
    )


def _settings(task: str, scale: str = "paper") -> Mapping[str, Any]:
    return load_recipe(task, scale).task_settings


def resnet50() -> Example:
    """ResNet50 of torchvision, 224², batch 256."""
    from torchvision.models import get_model

    settings = _settings("resnet50-imagenet")
    with torch.device("meta"):
        model, images = get_model(settings["model"]), torch.empty(2, 3, settings["image_size"], settings["image_size"])
    return Example(model, lambda: model(images), len(images), settings["batch_size"])


def schnet() -> Example:
    """SchNet of schnetpack at the paper's size, on a batch of molecules of the embedded part of QM9."""
    from experiments.tasks.schnet.schnet_qm9 import SchNetQM9

    paper = _settings("schnet-qm9")
    sizes = {name: paper[name] for name in ("model", "batch_size")}
    task = SchNetQM9({**_settings("schnet-qm9", "tiny"), **sizes}, scale="paper", data_dir=Path("data"))
    model, batch = task.build_model(), next(task.train_batches(0, 0))
    return Example(model, lambda: task.loss(model, batch), paper["batch_size"], paper["batch_size"])


def transformer() -> Example:
    """The ``transformer_iwslt_de_en`` of fairseq, with dictionaries and sentences as long as IWSLT14's."""
    from experiments.data_io.text.fairseq_library import Dictionary, TranslationConfig, TranslationTask
    from experiments.dataclass_io import read_settings
    from experiments.tasks.transformer.translation import ModelSettings, build_model

    settings, dictionaries = _settings("transformer-iwslt14"), []
    for types in IWSLT14_TYPES:
        dictionary = Dictionary()
        for index in range(types - len(dictionary)):
            dictionary.add_symbol(f"type{index}")
        dictionaries.append(dictionary)
    sizes = read_settings(ModelSettings, settings["model"], "transformer-iwslt14/paper, [task.model]")
    model = build_model(sizes, TranslationTask(TranslationConfig(), *dictionaries))
    tokens, lengths = torch.full((2, IWSLT14_TOKENS), 5), torch.full((2,), IWSLT14_TOKENS)
    return Example(model, lambda: model(tokens, lengths, tokens), 2, settings["max_tokens"] // IWSLT14_TOKENS)


def dlrm() -> Example:
    """The DLRM of the task with the tables of Criteo Kaggle, batch 128."""
    from experiments.tasks.dlrm.dlrm_model import DLRM

    settings = _settings("dlrm-criteo")
    sizes = {name: settings[name] for name in ("embedding", "bottom", "top", "sparse")}
    with torch.device("meta"):
        model = DLRM(CRITEO_NUMBERS, CRITEO_ROWS, **sizes)
        numbers, rows = torch.empty(2, CRITEO_NUMBERS), torch.zeros(2, len(CRITEO_ROWS), dtype=torch.long)
    return Example(model, lambda: model(numbers, rows), len(numbers), settings["batch_size"])


PAPER_MODELS: Mapping[str, Callable[[], Example]] = {
    "resnet50": resnet50,
    "schnet": schnet,
    "transformer": transformer,
    "dlrm": dlrm,
}


def paper_layers(name: str) -> tuple[list[LayerShape], int]:
    """The layers of one of the paper's models, and its batch.

    Args:
        name: of `PAPER_MODELS`.

    Returns:
        Shapes of its layers, and samples (or tokens) in a batch.
    """
    example = PAPER_MODELS[name]()
    return layer_shapes(example.model.train(), example.forward, example.samples), example.batch
