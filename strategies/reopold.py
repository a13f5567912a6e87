"""REOPOLD: on-policy distillation with a floor under the reward, optionally in two stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from .base import STRATEGIES
from .checks import check_below_zero, check_share
from .functional import k1_reward, reward_floor
from .returns import top_share
from .types import Credit, Needs, Region, Scope, Signals


@STRATEGIES.register("reopold")
@dataclass(frozen=True)
class REOPOLD:
    """REOPOLD: policy gradient on max(R, floor), R = log p - log q; with `stages: 2` also masked, then selective.

    One stage: credit max(R, floor) on every student-written token; `region` shows the floored ones as outliers.
    Two stages: up to `switch_at` of the run only tokens with R >= floor count (credit R, the others nothing); after it
    only the `share` of the batch with the largest student entropy counts (credit max(R, floor)).

    Options:
        floor: nats, below 0. log(rate) / (1 - rate): rate 0.1 -> -2.5584, 0.2 -> -2.0118, 0.3 -> -1.7200,
            0.5 -> -1.3863.
        stages: 1 or 2. TrOPD's tables have a row for each.
        share: of the tokens, in the second stage.
        switch_at: fraction of the run at which the second stage begins.

    Source: arXiv 2603.11137, rate 0.2.
    """

    paper: ClassVar[str] = "arXiv 2603.11137"
    ratio_clip: ClassVar[tuple[float, float] | None] = None

    floor: float = reward_floor(0.2)
    stages: Literal[1, 2] = 1
    share: float = 0.2
    switch_at: float = 0.5

    def __post_init__(self) -> None:
        check_below_zero("floor", self.floor)
        check_share(self.share)
        if not 0.0 <= self.switch_at <= 1.0:
            raise ValueError(f"switch_at must be between 0 and 1, got {self.switch_at}")

    @property
    def scope(self) -> Scope:
        return "token" if self.stages == 1 else "batch"

    @property
    def needs(self) -> Needs:
        return Needs(teacher_logprob=True, student_entropy=self.stages == 2)

    def credit(self, signals: Signals) -> Credit:
        reward = k1_reward(signals.student_logprob, signals.teacher_logprob)
        floored = reward < self.floor
        kept = torch.ones_like(floored)
        if self.stages == 2 and signals.progress < self.switch_at:
            kept = ~floored
        elif self.stages == 2:
            kept = top_share(signals.student_entropy, signals.student_wrote, share=self.share)
        region = torch.where(floored, Region.OUTLIER, Region.TRUST).masked_fill(~kept, Region.IGNORED)
        return Credit(
            sampled=reward.clamp_min(self.floor).masked_fill(~kept, 0.0),
            region=region.to(torch.int8),
        )
