"""Student against teacher, per response: sums that can be written, added up in any order of work, and averaged at the end.

Units: nats. Chunk-bounded: no tensor of all tokens times the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from tropd_cli.grading import rounded
from tropd_cli.heldout import divergence_batches
from tropd_cli.metrics import combine
from tropd_cli.pair import Pair
from tropd_cli.rollout import Rollout

NAMES = ("reverse_kl", "forward_kl", "acceptance", "agreement", "outlier_share", "student_entropy", "teacher_entropy")


def row_divergences(pair: Pair, rollout: Rollout, temperature: float, token_budget: int) -> list[dict[str, float]]:
    """Per row: `tokens` and the sums over them of what `token_divergences` gives, plus `outlier_share`, 1 - P_trust.

    On the student's own samples the outlier share estimates 1 - acceptance.
    """
    rows: list[dict[str, float]] = [{"tokens": 0.0} for _ in range(len(rollout))]
    for batch, values in divergence_batches(pair, rollout, temperature=temperature, token_budget=token_budget):
        log_ratio = values["teacher_logprob"] - values["student_logprob"]
        values["outlier_share"] = 1.0 - log_ratio.clamp_max(0.0).exp()
        values["tokens"] = torch.ones_like(log_ratio)
        present = batch.row.unique().tolist()
        for name, value in values.items():
            totals = torch.zeros(len(rollout), dtype=torch.float64)
            totals.index_add_(0, batch.row.cpu(), value.double().cpu())
            for row in present:
                rows[row][name] = float(totals[row])
    return rows


def averages(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Per-token means, and perplexities exp(-mean log-probability). None where there is no token."""
    total = combine(rows)
    tokens = total.get("tokens", 0.0)
    if not tokens:
        return {"tokens": 0} | dict.fromkeys((*NAMES, "student_perplexity", "teacher_perplexity"))
    means = {name: rounded(total[name] / tokens) for name in NAMES}
    for role in ("student", "teacher"):
        means[f"{role}_perplexity"] = rounded(math.exp(min(-total[f"{role}_logprob"] / tokens, 700.0)))
    return {"tokens": int(tokens)} | means
