"""Asymmetric on-policy distillation: reinforce what the teacher likes more, imitate it elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import STRATEGIES
from .checks import check_top_k
from .functional import Renormalize, k1_reward, topk_forward_kl_credit
from .types import Credit, Needs, Region, Scope, Signals

TOLERANCE = 1e-6  #: of the gate, in probability: rounding must not decide where teacher and student agree


@STRATEGIES.register("aopd")
@dataclass(frozen=True)
class AOPD:
    """AOPD: top-k forward KL where the student likes its token better than the teacher does, else clipped PG on R.

    Gate: q_old(x) - p(x) > margin + 1e-6, a difference of probabilities. Gated tokens get credit p_v on log q_v,
    v in V_k (`region` outlier); the others get R on log q(x), PPO range 0.2. With margin 0 the gate is the hard form
    of the trust region: everything with p(x)/q(x) < 1 is out.

    Choices: a tie counts as agreement, so that a student equal to its teacher is left alone (with q - p >= 0 it would
    still be trained on truncated forward KL); the tolerance keeps rounding from deciding. The source is reported to
    print a factor 1/K before the forward KL; it is left out unless `average` is set, because with it the gated
    tokens' gradient shrinks with K, 32-fold at the default.

    Options:
        margin: probability difference from which the student's token is gated, between -1 (forward KL on every token,
            ties included) and 1 (never: plain OPD).
        top_k: size of V_k, the teacher's most likely tokens.
        renormalize: "none", "teacher" or "both".
        average: divide the forward KL by K.

    Source: arXiv 2605.06387, k = 32.
    """

    paper: ClassVar[str] = "arXiv 2605.06387"
    scope: ClassVar[Scope] = "token"
    ratio_clip: ClassVar[tuple[float, float] | None] = (0.2, 0.2)

    margin: float = 0.0
    top_k: int = 32
    renormalize: Renormalize = "none"
    average: bool = False

    def __post_init__(self) -> None:
        check_top_k(self.top_k)
        if not -1.0 <= self.margin <= 1.0:
            raise ValueError(f"margin must be between -1 and 1, got {self.margin}")

    @property
    def needs(self) -> Needs:
        return Needs(teacher_logprob=True, teacher_top_k=self.top_k)

    def gated(self, signals: Signals) -> Tensor:
        """[...] bool: tokens that get the forward KL."""
        deficit = signals.student_logprob.exp() - signals.teacher_logprob.exp()
        return deficit > self.margin + TOLERANCE

    def credit(self, signals: Signals) -> Credit:
        gated = self.gated(signals)
        top_k = topk_forward_kl_credit(
            signals.student_topk_logprob, signals.teacher_topk_logprob, renormalize=self.renormalize
        )
        if self.average:
            top_k = top_k / top_k.shape[-1]
        return Credit(
            sampled=k1_reward(signals.student_logprob, signals.teacher_logprob).masked_fill(gated, 0.0),
            top_k=top_k.masked_fill(~gated.unsqueeze(-1), 0.0),
            region=torch.where(gated, Region.OUTLIER, Region.TRUST).to(torch.int8),
        )
