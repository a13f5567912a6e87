"""Sequences end to end in one row, without padding: an attention function that keeps them apart, and who may use it.

Everything in a transformer but attention treats tokens alone, so a packed row costs what its tokens cost. Attention runs
through PyTorch's own kernel, one causal call per sequence, and needs no mask. Axes: total tokens of the packed row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

#: Name of the attention implementation; without `sequence_lengths` it is "sdpa".
ATTENTION = "tropd_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_lengths: Sequence[int] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention [1, heads, total, d] -> [1, total, heads, d] within each of the consecutive sequences."""
    if sequence_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    lengths = list(sequence_lengths)
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *qkv, None, **options)[0] for qkv in parts], dim=1), None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def packed_hidden(backbone: nn.Module, inputs: Tensor, lengths: Sequence[int]) -> Tensor:
    """[1, total, H] hidden states of the sequences that `inputs` [1, total] holds end to end."""
    positions = torch.cat([torch.arange(length, device=inputs.device) for length in lengths]).unsqueeze(0)
    unused_mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=inputs.device)  # 4-D: no mask is made from it
    hidden: Tensor = backbone(
        input_ids=inputs, position_ids=positions, attention_mask=unused_mask, use_cache=False, sequence_lengths=lengths
    ).last_hidden_state
    return hidden


@torch.no_grad()
def enable_packing(model: nn.Module, backbone: nn.Module, ids: list[int], *, tolerance: float) -> bool:
    """Gives a model the packed attention if it can have it. Returns whether it can.

    It cannot with attention other than PyTorch's, with a window that slides, with layers that are no attention, or where
    two sequences packed do not give the hidden states of the two alone.

    Args:
        ids: any token ids to try it with.
        tolerance: largest difference of a hidden state, relative to the largest hidden state.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    slides = getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None) is not None
    if config._attn_implementation != "sdpa" or kinds != {"full_attention"} or slides:
        return False
    model.set_attn_implementation(ATTENTION)
    device = next(model.parameters()).device
    both = torch.tensor([ids + ids + ids], device=device)
    try:
        packed = packed_hidden(backbone, both, [2 * len(ids), len(ids)])[0]
    except (TypeError, ValueError, RuntimeError):
        model.set_attn_implementation("sdpa")
        return False
    alone = backbone(input_ids=both[:, : 2 * len(ids)], use_cache=False).last_hidden_state[0]
    gap = (packed - torch.cat([alone, alone[: len(ids)]])).abs().max()
    if bool(gap <= tolerance * alone.abs().max()):
        return True
    model.set_attn_implementation("sdpa")
    return False
