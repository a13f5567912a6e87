"""Entropy-aware on-policy distillation: forward KL on top where the teacher itself is unsure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import STRATEGIES
from .checks import check_not_negative, check_top_k
from .functional import Renormalize, k1_reward, topk_forward_kl_credit
from .types import Credit, Needs, Region, Scope, Signals


@STRATEGIES.register("eopd")
@dataclass(frozen=True)
class EOPD:
    """EOPD: clipped policy gradient on R everywhere, plus top-k forward KL where the teacher's entropy is high.

    Credit: R on log q(x), PPO range 0.2; where H_T > entropy_threshold also p_v / P on log q_v, v in V_k, the teacher
    being renormalised over V_k and the student not. `region` shows the tokens that got the addition as outliers.

    Options:
        entropy_threshold: nats of teacher entropy above which the forward KL is added.
        top_k: size of V_k, the teacher's most likely tokens (16 in the source, 64 in TrOPD's tables).
        renormalize: "teacher" (the source), "none" or "both".

    Source: arXiv 2603.07079.
    """

    paper: ClassVar[str] = "arXiv 2603.07079"
    scope: ClassVar[Scope] = "token"
    ratio_clip: ClassVar[tuple[float, float] | None] = (0.2, 0.2)

    entropy_threshold: float = 0.8
    top_k: int = 16
    renormalize: Renormalize = "teacher"

    def __post_init__(self) -> None:
        check_top_k(self.top_k)
        check_not_negative("entropy_threshold", self.entropy_threshold)

    @property
    def needs(self) -> Needs:
        return Needs(teacher_logprob=True, teacher_entropy=True, teacher_top_k=self.top_k)

    def credit(self, signals: Signals) -> Credit:
        unsure = signals.teacher_entropy > self.entropy_threshold
        top_k = topk_forward_kl_credit(
            signals.student_topk_logprob, signals.teacher_topk_logprob, renormalize=self.renormalize
        )
        return Credit(
            sampled=k1_reward(signals.student_logprob, signals.teacher_logprob),
            top_k=top_k.masked_fill(~unsure.unsqueeze(-1), 0.0),
            region=torch.where(unsure, Region.OUTLIER, Region.TRUST).to(torch.int8),
        )
