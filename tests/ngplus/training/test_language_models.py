"""Language models of `transformers`, as they come: every matrix is preconditioned, or named with where it goes."""

import warnings

import pytest
import torch
from torch import nn

from ngplus import NGPlus
from tests.ngplus.cases import seed_cpu

transformers = pytest.importorskip("transformers")

TOKENS = 53
TOKEN_IDS = {"vocab_size": TOKENS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    **TOKEN_IDS,
}
GPT_SIZES = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 32, **TOKEN_IDS}
T5_SIZES = {"d_model": 24, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
# The model, its configuration, and sizes.
WHOLE = {
    "BertForMaskedLM": ("BertConfig", SIZES),
    "LlamaForCausalLM": ("LlamaConfig", {**SIZES, "num_key_value_heads": 1}),
    "GPT2LMHeadModel": ("GPT2Config", GPT_SIZES),
    "T5ForConditionalGeneration": ("T5Config", {**T5_SIZES, **TOKEN_IDS}),
}
MIXTRAL = ("MixtralForCausalLM", "MixtralConfig", {**SIZES, "num_key_value_heads": 1, "num_local_experts": 2})


def make(model: str, config: str, sizes: dict) -> nn.Module:
    seed_cpu(0)
    return getattr(transformers, model)(getattr(transformers, config)(**sizes))


def train_on_tokens(model: nn.Module, optimizer: NGPlus, steps: int = 6) -> list[float]:
    """The losses of some steps on one batch of tokens."""
    index = torch.randint(3, TOKENS, (4, 10))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=index, labels=index).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", WHOLE)
def test_every_matrix_of_a_language_model_is_preconditioned_without_a_warning(name):
    model = make(name, *WHOLE[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer = NGPlus(model, lr=0.02, damping=1.0, update_every=2)
        losses = train_on_tokens(model, optimizer)
    assert losses[-1] < losses[0]
    assert set(optimizer.curvature) == {name for name, p in model.named_parameters() if p.dim() > 1}


def test_experts_and_their_routers_go_to_the_base_with_one_warning():
    """Mixtral keeps the matrices of all its experts in one parameter of three dimensions."""
    model = make(*MIXTRAL)
    with pytest.warns(
        UserWarning, match=r"mlp\.gate \(\w+\), model\.layers\.0\.mlp\.experts \(\w+\).*untouched"
    ) as said:
        optimizer = NGPlus(model, lr=0.02, damping=1.0, update_every=2)
    assert len(said) == 1
    losses = train_on_tokens(model, optimizer)
    assert losses[-1] < losses[0]
    assert not [name for name in optimizer.curvature if ".mlp." in name]
