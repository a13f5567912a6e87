"""The summary's numbers against hand-computed ones, and its advice."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from tropd_cli.report.inspection import Inspection
from tropd_cli.report.rows import Choice, TokenRow
from tropd_cli.report.summary import forward_kl, quantile, repetition, summarise
from tropd_cli.report.writers import summary_json

from .report_rows import chain_rows, with_strategy

TEACHER, STUDENT = (0.5, 0.3, 0.15, 0.05), (0.2, 0.3, 0.1, 0.4)


def toy_row(position: int, token: int, **values: object) -> TokenRow:
    """A token drawn from the toy pair, with the teacher's top 2."""
    top = [Choice(str(v), math.log(TEACHER[v]), math.log(STUDENT[v])) for v in (0, 1)]
    ratio = math.log(TEACHER[token] / STUDENT[token])
    row = TokenRow(
        0, position, token, str(token), math.log(STUDENT[token]), math.log(TEACHER[token]),
        "trust" if ratio >= -1 else "outlier", teacher_top_k=top, credit=ratio, credit_top_k_mass=0.0,
    )  # fmt: skip
    return dataclasses.replace(row, **values)


def summary_of(rows: list[TokenRow]) -> dict:
    return summarise(Inspection(rows).sequences)


def toy_sample() -> list[TokenRow]:
    """Ten tokens in exactly the student's proportions, so that means over them are expectations under q."""
    return [toy_row(place, token) for place, token in enumerate([0, 0, 1, 1, 1, 2, 3, 3, 3, 3])]


def test_divergences_of_the_toy_pair() -> None:
    summary = summary_of(toy_sample())
    reverse = sum(q * math.log(q / p) for p, q in zip(TEACHER, STUDENT, strict=True))
    assert summary["reverse_kl"] == pytest.approx(reverse)
    assert summary["acceptance"] == pytest.approx(0.65)  # 1 - total variation
    # Tail-aware top-2 forward KL: .45814537 inside the top 2 and -.18325815 for the rest.
    assert summary["forward_kl"] == pytest.approx(0.27488722)
    assert "top 2" in summary["forward_kl_method"]


def test_forward_kl_is_a_lower_bound_and_exact_with_the_whole_vocabulary() -> None:
    pairs = list(zip(TEACHER, STUDENT, strict=True))
    full = sum(p * math.log(p / q) for p, q in pairs)
    everything = [Choice(str(v), math.log(p), math.log(q)) for v, (p, q) in enumerate(pairs)]
    assert forward_kl([toy_row(0, 0, teacher_top_k=everything)])[0] == pytest.approx(full)
    assert forward_kl([toy_row(0, 0)])[0] < full
    assert forward_kl([toy_row(0, 0, teacher_top_k=[])]) == (None, None)


def test_counts_shares_and_credit() -> None:
    rows = toy_sample()
    rows[0] = dataclasses.replace(rows[0], written_by="teacher", region="guidance", credit=0.001)
    rows[1] = dataclasses.replace(rows[1], region="ignored", credit=0.0)
    summary = summary_of(rows)
    assert {name: part["tokens"] for name, part in summary["regions"].items()} == {
        "trust": 4, "outlier": 4, "guidance": 1, "ignored": 1,
    }  # fmt: skip
    assert summary["outlier_share"] == pytest.approx(4 / 9)  # of the student's tokens
    outliers = 4 * abs(math.log(0.05 / 0.4))
    assert summary["outlier_credit_share"] == pytest.approx(outliers / (outliers + math.log(1.5)))
    assert summary["outlier_share_by_tenth"] == [None, 0, 0, 0, 0, 0, 1, 1, 1, 1]


def test_what_the_teacher_wants_is_the_median_over_first_outliers() -> None:
    """Four responses of ten tokens, the last four of them outliers; what is known of their teacher's choice differs."""
    rows: list[TokenRow] = []
    for number, logprob in enumerate((-9.0, -2.0, -5.0, None)):
        response = [dataclasses.replace(row, sequence=number) for row in toy_sample()]
        first = [] if logprob is None else [Choice("0", -0.1, logprob)]
        response[6] = dataclasses.replace(response[6], teacher_top_k=first)
        response[7] = dataclasses.replace(response[7], teacher_top_k=[Choice("0", -0.1, -30.0)])  # a later one
        rows += response
    assert summary_of(rows)["wanted_logprob"] == -5.0
    assert summary_of(rows[:6])["wanted_logprob"] is None


def test_soft_regions_count_by_weight() -> None:
    rows = [dataclasses.replace(row, outlier_weight=0.25) for row in toy_sample()]
    assert summary_of(rows)["outlier_share"] == pytest.approx(0.25)


def test_quantiles_interpolate() -> None:
    assert quantile([0.0, 1.0, 2.0, 3.0], 0.5) == 1.5
    assert quantile([5.0], 0.99) == 5.0
    summary = summary_of(toy_sample())["log_ratio"]
    assert summary["quantiles"]["0.5"] == pytest.approx(0.0) and summary["max"] == pytest.approx(math.log(2.5))


def test_frequent_outliers_say_what_the_teacher_wanted() -> None:
    (entry,) = summary_of(toy_sample())["outlier_tokens"]
    assert entry == {
        "token": "3",
        "outliers": 4,
        "occurrences": 4,
        "mean_log_ratio": pytest.approx(math.log(0.125)),
        "teacher_wanted": [{"token": "0", "count": 4}],
    }


def test_repetition_counts_four_grams_seen_before() -> None:
    def repeated(tokens: list[int]) -> float | None:
        return repetition(Inspection([toy_row(p, 0, token_id=t) for p, t in enumerate(tokens)]).sequences[0])

    assert repeated([1, 2, 3, 4, 5, 6]) == 0.0
    assert repeated([1] * 13) == pytest.approx(0.9)  # 10 four-grams, one of them new
    assert repeated([1, 2, 3, 4]) is None


def test_ends_and_lengths() -> None:
    summary = summary_of(chain_rows(4))
    assert summary["finish"] == {"eos": 3, "length": 1, "given": 0, "unknown": 0}
    assert summary["truncated_share"] == 0.25
    assert summary["response_length"]["max"] == 48


def test_same_model_is_said() -> None:
    rows = [dataclasses.replace(row, teacher_logprob=row.student_logprob, p_trust=1.0) for row in chain_rows(1)]
    assert "same model" in summary_of(rows)["advice"][0]
    rows[0].teacher_logprob = None  # the teacher gives one token no probability: not the same model
    assert not any("same model" in line for line in summary_of(rows)["advice"])


def test_advice_for_what_is_off_and_none_otherwise() -> None:
    rows = chain_rows(8)
    assert summary_of(rows)["advice"] == []
    for row in rows:
        row.region, row.student_entropy, row.token_id = "outlier", 0.001, 1
        row.finish = row.finish and "length"
    lines = summary_of(rows)["advice"]
    assert [any(word in line for line in lines) for word in ("outliers", "entropy", "cut at", "looping")] == [True] * 4
    sure = [dataclasses.replace(row, teacher_entropy=0.001) for row in rows]  # a task with one right continuation
    assert not any("entropy" in line for line in summary_of(sure)["advice"])
    guided = [dataclasses.replace(row, written_by="teacher", region="guidance") for row in rows]
    assert "nothing to compare" in summary_of(guided)["advice"][0]


def test_a_token_without_teacher_probability_does_not_hide() -> None:
    rows = toy_sample()
    rows[9] = dataclasses.replace(rows[9], teacher_logprob=None, p_trust=0.0)
    summary = summary_of(rows)
    assert summary["log_ratio"]["infinite"] == 1 and math.isfinite(summary["reverse_kl"])


def test_summary_json_of_one_and_several_strategies() -> None:
    rows = chain_rows(2)
    assert json.loads(summary_json(Inspection(rows)))["tokens"] == len(rows)
    both = Inspection(with_strategy(rows, "opd") + with_strategy(rows, "floor", floor=-2.0))
    summaries = json.loads(summary_json(both))
    assert list(summaries) == ["opd", "floor"]
    expected = sum(row.written_by == "student" and row.log_ratio < -2.0 for row in rows)
    assert summaries["floor"]["regions"]["outlier"]["tokens"] == expected > 0 == summaries["opd"]["outlier_share"]


def test_nothing_to_summarise() -> None:
    summary = summarise([])
    assert summary["tokens"] == 0 and summary["outlier_share"] is None and summary["advice"]
