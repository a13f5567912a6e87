"""Statistics against hand-computed cases, textbook values and simulated benchmarks.

`python tests/test_statistics.py` prints the table of measured coverages in docs/evaluation.md.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tropd_cli import statistics as st

BENCHMARKS = 4000


@pytest.mark.parametrize(
    ("samples", "correct", "k", "expected"),
    [(4, 0, 1, 0.0), (4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 2, 2, 1 - 1 / 6), (4, 1, 4, 1.0), (200, 13, 10, None)],
)
def test_pass_at_k_by_hand(samples: int, correct: int, k: int, expected: float | None) -> None:
    if expected is None:  # the product form of the same number, which shares no code with the binomials
        expected = 1 - math.prod(1 - k / i for i in range(samples - correct + 1, samples + 1))
    assert st.pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample() -> None:
    for n, k in itertools.product(range(1, 7), range(1, 7)):
        for c in range(n + 1):
            if k <= n:
                subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
                assert st.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (0, 0, 1)])
def test_pass_at_k_refuses_what_cannot_be(samples: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@"):
        st.pass_at_k(samples, correct, k)


@pytest.mark.parametrize(
    ("answers", "correct", "k", "expected"),
    [
        (["7", "7", "8"], [True, True, False], 3, 1.0),
        (["7", "8", "8"], [True, False, False], 3, 0.0),
        (["7", "8"], [True, False], 2, 0.5),  # a tie
        (["1/2", "0.5", "8", "8"], [True, True, False, False], 4, 0.5),  # correct forms vote together
        (["7", "8", "9"], [True, False, False], 3, 1 / 3),
        (["7", None, None], [True, False, False], 3, 1.0),  # no answer, no vote
        ([None, None], [False, False], 2, 0.0),
        (["7", "8", "8"], [True, False, False], 1, 1 / 3),  # majority@1 is the accuracy
        (["7", "7", "8"], [True, True, False], 2, (1 + 0.5 + 0.5) / 3),
    ],
)
def test_majority_by_hand(answers: list[str | None], correct: list[bool], k: int, expected: float) -> None:
    assert st.majority_at_k(answers, correct, k) == pytest.approx(expected)


def test_majority_of_many_samples_is_drawn_and_repeatable() -> None:
    answers, correct = ["7"] * 24 + ["8"] * 40, [True] * 24 + [False] * 40
    drawn = st.majority_at_k(answers, correct, 9, seed=3)
    exact = sum(math.comb(24, i) * math.comb(40, 9 - i) for i in range(5, 10)) / math.comb(64, 9)
    assert drawn == st.majority_at_k(answers, correct, 9, seed=3)
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / st.MAX_SUBSETS))


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.7062), (2, 4.3027), (9, 2.2622), (29, 2.0452), (1318, 1.9618)])
def test_student_quantile_is_the_one_in_the_tables(freedom: int, value: float) -> None:
    assert st.student_quantile(freedom) == pytest.approx(value, abs=2e-4)


def test_wilson_by_hand() -> None:
    # Wilson's interval of 7 out of 10 at 1.96: center (0.7 + 0.19208) / 1.38416, as the textbooks print it
    low, high = st.wilson(0.7, 10, 1.96)
    assert (low, high) == (pytest.approx(0.39677, abs=1e-5), pytest.approx(0.89221, abs=1e-5))


def size(means: list[float], samples: int) -> float:
    return float(st.effective_sample_size(np.array([means], dtype=float), np.array([samples]))[0])


def test_effective_sample_size_by_hand() -> None:
    assert size([0, 1] * 50, 100) == pytest.approx(99)  # one sample per problem: the problems, less the estimated mean
    assert size([0] * 30, 960) == size([1] * 30, 960) == 30  # nothing seen to vary: problems, not samples
    assert size([0.5] * 100, 200) == 200  # equally hard problems: samples, and never more than those
    # 20 problems at 0.25, 20 at 0.75: p = 0.5, variance 0.0625 * 40 / 39, pull 10 / (10 + 1600)
    pull = 10 / 1610
    assert size([0.25, 0.75] * 20, 160) == pytest.approx(39 * 0.25 / ((1 - pull) * 0.0625 + pull * 0.25))


def test_interval_respects_the_problem_as_the_unit() -> None:
    many = st.accuracy_interval([0.0, 1.0] * 15, samples=960)
    once = st.accuracy_interval([0.0, 1.0] * 15, samples=30)
    assert many == once and many[1] - many[0] > 0.3
    assert st.accuracy_interval([0.0] * 30, 960) == (pytest.approx(0.0), pytest.approx(0.1223, abs=1e-3))
    assert st.accuracy_interval([1.0], 32) == (0.0, 1.0)


def coverage(problems: int, samples: int, spread: float, p: float, seed: int = 1) -> float:
    """Share of simulated benchmarks whose interval holds the true accuracy.

    The difficulty of a problem is Beta(p * spread, (1 - p) * spread): at spread 0.2 problems are solved always or
    never, at infinity all are equally hard.
    """
    generator = np.random.default_rng([seed, problems, samples, round(1e3 * p), round(10 * min(spread, 1e6))])
    shape = (BENCHMARKS, problems)
    difficulty = generator.beta(p * spread, (1 - p) * spread, shape) if math.isfinite(spread) else np.full(shape, p)
    means = generator.binomial(samples, difficulty) / samples
    size = st.effective_sample_size(means, np.full(BENCHMARKS, problems * samples))
    low, high = st.wilson(means.mean(-1), size, st.student_quantile(problems - 1))
    return float(((low <= p) & (p <= high)).mean())


@pytest.mark.parametrize("samples", [1, 4, 32])
@pytest.mark.parametrize("spread", [0.5, 2.0, math.inf])
def test_coverage_of_the_interval(samples: int, spread: float) -> None:
    for p in (0.1, 0.3, 0.5, 0.9):
        assert 0.93 <= coverage(100, samples, spread, p) <= 0.97
    for p in (0.02, 0.1, 0.5, 0.95):
        assert coverage(30, samples, spread, p) >= 0.90


def test_simulated_benchmark_agrees_with_the_scalar_function() -> None:
    means = np.random.default_rng(0).binomial(4, 0.4, 40) / 4
    size = st.effective_sample_size(means[None], np.array([160]))[0]
    low, high = st.wilson(means.mean(), size, st.student_quantile(39))
    assert st.accuracy_interval(list(means), 160) == (pytest.approx(float(low)), pytest.approx(float(high)))


def test_comparison_is_paired() -> None:
    hard = {f"p{i}": (i % 10) / 10 for i in range(100)}
    better = {problem: accuracy + 0.05 for problem, accuracy in hard.items()}
    result = st.compare(hard, better)
    assert result.difference == pytest.approx(0.05) and result.probability == 1.0 and result.problems == 100
    assert result.ci95 == (pytest.approx(0.05), pytest.approx(0.05))
    assert st.compare(better, hard).difference == pytest.approx(-0.05)
    assert st.compare(hard, hard) == st.Comparison(0.0, (0.0, 0.0), 0.5, 100)
    assert st.compare(hard, {"p1": 0.3, "other": 1.0}).problems == 1
    with pytest.raises(ValueError, match="no problem in common"):
        st.compare({"a": 1.0}, {"b": 1.0})


def test_comparison_of_one_problem_that_differs_by_hand() -> None:
    # one of 20 problems differs: a resample without it is a tie, (19/20)^20 of them, and counts half
    a, b = {str(i): 0.0 for i in range(20)}, {str(i): float(i == 0) for i in range(20)}
    assert st.compare(a, b).probability == pytest.approx(1 - 0.95**20 / 2, abs=0.015)


def test_probability_is_uniform_when_nothing_differs() -> None:
    generator = np.random.default_rng(0)
    found = []
    for seed in range(50):
        a, b = (dict(zip(map(str, range(60)), generator.binomial(4, 0.5, 60) / 4, strict=True)) for _ in range(2))
        found.append(st.compare(a, b, seed).probability)
    assert np.mean(np.array(found) > 0.95) < 0.25  # 0.1 expected: both signs


def print_table() -> None:
    print("| problems | samples | spread | " + " | ".join(f"p = {p}" for p in PS) + " |")
    print("|---|---|---|" + "---|" * len(PS))
    for problems, samples, spread in itertools.product((30, 40, 100, 200, 500), (1, 4, 32), (0.5, 2.0, math.inf)):
        row = [f"{coverage(problems, samples, spread, p):.3f}" for p in PS]
        print(f"| {problems} | {samples} | {spread} | {' | '.join(row)} |")


PS = (0.02, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.98)

if __name__ == "__main__":
    print_table()
