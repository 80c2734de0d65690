"""Models of others, as they come: a few steps with finite losses, curvature where it is expected, no other warning."""

import warnings
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from ngplus import NGPlus
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


def make_optimizer(model: nn.Module, **settings) -> NGPlus:
    """NG+, which has nothing to warn of."""
    return NGPlus(model, **{"lr": 1e-3, "damping": 1.0, "update_every": 2, **settings})


def matrices(model: nn.Module) -> set[str]:
    """Every parameter with two dimensions or more, by its first name; but those of norms, and vectors of no layer."""
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    owners = {name: module for name, module in model.named_modules() if not isinstance(module, norms)}
    return {
        name
        for name, parameter in model.named_parameters()
        if (owner := owners.get(name.rpartition(".")[0])) is not None
        and parameter.dim() > 1
        and (sum(size > 1 for size in parameter.shape) > 1 or isinstance(owner, nn.Linear))
    }


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
def test_image_models_train_and_every_matrix_has_curvature(make):
    model = make()
    optimizer = make_optimizer(model)
    size = 32 if make in (small_vit, small_swin, swin_t, convnext_tiny) else 64
    images, labels = torch.randn(4, 3, size, size), torch.tensor([1, 3, 0, 1])
    assert_trains(model, optimizer, lambda: F.cross_entropy(model(images), labels), steps=3)
    assert set(optimizer.curvature) == matrices(model)
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


def test_a_language_model_with_an_lstm_has_curvature_in_every_matrix():
    model = LanguageModel()
    optimizer = make_optimizer(model)
    tokens = torch.randint(20, (4, 7))
    assert_trains(model, optimizer, lambda: F.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:]), steps=5)
    assert set(optimizer.curvature) == matrices(model)


def test_a_bias_that_the_model_changes_in_place_leaves_its_layer_to_the_base_with_one_warning():
    """Swin v2 zeroes a third of a copy of its attention's bias."""
    model = torchvision.models.SwinTransformer(
        patch_size=[2, 2],
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=[4, 4],
        num_classes=5,
        block=torchvision.models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=torchvision.models.swin_transformer.PatchMergingV2,
    )
    optimizer = make_optimizer(model)
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    with pytest.warns(
        UserWarning, match=r"attn\.qkv\.weight: each is used after an expression of it was changed.*untouched"
    ) as caught:
        optimizer.step()
    assert len(caught) == 1
    assert matrices(model) - set(optimizer.curvature) == {f"features.{i}.0.attn.qkv.weight" for i in (1, 3)}


def small_vit_of_timm() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **TIMM, num_heads=2, embed_dim=24, depth=1, patch_size=8)


def beit() -> nn.Module:
    return timm.create_model("beit_base_patch16_224", **TIMM, num_heads=2, embed_dim=24, depth=1, patch_size=8)


def cait() -> nn.Module:
    return timm.create_model("cait_xxs24_224", **TIMM, num_heads=2, embed_dim=24, depth=1, patch_size=8)


def xcit() -> nn.Module:
    return timm.create_model("xcit_nano_12_p16_224", **TIMM, depth=1)


def swin_v2_of_timm() -> nn.Module:
    sizes = {"window_size": 4, "depths": (1, 1), "num_heads": (2, 2), "embed_dim": 16}
    return timm.create_model("swinv2_tiny_window8_256", **TIMM, **sizes)


def levit() -> nn.Module:
    return timm.create_model("levit_128s", num_classes=5)


def edgenext() -> nn.Module:
    return timm.create_model("edgenext_xx_small", num_classes=5)


TIMM = {"img_size": 32, "num_classes": 5}
FAMILIES = [small_vit_of_timm, beit, cait, xcit, swin_v2_of_timm, levit, edgenext]


@pytest.mark.parametrize("make", FAMILIES)
def test_models_of_timm_have_curvature_in_every_matrix(make):
    model = make()
    optimizer = make_optimizer(model)
    size = {levit: 224, edgenext: 64}.get(make, 32)
    images, labels = torch.randn(2, 3, size, size), torch.tensor([1, 3])
    assert_trains(model, optimizer, lambda: F.cross_entropy(model(images), labels), steps=2)
    assert set(optimizer.curvature) == matrices(model)


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_transformer_of_torch_has_curvature_in_every_supported_layer(batch_first):
    model = nn.Transformer(
        d_model=16, nhead=2, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=24, batch_first=batch_first
    )
    batch_dim = 0 if batch_first else 1
    optimizer = make_optimizer(model, batch_dim=batch_dim)
    source, target = torch.randn(3, 5, 16), torch.randn(3, 4, 16)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    assert_trains(model, optimizer, lambda: F.mse_loss(model(source, target, tgt_mask=mask), target), steps=5)
    assert set(optimizer.curvature) == matrices(model)


def test_the_transformer_of_torch_has_one_curvature_whichever_dimension_the_batch_is():
    def curvature(batch_first: bool) -> dict[str, Tensor]:
        seed_cpu(0)
        model = nn.Transformer(16, 2, 1, 1, 24, dropout=0.0, batch_first=batch_first).double()
        optimizer = make_optimizer(model, batch_dim=0 if batch_first else 1)
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
