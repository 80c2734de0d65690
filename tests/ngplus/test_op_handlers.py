"""Weights in products that are not calls of their layer: transposed, by ``@``, by ``addmm`` as in GPT-2's Conv1D."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngplus import NGPlus
from ngplus.baselines import KFAC, SENG
from tests.ngplus import oracle
from tests.ngplus.cases import seed_cpu

transformers = pytest.importorskip("transformers")
Conv1D = transformers.pytorch_utils.Conv1D

HEADS = {
    "x @ W.T": lambda x, W: x @ W.T,
    "x @ W.mT": lambda x, W: x @ W.mT,
    "x.matmul(W.t())": lambda x, W: x.matmul(W.t()),
    "torch.matmul": lambda x, W: torch.matmul(x, other=W.transpose(0, 1)),
    "F.linear": lambda x, W: F.linear(x, W),
}


class TiedHead(nn.Module):
    """A language model that gets its logits from the table of its tokens."""

    def __init__(self, head) -> None:
        super().__init__()
        seed_cpu(0)
        self.table, self.mix = nn.Embedding(11, 4), nn.Linear(4, 4)
        self.head = head

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.mix(self.table(index)).tanh(), self.table.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_multiplies_by_the_transposed_table(head, dtype):
    oracle.check(TiedHead(HEADS[head]).to(dtype), torch.randint(11, (5, 3)))


BACK = {
    "h @ W": lambda h, W, b: h @ W + b,
    "F.linear": lambda h, W, b: F.linear(h, W.T, b),
    "torch.addmm": lambda h, W, b: torch.addmm(b, h, W),
    "torch.addmm by keyword": lambda h, W, b: torch.addmm(input=b, mat1=h, mat2=W),
    "torch.mm": lambda h, W, b: torch.mm(h, mat2=W) + b,
    "h.mm(W)": lambda h, W, b: h.mm(W) + b,
}


class Autoencoder(nn.Module):
    """Decodes by the transpose of the matrix that encodes."""

    def __init__(self, back, inside: int, outside: int, bias: bool) -> None:
        super().__init__()
        seed_cpu(0)
        self.encode = nn.Linear(inside, outside, bias=bias)
        self.shift = nn.Parameter(torch.randn(inside))
        self.back = back

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.encode(x).tanh(), self.encode.weight, self.shift)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sides", [(5, 3), (3, 5), (4, 4), (1, 3), (3, 1), (1, 1)])
@pytest.mark.parametrize("back", BACK)
def test_a_matrix_used_both_ways_is_one_curvature_of_both(back, sides, bias):
    model = Autoencoder(BACK[back], *sides, bias).double()
    oracle.check(model, torch.randn(6, sides[0], dtype=torch.float64))


@pytest.mark.parametrize("batch_dim", [0, 1])
@pytest.mark.parametrize("back", ["h @ W", "F.linear"])
def test_a_matrix_used_both_ways_on_sequences(back, batch_dim):
    model = Autoencoder(BACK[back], 5, 3, True).double()
    oracle.check(model, torch.randn(6, 4, 5, dtype=torch.float64), batch_dim=batch_dim)


class Convolved(nn.Module):
    """GPT-2's linear layers, narrow to wide and back."""

    def __init__(self, trained_bias: bool = True) -> None:
        super().__init__()
        seed_cpu(0)
        self.up, self.down = Conv1D(7, 4), Conv1D(3, 7)
        for layer in (self.up, self.down):
            nn.init.normal_(layer.weight)
            layer.bias.requires_grad_(trained_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("samples", ["batch", "rows"])
@pytest.mark.parametrize("between", [(), (3,), (3, 2)])
def test_conv1d_of_gpt2_flattens_its_input_and_its_samples_stay_apart(between, samples, dtype):
    oracle.check(Convolved().to(dtype), torch.randn(5, *between, 4, dtype=dtype), samples=samples)


@pytest.mark.parametrize("options", [{"block_size": 2}, {"max_samples": 2}, {"solver": "low_rank"}])
def test_conv1d_with_every_option_matches_the_oracle(options):
    oracle.check(Convolved().double(), torch.randn(5, 4, dtype=torch.float64), **options)


def test_conv1d_with_another_batch_dimension_matches_the_oracle():
    oracle.check(Convolved().double(), torch.randn(3, 5, 4, dtype=torch.float64), batch_dim=1)


def test_conv1d_is_a_linear_layer_with_its_matrix_transposed():
    """To the baseline with whole per-sample gradients too: the directions are each other's transposes."""
    transposed = Convolved(trained_bias=False).double()
    plain = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    for ours, theirs in zip((plain[0], plain[2]), (transposed.up, transposed.down), strict=True):
        ours.weight.data.copy_(theirs.weight.T)
        ours.bias.data.copy_(theirs.bias)
        ours.bias.requires_grad_(False)
    x = torch.randn(6, 2, 4, dtype=torch.float64)
    for model in (transposed, plain):
        optimizer = SENG(model, lr=1e-9, damping=0.3, update_every=1)
        (oracle.energy(model(x)) / 6).backward()
        optimizer.step()
        assert len(optimizer.curvature) == 2
    assert torch.allclose(transposed.up.weight.grad, plain[0].weight.grad.T, rtol=1e-9, atol=1e-12)
    assert torch.allclose(transposed.down.weight.grad, plain[2].weight.grad.T, rtol=1e-9, atol=1e-12)


def gpt2() -> nn.Module:
    """GPT-2 with two blocks, as `transformers` has it."""
    seed_cpu(0)
    config = transformers.GPT2Config(
        vocab_size=31,
        n_positions=8,
        n_embd=12,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


class Logits(nn.Module):
    """The logits of a language model alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, index: Tensor) -> Tensor:
        return self.model(input_ids=index, use_cache=False).logits


def test_every_matrix_of_gpt2_but_its_positions_matches_the_oracle():
    """The table of positions is looked up once for the whole batch: one sample, as in `docs/supported.md`."""
    model = Logits(gpt2()).double()
    model.model.transformer.wpe.weight.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = oracle.check(model, torch.randint(31, (4, 6)))
    assert len(optimizer.curvature) == 1 + 2 * 4


class Shifted(nn.Module):
    """Adds the bias of its layer by itself."""

    def __init__(self, call) -> None:
        super().__init__()
        seed_cpu(0)
        self.inlet, self.outlet = nn.Linear(5, 6), nn.Linear(6, 3)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.outlet(self.call(self, x).tanh())


TO_BASE = {
    "a bias added by hand": (
        lambda m, x: x @ m.inlet.weight.T + m.inlet.bias,
        r"inlet\.weight is used apart from its bias, which .*add.* takes",
    ),
    "a bias used once more": (
        lambda m, x: m.inlet(x) + m.inlet.bias.exp(),
        r"inlet\.weight is used apart from its bias, which exp takes",
    ),
    "a scaled addmm": (
        lambda m, x: torch.addmm(m.inlet.bias, x, m.inlet.weight.T, alpha=2),
        r"inlet\.weight is used by addmm with alpha=2",
    ),
}


@pytest.mark.parametrize("case", TO_BASE)
def test_products_that_no_handler_reads_are_differentiated_again(case):
    optimizer = oracle.check(Shifted(TO_BASE[case][0]).double(), torch.randn(4, 5, dtype=torch.float64))
    assert set(optimizer.curvature) == {"inlet.weight", "outlet.weight"}


@pytest.mark.parametrize("case", TO_BASE)
def test_unsupported_products_go_to_the_base_with_one_warning(case):
    call, message = TO_BASE[case]
    model = Shifted(call)
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1, function_fallback="base")
    oracle.energy(model(torch.randn(4, 5))).backward()
    before = model.inlet.weight.grad.clone()
    with pytest.warns(UserWarning, match=message + r".*untouched") as caught:
        optimizer.step()
    assert len(caught) == 1
    assert set(optimizer.curvature) == {"outlet.weight"}
    assert torch.equal(model.inlet.weight.grad, before)


class ProductOfTwo(nn.Module):
    """A matrix that is the product of two, before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        seed_cpu(0)
        self.a, self.b, self.c = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(x @ (self.a.weight @ self.b.weight))


def test_a_product_of_two_parameters_is_differentiated_with_what_it_is_multiplied_by():
    oracle.check(ProductOfTwo().double(), torch.randn(6, 4, dtype=torch.float64))


def test_a_product_of_two_parameters_has_no_samples():
    model = ProductOfTwo()
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1, function_fallback="base")
    oracle.energy(model(torch.randn(6, 4))).backward()
    with pytest.warns(UserWarning, match="untouched") as caught:
        optimizer.step()
    assert [str(each.message)[:35] for each in caught] == ["a.weight, b.weight: each is multipl"]
    assert set(optimizer.curvature) == {"c.weight"}


def test_conv1d_called_by_keyword_goes_to_the_base_with_a_warning():
    """Nothing tells the samples of its flattened rows then."""
    model = Convolved()
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1)
    oracle.energy(model.down(x=model.up(torch.randn(4, 3, 4)))).backward()
    with pytest.warns(UserWarning, match=r"down\.weight is used on flattened rows whose samples nothing tells"):
        optimizer.step()
    assert set(optimizer.curvature) == {"up.weight"}


def test_kfac_has_no_factors_for_a_matrix_multiplied_from_the_other_side():
    model = Autoencoder(BACK["F.linear"], 5, 3, True)
    optimizer = KFAC(model, lr=1e-9, damping=0.3, update_every=1)
    oracle.energy(model(torch.randn(4, 5))).backward()
    with pytest.warns(UserWarning, match=r"encode\.weight is multiplied from the other side.*untouched"):
        optimizer.step()
    assert not optimizer.curvature
