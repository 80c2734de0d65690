"""Language models of `transformers`, as they come: every matrix is preconditioned, or named with where it goes."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from ngplus import NGPlus
from tests.ngplus import oracle
from tests.ngplus.cases import seed_cpu
from tests.ngplus.training.test_zoo import matrices

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
EXPERTS = {**SIZES, "num_hidden_layers": 1, "num_key_value_heads": 1, "num_experts_per_tok": 2}
MAMBA = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "state_size": 4,
    "time_step_rank": 3,
    **TOKEN_IDS,
}
QWEN = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
GPT_OSS = {"num_local_experts": 4, "head_dim": 12, "layer_types": ["full_attention"]}
# The model, its configuration, and sizes.
WHOLE = {
    "BertForMaskedLM": ("BertConfig", SIZES),
    "LlamaForCausalLM": ("LlamaConfig", {**SIZES, "num_key_value_heads": 1}),
    "GPT2LMHeadModel": ("GPT2Config", GPT_SIZES),
    "T5ForConditionalGeneration": ("T5Config", {**T5_SIZES, **TOKEN_IDS}),
    "MixtralForCausalLM": ("MixtralConfig", {**EXPERTS, "num_local_experts": 4}),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", {**EXPERTS, **QWEN}),
    "GptOssForCausalLM": ("GptOssConfig", {**EXPERTS, **GPT_OSS}),
    "MambaForCausalLM": ("MambaConfig", MAMBA),
    "Mamba2ForCausalLM": ("Mamba2Config", {**MAMBA, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 5}),
}


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
    assert set(optimizer.curvature) == matrices(model)


class Logits(nn.Module):
    """The logits of a language model alone, in float64 throughout."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.double()

    def forward(self, index: Tensor) -> Tensor:
        return self.model(input_ids=index, use_cache=False).logits


# Both cast some tensors to float32, whatever the model is in; here to float64.
EXACT = {
    "experts in a loop": ("MixtralForCausalLM", "eager"),
    "experts as a batch": ("MixtralForCausalLM", "batched_mm"),
    "a state space": ("MambaForCausalLM", None),
}


@pytest.mark.parametrize("name", EXACT)
def test_every_matrix_of_mixtral_and_mamba_matches_the_oracle(name, monkeypatch):
    """A sample is a sentence, also of the router and of the experts, which get its tokens in one list with others'."""
    convert = Tensor.to
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setattr(
        Tensor,
        "to",
        lambda x, *args, **kw: convert(x, *(torch.float64 if a == torch.float32 else a for a in args), **kw),
    )
    kind, experts = EXACT[name]
    model = make(kind, *WHOLE[kind])
    if experts is not None:
        model.config._experts_implementation = experts
    optimizer = oracle.check(Logits(model), torch.randint(1, TOKENS, (3, 5)))
    assert set(optimizer.curvature) == matrices(optimizer._model)


def test_experts_by_grouped_mm_are_those_of_the_loop():
    """In float32, which it has a kernel for."""

    def directions(experts: str) -> list[Tensor]:
        model = make("MixtralForCausalLM", *WHOLE["MixtralForCausalLM"])
        model.config._experts_implementation = experts
        optimizer = NGPlus(model, lr=1e-9, damping=0.1, update_every=1)
        index = torch.randint(3, TOKENS, (4, 6), generator=torch.Generator().manual_seed(0))
        model(input_ids=index, labels=index).loss.backward()
        optimizer.step()
        assert set(optimizer.curvature) == matrices(model)
        return [parameter.grad for parameter in model.parameters()]

    for one, other in zip(directions("eager"), directions("grouped_mm"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def wav2vec2() -> tuple[nn.Module, dict[str, Tensor]]:
    """With a convolution under weight_norm."""
    sizes = {"conv_dim": [8, 8], "conv_kernel": [4, 4], "conv_stride": [2, 2], "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False}
    config = {**SIZES, "num_hidden_layers": 1, **sizes, **positions}
    return make("Wav2Vec2Model", "Wav2Vec2Config", config), {"input_values": torch.randn(2, 200)}


def perceiver() -> tuple[nn.Module, dict[str, Tensor]]:
    """With queries that are parameters."""
    heads = {"num_self_attends_per_block": 1, "num_self_attention_heads": 2, "num_cross_attention_heads": 2}
    config = {"num_latents": 4, "d_latents": 16, "d_model": 24, "num_blocks": 1, **heads}
    return make("PerceiverModel", "PerceiverConfig", config), {"inputs": torch.randn(2, 8, 24)}


def swin() -> tuple[nn.Module, dict[str, Tensor]]:
    """With tables of relative positions."""
    config = {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 12,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    }
    return make("SwinModel", "SwinConfig", config), {"pixel_values": torch.randn(2, 3, 32, 32)}


@pytest.mark.parametrize("kind", [wav2vec2, perceiver, swin])
def test_every_matrix_of_other_models_is_preconditioned_without_a_warning(kind):
    model, inputs = kind()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer = NGPlus(model, lr=1e-3, damping=1.0, update_every=2)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(**inputs)[0].square().mean()
            loss.backward()
            optimizer.step()
    used = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert set(optimizer.curvature) == matrices(model) & used


def test_dropout_of_a_table_that_all_samples_share_leaves_it_to_the_base_with_one_warning():
    """DeBERTa drops elements of its relative positions, which no second call drops again."""
    config = {**SIZES, "num_hidden_layers": 1, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    model = make("DebertaV2ForMaskedLM", "DebertaV2Config", config)
    optimizer = NGPlus(model, lr=1e-3, damping=1.0, update_every=1)
    index = torch.randint(3, TOKENS, (2, 6))
    model(input_ids=index, labels=index).loss.backward()
    with pytest.warns(UserWarning, match=r"rel_embeddings\.weight .*random.*untouched") as caught:
        optimizer.step()
    assert len(caught) == 1
    assert matrices(model) - set(optimizer.curvature) == {"deberta.encoder.rel_embeddings.weight"}
