"""Which rows of the layers of fairseq's Transformer are tokens of which sentence, and which are padding."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def sentence_index(batch: Mapping[str, Any], source_padding: int, target_padding: int) -> dict[str, Tensor]:
    """The sentence that each row of each layer's input belongs to, -1 for padding, for `ngplus.NGPlus.sample_index`.

    Embeddings and the output projection take (B, T), everything between takes (T, B, C). What the decoder's
    attention makes keys and values of are the encoder's rows.

    Args:
        batch: as fairseq's ``LanguagePairDataset`` collates it.
        source_padding: number of the padding in the source dictionary.
        target_padding: number of the padding in the target dictionary.

    Returns:
        By patterns of module names, the first that fits counts, integers of the input's shape without features.
    """
    source = _sentences(batch["net_input"]["src_tokens"], source_padding)  # (B, S)
    target = _sentences(batch["target"], target_padding)  # (B, T)
    return {
        "encoder.embed_tokens": source,
        "decoder.embed_tokens": target,
        "decoder.output_projection": target,
        "*.encoder_attn.[kv]_proj": source.T,
        "encoder.*": source.T,
        "decoder.*": target.T,
    }


def _sentences(tokens: Tensor, padding: int) -> Tensor:
    numbers = torch.arange(len(tokens), device=tokens.device).unsqueeze(1)
    return torch.where(tokens == padding, -1, numbers)
