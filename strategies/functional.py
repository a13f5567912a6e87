"""Pure tensor functions. Axes: leading [...] tokens, K teacher top-k, V vocabulary. Units: nats.

Everything takes log-probabilities and returns plain numbers; a *credit* is minus the derivative of the named loss with
respect to each student log-probability it sees.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Renormalize = Literal["none", "teacher", "both"]


def check_same_shape(**tensors: Tensor) -> None:
    """Raises ValueError unless all tensors have the same shape: no silent broadcasting."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


# ── log-ratio, acceptance, regions ──────────────────────────────────────────────────────────────────────────────────


def k1_reward(student_logprob: Tensor, teacher_logprob: Tensor) -> Tensor:
    """R = log p(x) - log q(x): the K1 estimate of -KL(q || p), unbiased when x was sampled from q.

    Args:
        student_logprob, teacher_logprob: [...] log-probability of the sampled token, nats.

    Returns:
        [...] nats, unbounded below.

    Source: Thinking Machines, "On-Policy Distillation" (2025); arXiv 2606.01249, section 3.
    """
    check_same_shape(student_logprob=student_logprob, teacher_logprob=teacher_logprob)
    return teacher_logprob - student_logprob


def acceptance(student_logprob: Tensor, teacher_logprob: Tensor) -> Tensor:
    """P_trust(x) = min(p(x)/q(x), 1), the acceptance probability of speculative decoding. Its mean under q is 1 - TV.

    Returns:
        [...] in [0, 1].

    Source: arXiv 2211.17192, theorem 3.5; arXiv 2606.01249, the adaptive region.
    """
    return k1_reward(student_logprob, teacher_logprob).clamp_max(0.0).exp()


def reward_floor(rate: float) -> float:
    """log(lambda) / (1 - lambda): REOPOLD's floor under the reward, nats. 0.2 -> -2.0118.

    Source: arXiv 2603.11137.
    """
    if not 0.0 < rate < 1.0:
        raise ValueError(f"rate must be between 0 and 1, got {rate}")
    return math.log(rate) / (1.0 - rate)


def mixture_logprob(student_logprob: Tensor, teacher_logprob: Tensor, *, mix: float) -> Tensor:
    """log m with m = mix * p + (1 - mix) * q, elementwise and overflow-free. Any shape; 0 and 1 are exact."""
    check_same_shape(student_logprob=student_logprob, teacher_logprob=teacher_logprob)
    if not 0.0 <= mix <= 1.0:
        raise ValueError(f"mix must be between 0 and 1, got {mix}")
    if mix == 0.0:
        return student_logprob
    if mix == 1.0:
        return teacher_logprob
    return torch.logaddexp(teacher_logprob + math.log(mix), student_logprob + math.log1p(-mix))


def mixture_reward(student_logprob: Tensor, teacher_logprob: Tensor, *, mix: float) -> Tensor:
    """log(mix * u + 1 - mix), u = p(x)/q(x): a reward bounded below by log(1 - mix).

    Source: TOP-D, arXiv 2607.04751 (mix = alpha); (1 - beta) times it is JSD's policy-gradient reward.
    """
    return mixture_logprob(student_logprob, teacher_logprob, mix=mix) - student_logprob


def entropy(logprobs: Tensor) -> Tensor:
    """Shannon entropy of whole distributions: [..., V] log-probabilities -> [...] nats. log 0 contributes 0."""
    return -(logprobs.exp() * logprobs.masked_fill(logprobs == -math.inf, 0.0)).sum(-1)


def kl_divergence(from_logprobs: Tensor, to_logprobs: Tensor) -> Tensor:
    """KL(from || to) of whole distributions: [..., V] log-probabilities -> [...] nats. 0 log 0 = 0."""
    check_same_shape(from_logprobs=from_logprobs, to_logprobs=to_logprobs)
    probability = from_logprobs.exp()
    log_ratio = (from_logprobs - to_logprobs).masked_fill(probability == 0.0, 0.0)
    return (probability * log_ratio).sum(-1)


# ── top-k forward KL ────────────────────────────────────────────────────────────────────────────────────────────────


def _remaining(topk_logprob: Tensor) -> Tensor:
    """1 - sum of the listed probabilities, floored at sqrt(machine epsilon) so that dividing by it keeps its digits."""
    floor = math.sqrt(torch.finfo(topk_logprob.dtype).eps)
    return (1.0 - topk_logprob.exp().sum(-1)).clamp_min(floor)


def topk_forward_kl(
    student_topk_logprob: Tensor, teacher_topk_logprob: Tensor, *, tail: bool = False, renormalize: Renormalize = "none"
) -> Tensor:
    """sum_{v in V_k} p_v (log p_v - log q_v): [..., K] -> [...] nats.

    Without `tail` it is no divergence: it is negative when the student has more mass on V_k than the teacher, and must
    not be clamped. `tail` adds (1-P) log((1-P)/(1-Q)) and makes it a KL: between 0 and the full KL(p || q).

    Args:
        student_topk_logprob, teacher_topk_logprob: [..., K] at the teacher's k most likely tokens.
        tail: add one bucket for everything outside V_k. Only without renormalisation.
        renormalize: "none"; "teacher": p / P against q (EOPD's form); "both": p / P against q / Q.

    Source: arXiv 2606.01249, outlier objective; arXiv 2603.07079 for "teacher".
    """
    teacher, student = _renormalized(student_topk_logprob, teacher_topk_logprob, tail=tail, renormalize=renormalize)
    probability = teacher.exp()
    kl = (probability * (teacher - student).masked_fill(probability == 0.0, 0.0)).sum(-1)
    if tail:
        rest = (1.0 - probability.sum(-1)).clamp_min(0.0)
        kl = kl + torch.xlogy(rest, rest / _remaining(student_topk_logprob))
    return kl


def topk_forward_kl_credit(
    student_topk_logprob: Tensor, teacher_topk_logprob: Tensor, *, tail: bool = False, renormalize: Renormalize = "none"
) -> Tensor:
    """Credit of `topk_forward_kl` on each log q_v: p_v; with `tail` p_v - (1-P) q_v / (1-Q); renormalised likewise.

    With the softmax behind it the logit gradient is Q-free and bounded by 1 (`P q_j - p_j 1[j in V_k]`).

    Returns:
        [..., K].
    """
    teacher, student = _renormalized(student_topk_logprob, teacher_topk_logprob, tail=tail, renormalize=renormalize)
    credit = teacher.exp()
    if tail:
        rest = (1.0 - credit.sum(-1)).clamp_min(0.0)
        credit = credit - (rest / _remaining(student)).unsqueeze(-1) * student.exp()
    elif renormalize == "both":
        credit = credit - student.exp()
    return credit


def _renormalized(
    student_topk_logprob: Tensor, teacher_topk_logprob: Tensor, *, tail: bool, renormalize: Renormalize
) -> tuple[Tensor, Tensor]:
    """(teacher, student) log-probabilities in the asked form."""
    check_same_shape(student_topk_logprob=student_topk_logprob, teacher_topk_logprob=teacher_topk_logprob)
    if tail and renormalize != "none":
        raise ValueError("tail and renormalize exclude each other: a tail bucket needs the true masses")
    teacher, student = teacher_topk_logprob, student_topk_logprob
    if renormalize in ("teacher", "both"):
        teacher = teacher - teacher.logsumexp(-1, keepdim=True)
    if renormalize == "both":
        student = student - student.logsumexp(-1, keepdim=True)
    return teacher, student


# ── Jensen-Shannon ──────────────────────────────────────────────────────────────────────────────────────────────────


def jsd_direct(student_logprob: Tensor, teacher_logprob: Tensor, *, mix: float) -> Tensor:
    """mix * sum_v p_v log(p_v / m_v) over the listed tokens, m = mix p + (1 - mix) q: [..., K] -> [...] nats."""
    mixture = mixture_logprob(student_logprob, teacher_logprob, mix=mix)
    probability = teacher_logprob.exp()
    return mix * (probability * (teacher_logprob - mixture).masked_fill(probability == 0.0, 0.0)).sum(-1)


def jsd_direct_credit(student_logprob: Tensor, teacher_logprob: Tensor, *, mix: float) -> Tensor:
    """Credit of `jsd_direct` on each log q_v: mix (1 - mix) p_v q_v / m_v. [..., K]."""
    mixture = mixture_logprob(student_logprob, teacher_logprob, mix=mix)
    product = teacher_logprob + student_logprob
    log_credit = product - mixture.masked_fill(product == -math.inf, 0.0)
    return mix * (1.0 - mix) * log_credit.exp()
