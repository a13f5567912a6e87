"""Accuracy with an interval, pass@k, majority@k and paired comparison. The unit is the problem, not the sample.

Thirty-two samples of one problem are no thirty-two problems: they tell how hard that problem is, not how hard the next
one will be. Everything here takes one number per problem and treats the problems as drawn at random.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
PRIOR_STRENGTH = 10.0  # see `effective_sample_size`; chosen by the coverage simulation in the tests
MAX_SUBSETS = 1000  # majority@k is averaged over at most this many subsets of the samples
BOOTSTRAP_RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """Result b minus result a over the problems that both have.

    Args:
        difference: mean over problems of (accuracy of b - accuracy of a).
        ci95: percentile interval of the difference under resampled problems.
        probability: share of resamples in which the difference has the observed sign (one half for no difference).
        problems: how many problems both results have.
    """

    difference: float
    ci95: tuple[float, float]
    probability: float
    problems: int


def accuracy(problem_means: Sequence[float]) -> float:
    """avg@n: the mean over problems of the share of correct samples."""
    if not len(problem_means):
        raise ValueError("accuracy of no problems")
    return float(np.mean(np.asarray(problem_means, dtype=float)))


def accuracy_interval(problem_means: Sequence[float], samples: int) -> tuple[float, float]:
    """95 % interval of `accuracy`: Wilson's score interval with the effective sample size and Student's quantile.

    Args:
        problem_means: share of correct samples per problem.
        samples: number of samples over all problems.

    Returns:
        (low, high) within [0, 1]; (0, 1) for a single problem, which says nothing about others.

    Wilson (1927), Probable inference, the law of succession, and statistical inference. JASA 22.
    """
    means = np.asarray(problem_means, dtype=float)
    p = accuracy(problem_means)
    if len(means) < 2:
        return 0.0, 1.0
    low, high = wilson(p, effective_sample_size(means[None], np.array([samples]))[0], student_quantile(len(means) - 1))
    return float(low), float(high)


def effective_sample_size(means: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """How many independent yes-or-no answers carry as much information as these problems.

    p (1 - p) / var(mean), where the variance between problems is pulled towards its maximum p (1 - p), the value for
    problems that are either always or never solved. The pull is PRIOR_STRENGTH / (PRIOR_STRENGTH + d ** 2) with d the
    smaller of the numbers of problems with a correct and with a wrong sample: with few of them the observed variance
    says little, and taking it at its word covers 0.80 instead of 0.95.

    Args:
        means: [..., M] share of correct samples per problem.
        samples: [...] number of samples over all M problems, an upper limit of the result.

    Returns:
        [...] between M - 1 and `samples`; M where all means are 0 or all are 1.
    """
    count = means.shape[-1]
    p = means.mean(-1)
    most = p * (1 - p)
    informative = np.minimum((means > 0).sum(-1), (means < 1).sum(-1))
    weight = PRIOR_STRENGTH / (PRIOR_STRENGTH + informative**2)
    variance = (1 - weight) * means.var(-1, ddof=1) + weight * most * count / (count - 1)
    size = np.divide(most * count, variance, out=np.full(p.shape, float(count)), where=variance > 0)
    return np.minimum(size, np.maximum(samples, count))


def wilson(p: np.ndarray | float, size: np.ndarray | float, quantile: float) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's score interval (low, high) for a share `p` of `size` yes-or-no answers."""
    p, size = np.asarray(p, dtype=float), np.asarray(size, dtype=float)
    square = quantile**2
    center = (p + square / (2 * size)) / (1 + square / size)
    half = quantile / (1 + square / size) * np.sqrt(p * (1 - p) / size + square / (4 * size**2))
    return np.clip(center - half, 0.0, 1.0), np.clip(center + half, 0.0, 1.0)


@functools.cache
def student_quantile(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t: 2.0452 for 29 degrees of freedom, 1.9600 in the limit.

    With t = sqrt(freedom) tan(angle) the density is proportional to cos(angle) ** (freedom - 1), integrated on a grid.
    """
    freedom = min(freedom, 10_000)
    edges = np.linspace(0.0, math.pi / 2, 200_001)
    mass = np.cumsum(np.cos((edges[:-1] + edges[1:]) / 2) ** (freedom - 1))
    angle = np.interp(CONFIDENCE, mass / mass[-1], edges[1:])
    return float(math.sqrt(freedom) * math.tan(angle))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k samples is correct: 1 - C(n - c, k) / C(n, k).

    Args:
        samples: n, at least k.
        correct: c of them.
        k: at least 1.

    Chen et al. (2021), Evaluating Large Language Models Trained on Code, equation 1, arXiv 2107.03374.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {samples} samples with {correct} correct")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int, seed: int = 0) -> float:
    """Probability that the most frequent answer of k samples is correct, averaged over subsets of the samples.

    Correct samples vote together, however they are written; wrong ones by their extracted text; samples without an
    answer do not vote. A tie counts as the share of correct ones among the winners.

    Args:
        answers: extracted answer per sample, or None.
        correct: verdict per sample.
        k: subset size, at most the number of samples. All subsets are used if there are at most MAX_SUBSETS of them.
        seed: of the subsets that are drawn otherwise.
    """
    if not 1 <= k <= len(answers) or len(answers) != len(correct):
        raise ValueError(f"majority@{k} of {len(answers)} answers with {len(correct)} verdicts")
    votes = [(True, "") if right else (False, a) for a, right in zip(answers, correct, strict=True)]
    if math.comb(len(votes), k) <= MAX_SUBSETS:
        subsets = list(itertools.combinations(range(len(votes)), k))
    else:
        generator = np.random.default_rng(seed)
        subsets = [tuple(generator.choice(len(votes), k, replace=False)) for _ in range(MAX_SUBSETS)]
    return sum(_majority([votes[i] for i in subset]) for subset in subsets) / len(subsets)


def _majority(votes: Sequence[tuple[bool, str | None]]) -> float:
    counts = Counter(vote for vote in votes if vote[1] is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    winners = [vote for vote, count in counts.items() if count == most]
    return sum(right for right, _ in winners) / len(winners)


def compare(a: Mapping[str, float], b: Mapping[str, float], seed: int = 0) -> Comparison:
    """Paired bootstrap over the problems that both results have.

    Args:
        a: accuracy per problem id.
        b: the same for the other result; positive differences speak for it.
        seed: of the resamples.

    Raises:
        ValueError: no problem in common.
    """
    shared = sorted(a.keys() & b.keys())
    if not shared:
        raise ValueError("the results have no problem in common")
    differences = np.array([b[problem] - a[problem] for problem in shared])
    observed = float(differences.mean())
    values, counts = np.unique(np.round(differences, 12), return_counts=True)  # resampling sees only their histogram
    drawn = np.random.default_rng(seed).multinomial(len(shared), counts / len(shared), size=BOOTSTRAP_RESAMPLES)
    resampled = drawn @ values / len(shared)
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    sign = np.sign(np.round(resampled, 12)) * np.sign(observed)
    probability = float(np.mean(sign > 0) + np.mean(sign == 0) / 2)
    return Comparison(observed, (float(low), float(high)), probability, len(shared))
