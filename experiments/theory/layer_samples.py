"""Per-sample factors of real layers: three small networks trained on Fashion-MNIST, or on synthetic images.

The factors are collected by plain hooks and do not go through `ngplus`, so that they can be an oracle for it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.theory.kronecker import LayerSamples

EMBEDDED = Path(__file__).parents[1] / "data" / "embedded" / "fashion_mnist.npz"


def load_images(seed: int) -> tuple[Tensor, Tensor, str]:
    """Images (N, 1, 28, 28), labels (N,), and the data's name.

    Synthetic images are a smooth template a class plus noise; they are taken only if the embedded file is
    not there, and say so in their name.
    """
    if EMBEDDED.exists():
        with np.load(EMBEDDED) as data:
            pixels, labels = data["train_pixels"], data["train_labels"]
        images = torch.from_numpy(pixels).float().unsqueeze(1) / 255 - 0.3
        return images, torch.from_numpy(labels).long(), f"Fashion-MNIST, {len(labels):,} embedded images"
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (4000,), generator=generator)
    templates = F.interpolate(torch.randn(10, 1, 5, 5, generator=generator), size=28, mode="bicubic")
    images = templates[labels] + 0.5 * torch.randn(4000, 1, 28, 28, generator=generator)
    return images, labels, "synthetic images, ten smooth templates"


def mlp() -> nn.Module:
    """784-32-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))


def convnet() -> nn.Module:
    """Two 3×3 convolutions of stride 2 and a classifier."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(784, 10),
    )


class RowTransformer(nn.Module):
    """One attention block over an image's 28 rows, d = 32; every projection is an ``nn.Linear``."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.position = nn.Parameter(0.1 * torch.randn(28, width))
        self.embed, self.classify = nn.Linear(28, width), nn.Linear(width, 10)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores: (B, 1, 28, 28) -> (B, 10)."""
        x = self.embed(images.squeeze(1)) + self.position  # (B, 28, d)
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, 28, d/heads)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.relu(self.up(x)))
        return self.classify(x.mean(dim=1))


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "convnet": convnet, "transformer": RowTransformer}


def train(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, seed: int) -> nn.Module:
    """A few epochs of Adam, enough for gradients to look like those in the middle of a training."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model


def input_columns(module: nn.Module, inputs: Tensor) -> Tensor:
    """A_i of (8) with the bias's column of ones: (N, …) -> (N, κ, n)."""
    if isinstance(module, nn.Conv2d):
        columns = F.unfold(inputs, module.kernel_size, module.dilation, module.padding, module.stride).transpose(1, 2)
    else:
        columns = inputs.flatten(1, -2) if inputs.ndim > 2 else inputs.unsqueeze(1)
    return columns if module.bias is None else F.pad(columns, (0, 1), value=1.0)


def output_rows(module: nn.Module, gradient: Tensor) -> Tensor:
    """G_i of (8): (N, …) -> (N, κ, m)."""
    if isinstance(module, nn.Conv2d):
        return gradient.flatten(2).transpose(1, 2)
    return gradient.flatten(1, -2) if gradient.ndim > 2 else gradient.unsqueeze(1)


def collect_factors(model: nn.Module, loss: Callable[[], Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, g, a) of every Linear and ungrouped Conv2d, for a loss that sums over samples."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):

            def watch(module: nn.Module, inputs: tuple[Tensor], output: Tensor, name: str = name) -> None:
                a = input_columns(module, inputs[0].detach())
                output.register_hook(lambda grad: seen.update({name: [output_rows(module, grad), a]}))

            handles.append(module.register_forward_hook(watch))
    try:
        loss().backward()
    finally:
        for handle in handles:
            handle.remove()
    for name, (g, a) in sorted(seen.items()):
        yield name, g, a


def sample_layers(name: str, *, samples: int, epochs: int, seed: int) -> Iterator[LayerSamples]:
    """The layers of one trained model: factors of `samples` samples and the gradient of as many others."""
    images, labels, _ = load_images(seed)
    torch.manual_seed(seed)
    model = train(MODELS[name](), images, labels, epochs=epochs, seed=seed).double()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed + 1))[: 2 * samples]
    parts = order.split(samples)

    def loss(part: Tensor) -> Callable[[], Tensor]:
        return lambda: F.cross_entropy(model(images[part].double()), labels[part], reduction="sum")

    seen, other = (list(collect_factors(model, loss(part))) for part in parts)
    for (layer, g, a), (_, other_g, other_a) in zip(seen, other, strict=True):
        held_out = torch.einsum("bkm,bkn->mn", other_g, other_a) / samples
        yield LayerSamples(name=f"{name}.{layer}", g=g, a=a, held_out=held_out)
