"""One step's numbers: summed per process, combined over processes, divided once. Units: nats unless said otherwise."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from strategies import Region

from .batching import TokenBatch
from .credit_loss import Record
from .rollout import Rollout
from .scoring import Scores
from .sharding import whole

Sums = dict[str, float]


def batch_sums(batch: TokenBatch, scores: Scores, record: Record) -> Sums:
    """Sums over one micro-batch. Keys ending in `_min` and `_max` are extremes instead."""
    if not len(batch):
        return {}
    student = ~batch.teacher_wrote
    reward = (scores.teacher_logprob - record["student_logprob"]).double()[student]
    region = record["region"][student]
    outlier = region == Region.OUTLIER
    sums: dict[str, Tensor | float] = {
        "tokens": len(batch),
        "student_tokens": student.sum(),
        "guidance": batch.teacher_wrote.sum(),
        "outlier": record["outlier_weight"].double()[student].sum(),
        "outlier_tokens": outlier.sum(),
        "ignored": (region == Region.IGNORED).sum(),
        "reward": reward.sum(),
        "acceptance": reward.clamp_max(0).exp().sum(),
        "entropy": record["student_entropy"].double()[student].sum(),
        "clipped": (record["ratio_clipped"] | record["floored"])[student].sum(),
        "credit_absolute": record["credit_absolute"].double()[student].sum(),
        "credit_absolute_outlier": record["credit_absolute"].double()[student][outlier].sum(),
    }
    if len(reward):
        sums |= {"reward_min": reward.min(), "reward_max": reward.max()}
    if "topk_forward_kl" in record:
        sums["forward_kl_outlier"] = record["topk_forward_kl"].double()[student][outlier].sum()
    return {name: float(value) for name, value in sums.items()}


def rollout_sums(rollout: Rollout) -> Sums:
    """Sums over the rows of one process."""
    return {
        "rows": float(len(rollout)),
        "response_tokens": float(rollout.mask.sum()),
        "truncated": float((~rollout.ended).sum()),
    }


def combine(parts: Iterable[Sums]) -> Sums:
    """Adds sums, and takes the extremes of extremes."""
    total: Sums = {}
    for part in parts:
        for name, value in part.items():
            if name not in total:
                total[name] = value
            elif name.endswith("_min"):
                total[name] = min(total[name], value)
            elif name.endswith("_max"):
                total[name] = max(total[name], value)
            else:
                total[name] += value
    return total


def step_metrics(sums: Sums) -> dict[str, Any]:
    """The token and row metrics of metrics.jsonl. What has no tokens to average is None."""

    def mean(name: str, over: str) -> float | None:
        count = sums.get(over, 0.0)
        return sums[name] / count if count and name in sums else None

    reward = mean("reward", "student_tokens")
    return {
        "reverse_kl": None if reward is None else -reward,
        "forward_kl_outlier": mean("forward_kl_outlier", "outlier_tokens"),
        "outlier_share": mean("outlier", "student_tokens"),
        "guidance_share": mean("guidance", "tokens"),
        "ignored_share": mean("ignored", "student_tokens"),
        "acceptance": mean("acceptance", "student_tokens"),
        "reward_mean": reward,
        "reward_min": sums.get("reward_min"),
        "reward_max": sums.get("reward_max"),
        "entropy": mean("entropy", "student_tokens"),
        "clip_share": mean("clipped", "student_tokens"),
        "outlier_credit_share": mean("credit_absolute_outlier", "credit_absolute"),
        "response_length": mean("response_tokens", "rows"),
        "truncated_share": mean("truncated", "rows"),
        "tokens": int(sums.get("tokens", 0)),
    }


@torch.no_grad()
def update_norm(optimizer: torch.optim.Optimizer) -> float:
    """L2 norm of AdamW's last change of the weights, weight decay apart, from the optimizer's own moments."""
    squares = 0.0
    for group in optimizer.param_groups:
        beta_1, beta_2 = group["betas"]
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if not state:
                continue
            step = float(state["step"])
            first = state["exp_avg"] / (1 - beta_1**step)
            second = (state["exp_avg_sq"] / (1 - beta_2**step)).sqrt_().add_(group["eps"])
            squares += (group["lr"] ** 2) * float(whole(first.div_(second).pow_(2).sum(dtype=torch.float64)))
    return squares**0.5


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of the device's allocations, or of the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
