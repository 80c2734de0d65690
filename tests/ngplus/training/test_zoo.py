"""Models of others, as they come: a few steps with finite losses, curvature where it is expected, no other warning."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from ngplus import NGPlus
from ngplus.layers import SUPPORTED
from tests.ngplus.cases import seed_cpu


def resnet18() -> nn.Module:
    return torchvision.models.resnet18(num_classes=5)


def regnet_x_400mf() -> nn.Module:
    return torchvision.models.regnet_x_400mf(num_classes=5)


def mobilenet_v3_small() -> nn.Module:
    return torchvision.models.mobilenet_v3_small(num_classes=5)


def convnext_tiny() -> nn.Module:
    return torchvision.models.convnext_tiny(num_classes=5)


def small_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5
    )


def small_swin() -> nn.Module:
    return torchvision.models.SwinTransformer(
        patch_size=[2, 2], embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=5
    )


def swin_t() -> nn.Module:
    return torchvision.models.swin_t(num_classes=5)


IMAGE_MODELS = [resnet18, regnet_x_400mf, mobilenet_v3_small, convnext_tiny, small_vit, small_swin, swin_t]
# Parameters that belong to no supported layer; NG+ names their owners when it is made.
BARE = {
    "convnext_tiny": r"features\.1\.0 \(CNBlock\)",  # layer scales
    "small_vit": r"the model itself \(VisionTransformer\), encoder \(Encoder\)",  # class token, positions
    "small_swin": r"features\.1\.0\.attn \(ShiftedWindowAttention\)",  # tables of relative positions
    "swin_t": r"features\.1\.0\.attn \(ShiftedWindowAttention\)",
}


def make_optimizer(model: nn.Module, bare: str | None, **settings) -> NGPlus:
    """NG+ with the warning that is documented for this model, or none."""
    settings = {"lr": 1e-3, "damping": 1.0, "update_every": 2, **settings}
    if bare is None:
        return NGPlus(model, **settings)
    with pytest.warns(UserWarning, match=f"NG\\+ does not precondition {bare}.*go to SGD untouched") as caught:
        optimizer = NGPlus(model, **settings)
    assert len(caught) == 1
    return optimizer


def weights_of_supported_layers(model: nn.Module) -> set[str]:
    """Every weight that a supported layer of the model owns, by its first name."""
    names = {name: parameter.dim() for name, parameter in model.named_parameters()}
    owners = {name for name, module in model.named_modules() if isinstance(module, SUPPORTED)}
    return {name for name, dims in names.items() if dims > 1 and name.rpartition(".")[0] in owners}


def assert_trains(model: nn.Module, optimizer: NGPlus, loss: Callable[[], Tensor], steps: int) -> None:
    """The loop of anyone: finite losses, parameters that move, and no step skipped."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(steps):
        value = loss()
        assert value.isfinite()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.skipped_steps == 0
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.fixture(autouse=True)
def undocumented_warnings_are_errors():
    seed_cpu(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "enable_nested_tensor is True")  # nn.Transformer's own, when it is made
        yield


@pytest.mark.parametrize("make", IMAGE_MODELS)
def test_image_models_train_and_every_supported_layer_has_curvature(make):
    model = make()
    optimizer = make_optimizer(model, BARE.get(make.__name__))
    size = 32 if make in (small_vit, small_swin, swin_t, convnext_tiny) else 64
    images, labels = torch.randn(4, 3, size, size), torch.tensor([1, 3, 0, 1])
    assert_trains(model, optimizer, lambda: F.cross_entropy(model(images), labels), steps=3)
    assert set(optimizer.curvature) == weights_of_supported_layers(model)
    assert all(state.updates == 2 for state in optimizer.curvature.values())


class LanguageModel(nn.Module):
    """An LSTM between an embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.recurrent = nn.LSTM(8, 12, num_layers=2, batch_first=True)
        self.head = nn.Linear(12, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.recurrent(self.table(tokens))[0])


def test_a_language_model_with_an_lstm_preconditions_its_table_and_head():
    model = LanguageModel()
    optimizer = make_optimizer(model, r"recurrent \(LSTM\)")
    tokens = torch.randint(20, (4, 7))
    assert_trains(model, optimizer, lambda: F.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:]), steps=5)
    assert set(optimizer.curvature) == {"table.weight", "head.weight"}


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_transformer_of_torch_has_curvature_in_every_supported_layer(batch_first):
    model = nn.Transformer(
        d_model=16, nhead=2, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=24, batch_first=batch_first
    )
    batch_dim = 0 if batch_first else 1
    optimizer = make_optimizer(model, None, batch_dim=batch_dim)
    source, target = torch.randn(3, 5, 16), torch.randn(3, 4, 16)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    assert_trains(model, optimizer, lambda: F.mse_loss(model(source, target, tgt_mask=mask), target), steps=5)
    assert set(optimizer.curvature) == weights_of_supported_layers(model)


def test_the_transformer_of_torch_has_one_curvature_whichever_dimension_the_batch_is():
    def curvature(batch_first: bool) -> dict[str, Tensor]:
        seed_cpu(0)
        model = nn.Transformer(16, 2, 1, 1, 24, dropout=0.0, batch_first=batch_first).double()
        optimizer = make_optimizer(model, None, batch_dim=0 if batch_first else 1)
        source, target = torch.randn(3, 5, 16).double(), torch.randn(3, 4, 16).double()
        if batch_first:
            out = model(source, target)
        else:
            out = model(source.transpose(0, 1), target.transpose(0, 1)).transpose(0, 1)
        F.mse_loss(out, target).backward()
        optimizer.step()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    first, second = curvature(True), curvature(False)
    assert all(torch.allclose(first[name], second[name], rtol=1e-8, atol=1e-12) for name in first)
