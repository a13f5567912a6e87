"""TrOPD + AOPD: the paper's combination, in our reading of one sentence."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from .base import STRATEGIES
from .checks import check_not_negative
from .functional import k1_reward
from .trust_region import TrustRegion
from .types import Credit, Signals


@STRATEGIES.register("trust-region-aopd")
@dataclass(frozen=True)
class TrustRegionAOPD(TrustRegion):
    """TrOPD plus AOPD's objective on AOPD's positive tokens: what the teacher likes more is reinforced twice.

    Credit: that of `trust-region`, plus positive_weight * max(R, 0) on log q(x).

    The paper says no more than that it adds AOPD's objective for AOPD's positive tokens. Positive is AOPD's word for
    tokens with positive advantage R, and its objective there is the policy gradient on R. TrOPD trusts all of them
    with certainty and has the same term, so putting AOPD's in its place would change nothing and could not have been a
    row of its own; added, it doubles the reinforcement. That is the asymmetry AOPD is named for: full weight on what
    the teacher prefers, caution on what it does not. (The other reading, forward KL on the tokens that AOPD's gate
    takes out, adds AOPD's objective for its non-positive tokens.)

    AOPD's PPO range is dropped: it would have to cut one half of a sum of two equal terms, and with one update per
    rollout it never acts.

    Options:
        positive_weight: of the added term; 0 is `trust-region`.
        The others are those of `trust-region`.

    Source: arXiv 2606.01249, table 6; arXiv 2605.06387.
    """

    paper: ClassVar[str] = "arXiv 2606.01249 + 2605.06387"

    positive_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("positive_weight", self.positive_weight)

    def credit(self, signals: Signals) -> Credit:
        base = super().credit(signals)
        reward = k1_reward(signals.student_logprob, signals.teacher_logprob)
        return dataclasses.replace(base, sampled=base.sampled + self.positive_weight * reward.clamp_min(0.0))
