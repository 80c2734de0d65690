"""The direction (6) for nn.MultiheadAttention, against gradients made one sample at a time."""

import pytest
import torch
from torch import nn
from torch.nn.attention import flex_attention

from tests.ngplus import oracle
from tests.ngplus.cases import points, seed_cpu


class Attention(nn.Module):
    """Attention whose three inputs are made from one, so that samples can be cut along one dimension.

    Args:
        inputs: "self": all the same; "memory": keys and values the same; "apart": all different.
        call: keyword arguments of the attention's forward.
    """

    def __init__(self, inputs="self", call=None, dtype=torch.float64, **options):
        super().__init__()
        seed_cpu(0)
        self.attention = nn.MultiheadAttention(4, 2, **options)
        for name in ("in_proj_bias", "out_proj.bias"):  # zero at first, where a wrong column would make no difference
            if (bias := dict(self.attention.named_parameters()).get(name)) is not None:
                nn.init.normal_(bias)
        sizes = (self.attention.kdim, self.attention.vdim)
        self.key, self.value = (nn.Linear(4, size) for size in sizes)
        self.inputs, self.call = inputs, call or {}
        self.to(dtype)

    def forward(self, x):
        key = self.key(x.tanh()) if self.inputs != "self" else x
        value = self.value(x.sin()) if self.inputs == "apart" else key
        return self.attention(x, key, value, **self.call)


SEPARATE = {"kdim": 3, "vdim": 6}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("inputs", ["self", "memory", "apart"])
def test_attention_with_packed_projections_matches_the_oracle(inputs, batch_first, need_weights, bias):
    model = Attention(inputs, {"need_weights": need_weights}, batch_first=batch_first, bias=bias)
    batch_dim = 0 if batch_first else 1
    optimizer = oracle.check(model, torch.randn(3, 5, 4, dtype=torch.float64), batch_dim=batch_dim)
    assert {"attention.in_proj_weight", "attention.out_proj.weight"} <= set(optimizer.curvature)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_with_separate_projections_matches_the_oracle(batch_first, need_weights):
    model = Attention("apart", {"need_weights": need_weights}, batch_first=batch_first, **SEPARATE)
    batch_dim = 0 if batch_first else 1
    optimizer = oracle.check(model, torch.randn(3, 5, 4, dtype=torch.float64), batch_dim=batch_dim)
    assert {f"attention.{name}_proj_weight" for name in "qkv"} <= set(optimizer.curvature)


class Learned(nn.Module):
    """Attention with a parameter in place of its queries, keys and values, or of its mask."""

    def __init__(self, place, batch_first, need_weights):
        super().__init__()
        seed_cpu(0)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.p = nn.Parameter(torch.randn((2, 5, 5) if place == "masks of heads" else (5, 5 if place == "mask" else 4)))
        self.place, self.need_weights = place, need_weights
        self.double()

    def forward(self, x):
        batch_first, place, options = self.attention.batch_first, self.place, {"need_weights": self.need_weights}
        batch = x.shape[0 if batch_first else 1]
        if "mask" in place:
            mask = self.p.repeat(batch, 1, 1) if place == "masks of heads" else self.p
            return self.attention(x, x, x, attn_mask=mask, **options)
        p = self.p.expand(batch, -1, -1) if batch_first else self.p[:, None].repeat(1, batch, 1)
        return self.attention(*{"query": (p, x, x), "keys and values": (x, p, p)}[place], **options)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("place", ["query", "keys and values", "mask", "masks of heads"])
def test_what_attention_learns_in_place_of_an_input_matches_the_oracle(place, batch_first, need_weights):
    batch_dim = 0 if batch_first else 1
    shape = (3, 5, 4) if batch_first else (5, 3, 4)
    for options in ({"batch_dim": batch_dim}, {"batch_dim": batch_dim, "block_size": 2}):
        optimizer = oracle.check(Learned(place, batch_first, need_weights), points(*shape), **options)
        assert set(optimizer.curvature) == {"p", "attention.in_proj_weight", "attention.out_proj.weight"}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_parametrized_projections_of_attention_match_the_oracle(batch_first, need_weights):
    model = Attention("self", {"need_weights": need_weights}, batch_first=batch_first)
    nn.utils.parametrizations.weight_norm(model.attention, "in_proj_weight")
    nn.utils.parametrizations.weight_norm(model.attention.out_proj)
    model.double()
    optimizer = oracle.check(model, points(3, 5, 4), batch_dim=0 if batch_first else 1)
    assert {"attention.parametrizations.in_proj_weight.original1"} < set(optimizer.curvature)


@pytest.mark.parametrize("options", [{}, SEPARATE])
def test_attention_in_float32_matches_the_oracle(options):
    model = Attention("apart", dtype=torch.float32, batch_first=True, **options)
    oracle.check(model, torch.randn(3, 5, 4), damping=30.0)  # samples are alike here: a small λ magnifies rounding


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("inputs", ["self", "apart"])
def test_attention_without_a_batch_dimension_is_a_batch_of_one(inputs, need_weights):
    model = Attention(inputs, {"need_weights": need_weights})
    x = torch.randn(5, 4, dtype=torch.float64)
    gradients = oracle.sample_gradients(model.attention, [lambda m: oracle.energy(run(model, m, x))])
    oracle.descend(model.attention, lambda m: oracle.energy(run(model, m, x)), damping=0.3)
    assert oracle.error(model.attention, oracle.directions(gradients, 0.3)) <= 1e-10


def run(model, attention, x):
    """``model`` with another attention in it; its own linear layers are not trained."""
    key = model.key(x.tanh()).detach() if model.inputs != "self" else x
    value = model.value(x.sin()).detach() if model.inputs == "apart" else key
    return attention(x, key, value, **model.call)


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_with_masks_matches_the_oracle(need_weights):
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    model = Attention("self", {"attn_mask": causal, "need_weights": need_weights}, batch_first=True)
    oracle.check(model, torch.randn(3, 5, 4, dtype=torch.float64))


def test_attention_with_padded_keys_matches_the_oracle():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Attention("self", batch_first=True)

        def forward(self, x, padded):
            return self.inner.attention(x, x, x, key_padding_mask=padded)[0]

    padded = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    oracle_inputs = torch.randn(3, 5, 4, dtype=torch.float64), padded
    model = Padded()
    model.inner.key = model.inner.value = None
    oracle.check(model, *oracle_inputs)


def test_rows_of_self_attention_are_rows_of_its_linear_layers():
    """Against the same attention written out with linear layers."""
    attention = Attention("self", batch_first=True).attention
    written = WrittenOut(attention)
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    gradients = oracle.row_gradients(written, lambda m: oracle.energy(m(x)) / 3)
    oracle.descend(attention, lambda m: oracle.energy(m(x, x, x)[0]) / 3, damping=0.3, samples="rows")
    packed, out = oracle.directions(gradients, 0.3).values()
    renamed = dict(zip(oracle.matrices(attention), (packed, out), strict=True))
    assert oracle.error(attention, renamed) <= 1e-10


class WrittenOut(nn.Module):
    """Self-attention of two heads, batch first, with the weights of an `nn.MultiheadAttention`."""

    def __init__(self, attention):
        super().__init__()
        self.inside, self.out = nn.Linear(4, 12).double(), nn.Linear(4, 4).double()
        self.inside.weight.data.copy_(attention.in_proj_weight)
        self.inside.bias.data.copy_(attention.in_proj_bias)
        self.out.load_state_dict(attention.out_proj.state_dict())

    def forward(self, x):
        q, k, v = (t.view(*x.shape[:2], 2, 2).transpose(1, 2) for t in self.inside(x).chunk(3, dim=-1))
        mixed = torch.softmax(q @ k.mT / 2**0.5, dim=-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("inputs", ["memory", "apart"])
def test_one_attention_used_for_itself_and_for_a_memory(inputs):
    """The whole packed weight in one use, slices of it in the other."""

    class Twice(Attention):
        def forward(self, x):
            own = self.attention(x, x, x, need_weights=False)[0]
            return super().forward(own)[0] + own

    model = Twice(inputs, {"need_weights": False}, batch_first=True)
    oracle.check(model, torch.randn(3, 5, 4, dtype=torch.float64))


@pytest.mark.parametrize("norm_first", [True, False])
def test_every_matrix_of_an_encoder_layer_matches_the_oracle(norm_first):
    seed_cpu(0)
    model = nn.TransformerEncoderLayer(4, 2, 7, dropout=0.0, batch_first=True, norm_first=norm_first).double()
    oracle.check(model, torch.randn(3, 5, 4, dtype=torch.float64))


def test_an_encoder_layer_in_evaluation_mode_is_captured():
    seed_cpu(0)
    model = nn.TransformerEncoderLayer(4, 2, 7, batch_first=True).double().eval()
    oracle.check(model, torch.randn(3, 5, 4, dtype=torch.float64))


def test_extra_biases_of_keys_and_values_are_vectors_and_go_to_the_base():
    optimizer = oracle.check(
        Attention("self", batch_first=True, add_bias_kv=True), torch.randn(3, 5, 4, dtype=torch.float64)
    )
    assert not any("bias" in name for name in optimizer.curvature)


class JoinedBiases(nn.Module):
    """Attention as fairseq calls it: three linear layers, their biases joined for the function to cut apart."""

    def __init__(self, frozen=()):
        super().__init__()
        seed_cpu(0)
        for name in ("query", "key", "value", "out"):
            setattr(self, name, nn.Linear(4, 4))
            getattr(self, name).bias.requires_grad_(name not in frozen)
        self.double()

    def forward(self, x):
        return nn.functional.multi_head_attention_forward(
            x, x.tanh(), x.sin(), 4, 2, None, torch.cat([self.query.bias, self.key.bias, self.value.bias]),
            None, None, False, 0.0, self.out.weight, self.out.bias, use_separate_proj_weight=True,
            q_proj_weight=self.query.weight, k_proj_weight=self.key.weight, v_proj_weight=self.value.weight,
        )[0]  # fmt: skip


@pytest.mark.parametrize("frozen", [(), ("query",), ("key", "out")])
def test_biases_that_are_concatenated_and_split_again_stay_bias_columns(frozen):
    model = JoinedBiases(frozen)
    optimizer = oracle.check(model, torch.randn(5, 3, 4, dtype=torch.float64), batch_dim=1)
    assert {f"{name}.weight" for name in ("query", "key", "value", "out")} == set(optimizer.curvature)


class Flexible(nn.Module):
    """Attention by `flex_attention`, whose scores fall with the distance."""

    def __init__(self):
        super().__init__()
        seed_cpu(0)
        self.project, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.double()

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = flex_attention.flex_attention(q, k, v, lambda score, _batch, _head, i, j: score - 0.1 * (i - j).abs())
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.fixture
def trains_flex_attention(monkeypatch):
    """torch has no fused kernel of it for CPUs, and refuses it there; what runs without a kernel runs there too."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


@pytest.mark.filterwarnings("ignore:flex_attention called without", "ignore:The .grad attribute of a Tensor that")
def test_projections_around_flex_attention_match_the_oracle(trains_flex_attention):
    optimizer = oracle.check(Flexible(), points(3, 5, 8))
    assert set(optimizer.curvature) == {"project.weight", "out.weight"}
