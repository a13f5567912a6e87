"""Pure functions that look across tokens. Axes: B sequences, T response tokens. Units: nats.

All of them take `wrote` [B, T], the tokens that the student sampled, and read nothing else: padding and teacher-written
tokens may hold nan or inf. They sum in float64, so that the order of rows hardly matters, and return the input's dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from .functional import check_same_shape


def top_share(values: Tensor, wrote: Tensor, *, share: float) -> Tensor:
    """Which student tokens are among the `share` of the batch with the largest `values`. Ties at the edge all count.

    Args:
        values: any shape.
        wrote: same shape, bool.
        share: in (0, 1]; the number of tokens is rounded up.

    Returns:
        bool, same shape; all False when the student wrote nothing.
    """
    check_same_shape(values=values, wrote=wrote)
    chosen = values[wrote]
    if chosen.numel() == 0:
        return torch.zeros_like(wrote)
    count = min(max(math.ceil(share * chosen.numel() - 1e-9), 1), chosen.numel())
    threshold = chosen.kthvalue(chosen.numel() - count + 1).values
    return wrote & (values.masked_fill(~wrote, -math.inf) >= threshold)


def mean_of_later_return(rewards: Tensor, wrote: Tensor) -> Tensor:
    """r_t + the mean of the student's later rewards of the sequence; the last one has only its own. [B, T].

    Source: TOP-D, arXiv 2607.04751, equation 8.
    """
    check_same_shape(rewards=rewards, wrote=wrote)
    own = rewards.masked_fill(~wrote, 0.0).double()
    later = _sum_after(own) / _sum_after(wrote.double()).clamp_min(1.0)
    return (own + later).masked_fill(~wrote, 0.0).to(rewards.dtype)


def group_normalized(values: Tensor, wrote: Tensor, group: Tensor, *, minimum_std: float = 1e-6) -> Tensor:
    """(value - mean) / std over all student tokens of a group's rollouts, std unbiased and at least `minimum_std`.

    Zero for a group with fewer than two rollouts that have student tokens, and for one whose values are all equal
    (up to rounding, which the division would otherwise blow up).

    Args:
        values: [B, T].
        wrote: [B, T] bool.
        group: [B] int64, any labels.

    Source: TOP-D, arXiv 2607.04751.
    """
    check_same_shape(values=values, wrote=wrote)
    check_same_shape(rows=wrote.any(-1), group=group)
    labels, member = torch.unique(group, return_inverse=True)

    def per_group(of_rows: Tensor) -> Tensor:
        """[B] -> [B]: the sum over the group, at each of its rows."""
        return of_rows.new_zeros(len(labels)).index_add(0, member, of_rows)[member]

    value = values.masked_fill(~wrote, 0.0).double()
    count = per_group(wrote.sum(-1).double())
    rollouts = per_group(wrote.any(-1).double())
    mean = per_group(value.sum(-1)) / count.clamp_min(1.0)
    deviation = (value - mean.unsqueeze(-1)).masked_fill(~wrote, 0.0)
    std = (per_group(deviation.square().sum(-1)) / (count - 1.0).clamp_min(1.0)).sqrt()
    scale = (per_group(value.square().sum(-1)) / count.clamp_min(1.0)).sqrt()
    usable = (rollouts > 1.0) & (std > 1e-10 * scale)
    normalized = deviation / std.clamp_min(minimum_std).unsqueeze(-1)
    return normalized.masked_fill(~usable.unsqueeze(-1), 0.0).to(values.dtype)


def early_weight(rewards: Tensor, wrote: Tensor, *, strength: float) -> Tensor:
    """1 + strength * (1 - sum_{s<t} |R_s| / max(sum_s |R_s|, 1e-8)): from 1 + strength at the first student token down
    to 1 when all the disagreement of the sequence lies behind. [B, T].

    Source: IW-OPD, arXiv 2606.22600.
    """
    check_same_shape(rewards=rewards, wrote=wrote)
    size = rewards.masked_fill(~wrote, 0.0).abs().double()
    total = size.sum(-1, keepdim=True)
    before = pad(size.cumsum(-1)[..., :-1], (1, 0)) if size.shape[-1] else size
    return (1.0 + strength * (1.0 - before / total.clamp_min(1e-8))).to(rewards.dtype)


def _sum_after(values: Tensor) -> Tensor:
    """sum_{s>t} values_s, [B, T]."""
    return pad(values.flip(-1).cumsum(-1).flip(-1)[..., 1:], (0, 1)) if values.shape[-1] else values
