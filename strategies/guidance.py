"""Off-policy guidance: how long the teacher-written prefix may be, and the credit of its tokens."""

from __future__ import annotations

import math

import torch

from .types import Credit, Region, Signals

WEIGHT = 0.001  #: beta of arXiv 2606.01249, section "off-policy guidance"


def prefix_limit(step: int, total_steps: int, max_response_length: int) -> float:
    """L(s) = L0 * 0.5 * (1 + cos(pi s / S)): the longest prefix allowed, from L0 = the maximum response length to 0.

    Args:
        step: s, counted from 0; the engine uses completed updates before this one.
        total_steps: S.
        max_response_length: L0 in tokens.

    Returns:
        Tokens, not rounded; the engine takes the floor.

    Source: arXiv 2606.01249, cosine prefix schedule.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    progress = min(max(step / total_steps, 0.0), 1.0)
    return max_response_length * 0.5 * (1.0 + math.cos(math.pi * progress))


def apply_guidance(credit: Credit, signals: Signals, *, weight: float = WEIGHT) -> Credit:
    """Overwrites the credit of teacher-written tokens by `weight` on the sampled token: weight x NLL, one-sample
    forward KL. Runs after every strategy, in training and in inspection; masked positions get no credit and IGNORED.

    Args:
        credit: what the strategy returned, [...].
        signals: `mask` and `teacher_wrote` are read.
        weight: beta >= 0.
    """
    wrote = signals.teacher_wrote & signals.mask
    blank = wrote | ~signals.mask
    region = credit.region
    if region is None:
        region = torch.full_like(signals.mask, int(Region.TRUST), dtype=torch.int8)
    return Credit(
        sampled=credit.sampled.masked_fill(~signals.mask, 0.0).masked_fill(wrote, weight),
        top_k=None if credit.top_k is None else credit.top_k.masked_fill(blank.unsqueeze(-1), 0.0),
        full=None if credit.full is None else credit.full.masked_fill(blank.unsqueeze(-1), 0.0),
        region=region.masked_fill(wrote, int(Region.GUIDANCE)).masked_fill(~signals.mask, int(Region.IGNORED)),
        outlier_weight=None if credit.outlier_weight is None else credit.outlier_weight.masked_fill(blank, 0.0),
        floored=None if credit.floored is None else credit.floored & ~blank,
    )
