"""Trust Region On-Policy Distillation: reverse KL where the teacher accepts the token, an estimator elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .base import STRATEGIES
from .checks import check_below_zero
from .functional import acceptance, k1_reward, reward_floor
from .outliers import OUTLIERS, ForwardKL
from .types import Credit, Needs, OutlierEstimator, Region, Scope, Signals


@STRATEGIES.register("trust-region")
@dataclass(frozen=True)
class TrustRegion:
    """TrOPD: policy gradient on R = log p - log q inside the trust region, another estimator on the outliers.

    Per student-written token with weight w: credit = w * R on the sampled token + (1 - w) * the estimator's credit.

    Options:
        region_rule: "acceptance": w ~ Bernoulli(min(p/q, 1)), drawn once per token and rollout (the paper's adaptive
            rule); "soft": w = min(p/q, 1), its expectation, same expected gradient without the draw's variance (ours);
            "threshold": w = 1 where R >= threshold (the static rule of the paper's ablation).
        threshold: nats, for the static rule. The paper gives none; the default is REOPOLD's log(0.2) / 0.8.
        outlier: estimator for the rest, a name or {name, options}.
    """

    paper: ClassVar[str] = "arXiv 2606.01249"
    scope: ClassVar[Scope] = "token"
    ratio_clip: ClassVar[tuple[float, float] | None] = None

    region_rule: Literal["acceptance", "soft", "threshold"] = "acceptance"
    threshold: float = reward_floor(0.2)
    outlier: OutlierEstimator = field(default_factory=ForwardKL, metadata={"registry": lambda: OUTLIERS})

    def __post_init__(self) -> None:
        check_below_zero("threshold", self.threshold)

    @property
    def needs(self) -> Needs:
        return Needs(teacher_logprob=True, uniform=self.region_rule != "threshold") | self.outlier.needs

    def trust_weight(self, signals: Signals) -> tuple[Tensor, Tensor]:
        """(w, trusted): the weight of the trust-region credit in [0, 1], and the region as a bool. Both [...]."""
        if self.region_rule == "threshold":
            trusted = k1_reward(signals.student_logprob, signals.teacher_logprob) >= self.threshold
            return trusted.to(signals.student_logprob.dtype), trusted
        p_trust = acceptance(signals.student_logprob, signals.teacher_logprob)
        trusted = signals.uniform < p_trust
        return (p_trust if self.region_rule == "soft" else trusted.to(p_trust.dtype)), trusted

    def credit(self, signals: Signals) -> Credit:
        weight, trusted = self.trust_weight(signals)
        reward = k1_reward(signals.student_logprob, signals.teacher_logprob)
        estimate = self.outlier.estimate(signals)
        region = torch.where(trusted, Region.TRUST, Region.OUTLIER).to(torch.int8)
        return Credit(
            sampled=weighted(weight, reward) + weighted(1.0 - weight, estimate.sampled),
            top_k=_outlier_part(weight, estimate.top_k),
            full=_outlier_part(weight, estimate.full),
            region=region,
            outlier_weight=1.0 - weight,
            floored=None if estimate.floored is None else estimate.floored & (weight < 1.0),
        )


def weighted(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value with 0 * inf = 0, so that a masked token cannot poison the others."""
    return weight * value.masked_fill(weight == 0.0, 0.0)


def _outlier_part(weight: Tensor, credit: Tensor | None) -> Tensor | None:
    return None if credit is None else weighted((1.0 - weight).unsqueeze(-1).expand_as(credit), credit)
