"""On-policy distillation on the tokens at which the student is least sure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import STRATEGIES
from .checks import check_share
from .functional import k1_reward
from .returns import top_share
from .types import Credit, Needs, Region, Scope, Signals


@STRATEGIES.register("entropy")
@dataclass(frozen=True)
class Entropy:
    """Policy gradient on R = log p - log q at the student tokens whose entropy H_S is in the batch's top share.

    Credit: R where H_S is at least the share's quantile over all student-written tokens of the batch, else nothing.
    Tokens that tie with the last one kept are kept too.

    Options:
        share: which part of the tokens is trained on, in (0, 1].

    Source: arXiv 2506.01939 (top 20 %, there for reinforcement learning); the "Entropy OPD" row of arXiv 2606.01249.
    """

    paper: ClassVar[str] = "arXiv 2506.01939"
    scope: ClassVar[Scope] = "batch"
    ratio_clip: ClassVar[tuple[float, float] | None] = None

    share: float = 0.2

    def __post_init__(self) -> None:
        check_share(self.share)

    @property
    def needs(self) -> Needs:
        return Needs(teacher_logprob=True, student_entropy=True)

    def credit(self, signals: Signals) -> Credit:
        kept = top_share(signals.student_entropy, signals.student_wrote, share=self.share)
        reward = k1_reward(signals.student_logprob, signals.teacher_logprob)
        return Credit(
            sampled=reward.masked_fill(~kept, 0.0),
            region=torch.where(kept, Region.TRUST, Region.IGNORED).to(torch.int8),
        )
