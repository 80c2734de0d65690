"""Six models as their libraries build them, small, whose joint batch one process or several may train on."""

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from experiments.data_io.text.fairseq_library import Dictionary, TransformerModel
from experiments.tasks.dlrm.dlrm_model import DLRM
from experiments.tasks.transformer.translation import ModelSettings
from tests.ngplus.cases import seed_cpu
from tests.ngplus.training.problems import perceptron

BATCH, TOKENS = 8, 23


@dataclass
class Case:
    """A model and the mean loss of some samples of a batch of eight.

    Attributes:
        model: in float64.
        loss: takes the model, or what it is wrapped in, and which samples.
        settings: of its optimizer.
    """

    model: nn.Module
    loss: Callable[[nn.Module, slice], Tensor]
    settings: Mapping[str, Any]


def mlp() -> Case:
    problem = perceptron(samples=BATCH)
    return Case(problem.model, problem.loss, {})


def resnet() -> Case:
    """The stem and a stage of a ResNet, with group norms: batch norms of parts of a batch are not those of it all."""
    model = torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], norm_layer=lambda channels: nn.GroupNorm(4, channels)
    )
    model.layer2 = model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(64, 5)
    model.double()
    images, targets = torch.randn(BATCH, 3, 16, 16).double(), torch.randint(5, (BATCH,))
    return Case(model, lambda through, part: F.cross_entropy(through(images[part]), targets[part]), {})


def fairseq_transformer() -> Case:
    """Its decoder's table is the head's too."""
    words = Dictionary()
    for number in range(TOKENS):
        words.add_symbol(f"w{number}")
    rates = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    settings = ModelSettings(layers=2, dim=16, ffn_dim=32, heads=2, **rates).arguments()
    task = types.SimpleNamespace(source_dictionary=words, target_dictionary=words)
    model = TransformerModel.build_model(settings, task).double()
    source, target = (torch.randint(4, len(words), (BATCH, 6)) for _ in range(2))
    lengths = torch.full((BATCH,), 6)

    def loss(through: nn.Module, part: slice) -> Tensor:
        logits, _ = through(source[part], lengths[part], target[part])
        return F.cross_entropy(logits.flatten(0, 1), target[part].flatten())

    return Case(model, loss, {"batch_dim": {"": 1, "encoder.embed_tokens": 0, "decoder.embed_tokens": 0}})


def language_model(model: PreTrainedModel) -> Case:
    model.double()
    index = torch.randint(3, TOKENS, (BATCH, 6))
    places = torch.arange(6).expand(BATCH, 6)  # for each sample, since one for all would be one sample

    def loss(through: nn.Module, part: slice) -> Tensor:
        output: Tensor = through(input_ids=index[part], labels=index[part], position_ids=places[part]).loss
        return output

    return Case(model, loss, {})


SIZES: dict[str, Any] = {
    "vocab_size": TOKENS,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
}


def bert() -> Case:
    config = BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return language_model(BertForMaskedLM(config))


def llama() -> Case:
    return language_model(LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)))


def dlrm() -> Case:
    model = DLRM(5, (30, 3, 7), embedding=4, bottom=(16, 8), top=(16, 8)).double()
    numbers, clicks = torch.randn(BATCH, 5).double(), torch.randint(2, (BATCH,)).double()
    categories = torch.stack([torch.randint(rows, (BATCH,)) for rows in (30, 3, 7)], dim=1)

    def loss(through: nn.Module, part: slice) -> Tensor:
        return F.binary_cross_entropy_with_logits(through(numbers[part], categories[part]), clicks[part])

    return Case(model, loss, {})


MODELS = {make.__name__: make for make in (mlp, resnet, fairseq_transformer, bert, llama, dlrm)}


def build(name: str) -> Case:
    """The same model and batch in every process."""
    seed_cpu(0)
    return MODELS[name]()
