"""Expected gradients, enumerated over x ~ q and the region draw, against autograd on the stated objective. float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from strategies import STRATEGIES
from strategies.testing import expected_gradient

V, K = 9, 4
GENERATOR = torch.Generator().manual_seed(3)
STUDENT, TEACHER, REFERENCE = (2.0 * torch.randn(3, V, generator=GENERATOR, dtype=torch.float64)).unbind(0)
P, REF = TEACHER.softmax(-1), REFERENCE.softmax(-1)
TOP = P.topk(K).indices


def enumerated(spec: object) -> Tensor:
    return expected_gradient(STRATEGIES.build(spec), STUDENT, TEACHER, REFERENCE)[0]  # type: ignore[arg-type]


def gradient_of(objective: Callable[[Tensor], Tensor]) -> Tensor:
    """d objective(q) / d logits of the student."""
    logits = STUDENT.clone().requires_grad_()
    return torch.autograd.grad(objective(logits.softmax(-1)), logits)[0]


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum()


def reverse_kl(q: Tensor) -> Tensor:
    return kl(q, P)


def topk_fkl(q: Tensor) -> Tensor:
    return kl(P[TOP], q[TOP])


def jsd(mix: float) -> Callable[[Tensor], Tensor]:
    return lambda q: mix * kl(P, mix * P + (1 - mix) * q) + (1 - mix) * kl(q, mix * P + (1 - mix) * q)


def f_divergence(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda q: (q * f(P / q)).sum()


def reverse_generator(u: Tensor) -> Tensor:
    return -u.log() + u - 1


def soft_region_generator(u: Tensor) -> Tensor:
    """f with u f' - f = min(u, 1) log u: reverse KL above 1, below it the squared log-ratio under the teacher."""
    return torch.where(u < 1, 0.5 * u * u.log() ** 2, reverse_generator(u))


def floored_generator(floor: float) -> Callable[[Tensor], Tensor]:
    """f with u f' - f = max(log u, floor): reverse KL, continued below exp(floor) by its tangent."""
    slope = 1 - math.exp(-floor)
    return lambda u: torch.where(u.log() < floor, -floor + slope * u, reverse_generator(u))


def masked_generator(threshold: float) -> Callable[[Tensor], Tensor]:
    """f with u f' - f = 1[log u >= threshold] log u: linear through the origin below the threshold."""
    edge = torch.tensor(math.exp(threshold), dtype=torch.float64)
    return lambda u: torch.where(u.log() < threshold, u * reverse_generator(edge) / edge, reverse_generator(u))


OBJECTIVES: list[tuple[object, Callable[[Tensor], Tensor]]] = [
    ("opd", reverse_kl),
    ("entropy", reverse_kl),  # every outcome has the same entropy here, so all tie and all are kept
    ({"name": "iw-opd", "strength": 0.5}, lambda q: 1.5 * kl(q, P)),  # a first token
    ({"name": "exopd", "scale": 1.25}, lambda q: (q * (q.log() - 1.25 * P.log() + 0.25 * REF.log())).sum()),
    ({"name": "fkl", "top_k": K}, topk_fkl),
    ({"name": "fkl", "top_k": V}, lambda q: kl(P, q)),
    ({"name": "fkl", "top_k": K, "as_reward": True}, lambda q: 0.0 * q.sum()),
    ({"name": "gkd", "mix": 0.0}, lambda q: kl(P, q)),
    ({"name": "gkd", "mix": 0.3}, jsd(0.3)),
    ({"name": "gkd", "mix": 1.0}, reverse_kl),
    ({"name": "opd-plus", "mix": 0.3}, jsd(0.3)),
    ({"name": "opd-plus", "divergence": "reverse-kl"}, reverse_kl),
    ({"name": "opd-plus", "divergence": "forward-kl"}, lambda q: kl(P, q)),
    ({"name": "opd-plus", "divergence": "hellinger"}, lambda q: ((P.sqrt() - q.sqrt()) ** 2).sum()),
    ({"name": "opd-plus", "divergence": "total-variation"}, lambda q: 0.5 * (P - q).abs().sum()),
    ({"name": "eopd", "top_k": K}, lambda q: kl(q, P) + kl(P[TOP] / P[TOP].sum(), q[TOP])),
    ({"name": "eopd", "top_k": K, "entropy_threshold": 9.0}, reverse_kl),
    ({"name": "reopold", "floor": -0.7}, f_divergence(floored_generator(-0.7))),
    ({"name": "trust-region", "region_rule": "soft", "outlier": "mask"}, f_divergence(soft_region_generator)),
    ({"name": "trust-region", "outlier": "mask"}, f_divergence(soft_region_generator)),
    (
        {"name": "trust-region", "region_rule": "threshold", "threshold": -0.7, "outlier": "mask"},
        f_divergence(masked_generator(-0.7)),
    ),
]


@pytest.mark.parametrize(("spec", "objective"), OBJECTIVES, ids=[str(spec) for spec, _ in OBJECTIVES])
def test_expected_gradient_is_that_of_the_objective(spec: object, objective: Callable[[Tensor], Tensor]) -> None:
    torch.testing.assert_close(enumerated(spec), gradient_of(objective), rtol=1e-9, atol=1e-12)


def test_the_example_has_both_kinds_of_tokens() -> None:
    """Or half of every piecewise generator above would go untested."""
    log_u = P.log() - STUDENT.log_softmax(-1)
    assert (log_u > 0).any() and ((log_u < 0) & (log_u > -0.7)).any() and (log_u < -0.7).any()
    assert -(P * P.log()).sum() > 0.8


@pytest.mark.parametrize("rule", ["acceptance", "soft"])
def test_outliers_add_the_topk_kl_weighted_by_total_variation(rule: str) -> None:
    """The weight is a number: the expected gradient is TV * grad FKL, not the gradient of the product."""
    region = {"name": "trust-region", "region_rule": rule}
    added = enumerated({**region, "outlier": {"name": "forward-kl", "top_k": K}}) - enumerated(
        {**region, "outlier": "mask"}
    )
    total_variation = 0.5 * (P - STUDENT.softmax(-1)).abs().sum()
    torch.testing.assert_close(added, total_variation * gradient_of(topk_fkl), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mix", [0.2, 0.5, 0.9])
def test_jsd_as_published_is_the_exact_jsd_plus_its_direct_part(mix: float) -> None:
    found = enumerated({"name": "jsd", "top_k": K, "mix": mix})
    exact = enumerated({"name": "gkd", "mix": mix})
    torch.testing.assert_close(exact, enumerated({"name": "opd-plus", "mix": mix}), rtol=1e-9, atol=1e-12)
    direct = gradient_of(lambda q: mix * kl(P[TOP], mix * P[TOP] + (1 - mix) * q[TOP]))
    torch.testing.assert_close(found, exact + direct, rtol=1e-9, atol=1e-12)
    assert direct.abs().max() > 1e-3


def test_trust_region_aopd_adds_the_positive_half_of_opd() -> None:
    added = enumerated({"name": "trust-region-aopd", "outlier": "mask"}) - enumerated(
        {"name": "trust-region", "outlier": "mask"}
    )
    above = f_divergence(lambda u: torch.where(u < 1, torch.zeros_like(u), reverse_generator(u)))
    torch.testing.assert_close(added, gradient_of(above), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("outlier", ["mask", "clip", {"name": "forward-kl", "top_k": 2}], ids=str)
def test_soft_region_has_the_same_mean_and_less_variance(outlier: object) -> None:
    """Total variance of one token's logit gradient, on the toy of the golden numbers and on larger random pairs."""
    toy = [torch.tensor(v, dtype=torch.float64).log() for v in ([0.2, 0.3, 0.1, 0.4], [0.5, 0.3, 0.15, 0.05])]
    generator = torch.Generator().manual_seed(0)
    pairs = [toy, *((2.0 * torch.randn(2, 64, generator=generator, dtype=torch.float64)).unbind(0) for _ in range(20))]
    variances = []
    for student, teacher in pairs:
        results = {}
        for rule in ("acceptance", "soft"):
            strategy = STRATEGIES.build({"name": "trust-region", "region_rule": rule, "outlier": outlier})
            results[rule] = expected_gradient(strategy, student, teacher)
        torch.testing.assert_close(results["acceptance"][0], results["soft"][0], rtol=1e-9, atol=1e-12)
        variances.append((results["acceptance"][1], results["soft"][1]))
    assert all(soft < bernoulli for bernoulli, soft in variances)
    bernoulli, soft = (sum(v[i] for v in variances[1:]) / 20 for i in (0, 1))
    print(f"\n{outlier}: toy {variances[0][0]:.4f} -> {variances[0][1]:.4f}, V = 64 {bernoulli:.3f} -> {soft:.3f}")
