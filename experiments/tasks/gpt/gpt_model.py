"""GPT-2's decoder in plain PyTorch: pre-norm, learned positions, the head tied to the token embedding."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INITIAL_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The decoder; the defaults are GPT-2 small.

    Attributes:
        layers: blocks.
        dim: width of embeddings and blocks; a feed-forward part is four times as wide inside.
        heads: of each attention.
        dropout: behind embeddings, attention and feed-forward parts, and of the attention weights.
    """

    layers: int = 12
    dim: int = 768
    heads: int = 12
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("layers", "dim", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.dim % self.heads:
            raise ValueError(f"dim = {self.dim}: must be a multiple of heads = {self.heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout}: must be in [0, 1)")


class Attention(nn.Module):
    """Causal self-attention; queries, keys and values are one product."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.heads, self.dropout = settings.heads, settings.dropout
        self.qkv = nn.Linear(settings.dim, 3 * settings.dim)
        self.out = nn.Linear(settings.dim, settings.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to the positions before: (B, T, dim) to (B, T, dim)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, dim / heads)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        dim = settings.dim
        self.attention_norm, self.attention = nn.LayerNorm(dim), Attention(settings)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, dim) to (B, T, dim)."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.down(F.gelu(self.up(self.feed_forward_norm(x)), approximate="tanh")))


class GPT(nn.Module):
    """The decoder, from tokens to the logits of the tokens that follow.

    Weights are drawn as GPT-2's: N(0, 0.02²), and N(0, 0.02² / 2 layers) where a block adds to the residual; biases
    are zero.

    Args:
        settings: its size.
        vocabulary: number of tokens.
        context: most positions of an input.
    """

    def __init__(self, settings: ModelSettings, *, vocabulary: int, context: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, settings.dim)
        self.positions = nn.Embedding(context, settings.dim)
        self.dropout = nn.Dropout(settings.dropout)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.norm = nn.LayerNorm(settings.dim)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=INITIAL_STD / math.sqrt(2 * settings.layers if residual else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the token that follows each: (B, T) to (B, T, vocabulary)."""
        # Looked up once a sequence, so that a sample of the positions' layer is a sequence as elsewhere.
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.dropout(self.tokens(tokens) + self.positions(places))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)
