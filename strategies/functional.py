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
Divergence = Literal["jsd", "reverse-kl", "forward-kl", "hellinger", "total-variation"]


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


def _tail(student_topk_logprob: Tensor, teacher_topk_logprob: Tensor) -> tuple[Tensor, Tensor]:
    """(1 - P, (1 - P) / (1 - Q)): the teacher's mass outside V_k, and its ratio to the student's.

    The ratio is capped at 0.01 / machine epsilon: it multiplies credits that cancel against each other, and beyond the
    cap the cancellation would leave no digits. It binds only where the student's tail is lost in rounding.
    """
    eps = torch.finfo(student_topk_logprob.dtype).eps
    teacher_rest = (1.0 - teacher_topk_logprob.exp().sum(-1)).clamp_min(0.0)
    student_rest = (1.0 - student_topk_logprob.exp().sum(-1)).clamp_min(eps)
    return teacher_rest, (teacher_rest / student_rest).clamp_max(0.01 / eps)


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
        kl = kl + torch.xlogy(*_tail(student, teacher))
    return kl


def topk_forward_kl_credit(
    student_topk_logprob: Tensor, teacher_topk_logprob: Tensor, *, tail: bool = False, renormalize: Renormalize = "none"
) -> Tensor:
    """Credit of `topk_forward_kl` on each log q_v: p_v; with `tail` p_v - (1-P) q_v / (1-Q); renormalised likewise.

    Through the softmax the plain form has the logit gradient P q_j - p_j 1[j in V_k]: bounded by 1, whatever Q is.

    Returns:
        [..., K].
    """
    teacher, student = _renormalized(student_topk_logprob, teacher_topk_logprob, tail=tail, renormalize=renormalize)
    credit = teacher.exp()
    if tail:
        credit = credit - _tail(student, teacher)[1].unsqueeze(-1) * student.exp()
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


# ── Jensen-Shannon and other f-divergences ──────────────────────────────────────────────────────────────────────────


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


def full_jsd(student_logprobs: Tensor, teacher_logprobs: Tensor, *, mix: float) -> Tensor:
    """mix KL(p || m) + (1 - mix) KL(q || m), m = mix p + (1 - mix) q: [..., V] -> [...] nats.

    mix 0 is KL(p || q) and mix 1 is KL(q || p) by definition; the limits of the formula would be 0.

    Source: GKD, arXiv 2306.13649, equation 1 and its end points.
    """
    if mix == 0.0:
        return kl_divergence(teacher_logprobs, student_logprobs)
    if mix == 1.0:
        return kl_divergence(student_logprobs, teacher_logprobs)
    mixture = mixture_logprob(student_logprobs, teacher_logprobs, mix=mix)
    return mix * kl_divergence(teacher_logprobs, mixture) + (1.0 - mix) * kl_divergence(student_logprobs, mixture)


def full_jsd_credit(student_logprobs: Tensor, teacher_logprobs: Tensor, *, mix: float) -> Tensor:
    """Credit of `full_jsd` on each log q_v: -(1 - mix) q_v log(q_v / m_v); p_v at mix 0, -q_v log(q_v / p_v) at mix 1.

    At mix 1 the derivative has a further -q_v, which the softmax cancels and which is left out: with it, or without,
    the logit gradient is the same, and only without does every credit vanish when teacher and student agree.

    Returns:
        [..., V].
    """
    if mix == 0.0:
        check_same_shape(student_logprobs=student_logprobs, teacher_logprobs=teacher_logprobs)
        return teacher_logprobs.exp()
    mixture = mixture_logprob(student_logprobs, teacher_logprobs, mix=mix)
    probability = student_logprobs.exp()
    log_ratio = (student_logprobs - mixture).masked_fill(probability == 0.0, 0.0)
    return -(1.0 if mix == 1.0 else 1.0 - mix) * probability * log_ratio


def f_divergence_weight(
    student_logprob: Tensor, teacher_logprob: Tensor, *, divergence: Divergence, mix: float = 0.5
) -> Tensor:
    """u f'(u) - f(u), u = p(x)/q(x): the reward whose policy gradient is -grad sum_v q_v f(p_v/q_v), exactly.

    (-f(u), the obvious choice, misses the dependence of u on q.) f is normalised to f(1) = f'(1) = 0, which changes
    the divergence by nothing and the reward by a constant, so that the reward is 0 where teacher and student agree.

    Args:
        divergence: "jsd" (1-mix) log(mix u + 1 - mix); "reverse-kl" log u; "forward-kl" u - 1; "hellinger" sqrt(u) - 1;
            "total-variation" sign(u - 1) / 2.
        mix: of the JSD only, strictly between 0 and 1.

    Returns:
        [...]; u is capped at the square root of the largest float.

    Source: arXiv 2606.01039.
    """
    log_ratio = k1_reward(student_logprob, teacher_logprob)
    capped = log_ratio.clamp_max(0.5 * math.log(torch.finfo(log_ratio.dtype).max))
    if divergence == "jsd":
        return (1.0 - mix) * mixture_reward(student_logprob, teacher_logprob, mix=mix)
    if divergence == "reverse-kl":
        return log_ratio
    if divergence == "forward-kl":
        return capped.expm1()
    if divergence == "hellinger":
        return (0.5 * capped).expm1()
    return 0.5 * log_ratio.sign()
