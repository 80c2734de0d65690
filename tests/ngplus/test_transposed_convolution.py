"""Transposed convolutions: in × (out · kernel), one matrix a group; their input multiplies patches of the gradient."""

import pytest
import torch
from torch import nn

from ngplus import NGPlus
from ngplus.baselines import KFAC, SENG
from tests.ngplus import oracle
from tests.ngplus.cases import points, seed_cpu

KINDS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
OPTIONS = {
    "plain": {},
    "strided and padded": {"stride": 2, "padding": 1, "output_padding": 1},
    "grouped and dilated": {"groups": 2, "dilation": 2, "stride": 2, "output_padding": 1},
    "more output than a patch reaches": {"dilation": 3, "output_padding": 2},
    "more padding than patches": {"padding": 2, "stride": 3, "bias": False},
}


def make(kind, dtype=torch.float64, **options):
    seed_cpu(0)
    return kind(4, 6, 3, **options).to(dtype)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("directions", KINDS)
def test_transposed_convolution_of_any_shape_matches_the_oracle(directions, options):
    model = make(KINDS[directions], **OPTIONS[options])
    assert list(oracle.check(model, points(3, 4, *[4] * directions)).curvature) == ["weight"]


@pytest.mark.parametrize("options", [{"block_size": 3}, {"max_samples": 2}, {"ema": 0.5}])
def test_transposed_convolution_with_every_option(options):
    oracle.check(make(nn.ConvTranspose2d, groups=2), points(3, 4, 3, 3), **options)


def test_transposed_convolution_in_float32():
    oracle.check(make(nn.ConvTranspose2d, torch.float32, stride=2), points(3, 4, 3, 3, dtype=torch.float32))


def test_its_bias_goes_to_the_base_as_it_is():
    model, x = make(nn.ConvTranspose1d), points(3, 4, 5)
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1)
    oracle.batch_loss(x)(model).backward()
    before = model.bias.grad.clone()
    optimizer.step()
    assert torch.equal(model.bias.grad, before)


def test_seng_has_its_factors_and_kfac_names_it():
    x = points(3, 4, 5)
    for kind in (SENG, KFAC):
        model = make(nn.ConvTranspose1d)
        optimizer = kind(model, lr=1e-9, damping=0.3, update_every=1)
        oracle.batch_loss(x)(model).backward()
        if kind is KFAC:
            with pytest.warns(UserWarning, match="weight is multiplied from the other side"):
                optimizer.step()
        else:
            optimizer.step()
        assert len(optimizer.curvature) == (kind is SENG)


class TiedAutoencoder(nn.Module):
    """A convolution on the way in, and its weight the other way round on the way out."""

    def __init__(self, bias):
        super().__init__()
        seed_cpu(0)
        self.inlet = nn.Conv2d(4, 6, 3, bias=bias).double()

    def forward(self, x):
        return nn.functional.conv_transpose2d(self.inlet(x).tanh(), self.inlet.weight)


@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_that_is_used_both_ways_is_one_curvature_of_both(bias):
    assert list(oracle.check(TiedAutoencoder(bias), points(3, 4, 4, 4)).curvature) == ["inlet.weight"]
