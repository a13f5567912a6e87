"""The numbers under a report: one dictionary of plain JSON values per strategy. Units: nats.

Means over tokens take the student-written ones, as a run's metrics do; what has no tokens to average is None.

    sequences, tokens, student_tokens: counts.
    regions: {name: {tokens, share of all tokens}}.
    outlier_share, acceptance: means of 1 - w and of min(p/q, 1).
    log_ratio: {mean, min, max, quantiles: {"0.01": ...}} of R = log p - log q where it is finite, and on how many
        tokens it is not (`infinite`: the teacher gives the token no probability at all, or a value is missing).
    reverse_kl: -mean R, the K1 estimate of KL(student || teacher): unbiased where the student wrote the tokens.
    forward_kl, forward_kl_method: see `forward_kl`.
    student_entropy, teacher_entropy: means.
    outlier_share_by_tenth: ten means over tenths of the response, from its first token to its last.
    outlier_tokens: see `frequent_outliers`.
    wanted_logprob: see `wanted_logprob`.
    outlier_credit_share: the outliers' part of the sum of |credit|.
    repetition: share of 4-grams that occurred before in their sequence. response_length: {mean, min, max}.
    finish: {eos, length, given, unknown}: sequences by how they end. truncated_share: of the sampled ones.
    advice: lines to act on, empty when nothing is off.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from .advice import advise
from .inspection import Sequence as Response
from .rows import REGIONS, TokenRow

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
TENTHS = 10
MOST_FREQUENT = 10
WANTED = 3  #: how many of the teacher's wishes are listed per outlier token
NGRAM = 4  #: repetition counts token 4-grams


def summarise(sequences: Sequence[Response]) -> dict[str, Any]:
    """Everything a report says in numbers about one strategy's sequences. The module's docstring names the keys."""
    rows = [row for sequence in sequences for row in sequence.rows]
    student = [row for row in rows if row.written_by == "student"]
    ratios = sorted(ratio for row in student if (ratio := row.log_ratio) is not None)
    kl, method = forward_kl(student)
    finish = Counter(sequence.finish or "unknown" for sequence in sequences)
    sampled = finish["eos"] + finish["length"]
    lengths = [len(sequence.rows) for sequence in sequences]
    summary: dict[str, Any] = {
        "sequences": len(sequences),
        "tokens": len(rows),
        "student_tokens": len(student),
        "regions": _regions(rows),
        "outlier_share": mean(row.weight_on_outlier for row in student),
        "acceptance": mean(row.p_trust for row in student),
        "log_ratio": _distribution(ratios) | {"infinite": len(student) - len(ratios)},
        "reverse_kl": -fmean(ratios) if ratios else None,
        "forward_kl": kl,
        "forward_kl_method": method,
        "student_entropy": mean(row.student_entropy for row in student),
        "teacher_entropy": mean(row.teacher_entropy for row in student),
        "outlier_share_by_tenth": outlier_share_by_tenth(sequences),
        "outlier_tokens": frequent_outliers(student),
        "wanted_logprob": wanted_logprob(sequences),
        "outlier_credit_share": _outlier_credit_share(student),
        "repetition": mean(map(repetition, sequences)),
        "response_length": {
            "mean": mean(lengths),
            "min": min(lengths, default=None),
            "max": max(lengths, default=None),
        },
        "finish": {name: finish[name] for name in ("eos", "length", "given", "unknown")},
        "truncated_share": finish["length"] / sampled if sampled else None,
    }
    return summary | {"advice": advise(summary)}


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the numbers among `values`, or None."""
    numbers = [value for value in values if value is not None]
    return fmean(numbers) if numbers else None


def quantile(ascending: Sequence[float], level: float) -> float:
    """Linear interpolation between order statistics."""
    place = level * (len(ascending) - 1)
    low = int(place)
    high = min(low + 1, len(ascending) - 1)
    return ascending[low] + (place - low) * (ascending[high] - ascending[low])


def forward_kl(rows: Sequence[TokenRow]) -> tuple[float | None, str | None]:
    """(mean KL(teacher || student) per token, how it was estimated).

    From the recorded top k with one bucket for all other tokens: a lower bound, never negative, and near the full
    divergence where the top k hold the teacher's mass. Rows without a top k contribute nothing.
    """
    values = [kl for row in rows if (kl := _bucketed_kl(row)) is not None]
    if not values:
        return None, None
    widest = max(len(row.teacher_top_k) for row in rows)
    return fmean(values), f"lower bound from the teacher's top {widest} and the rest as one"


def _bucketed_kl(row: TokenRow) -> float | None:
    """sum p log(p/q) over the listed tokens and over the bucket of all others."""
    total, teacher_rest, student_rest = 0.0, 1.0, 1.0
    for choice in row.teacher_top_k:
        if choice.teacher_logprob is None or choice.student_logprob is None:
            return None
        probability = math.exp(choice.teacher_logprob)
        total += probability * (choice.teacher_logprob - choice.student_logprob)
        teacher_rest -= probability
        student_rest -= math.exp(choice.student_logprob)
    if not row.teacher_top_k:
        return None
    rest = max(teacher_rest, 0.0)
    if rest > 1e-6:  # below, the difference of rounded numbers has no digits left
        total += rest * math.log(rest / max(student_rest, 1e-6))
    return max(total, 0.0)


def outlier_share_by_tenth(sequences: Sequence[Response]) -> list[float | None]:
    """Mean of 1 - w over the student's tokens in each tenth of their response."""
    weights: list[list[float]] = [[] for _ in range(TENTHS)]
    for sequence in sequences:
        for place, row in enumerate(sequence.rows):
            if row.written_by == "student":
                weights[place * TENTHS // len(sequence.rows)].append(row.weight_on_outlier)
    return [mean(part) for part in weights]


def frequent_outliers(rows: Sequence[TokenRow]) -> list[dict[str, Any]]:
    """The tokens that are outliers most often.

    Returns:
        Up to ten {token, outliers, occurrences, mean_log_ratio, teacher_wanted: [{token, count}]}; `teacher_wanted`
        counts the teacher's first choice at these places, which may be the token itself, only less likely.
    """
    occurrences = Counter(row.token for row in rows)
    places: dict[str, list[TokenRow]] = {}
    for row in rows:
        if row.region == "outlier":
            places.setdefault(row.token, []).append(row)
    ranked = sorted(places.items(), key=lambda item: (-len(item[1]), item[0]))[:MOST_FREQUENT]
    result = []
    for token, outliers in ranked:
        wanted = Counter(row.teacher_top_k[0].token for row in outliers if row.teacher_top_k)
        result.append(
            {
                "token": token,
                "outliers": len(outliers),
                "occurrences": occurrences[token],
                "mean_log_ratio": mean(row.log_ratio for row in outliers),
                "teacher_wanted": [
                    {"token": name, "count": count}
                    for name, count in sorted(wanted.items(), key=lambda item: (-item[1], item[0]))[:WANTED]
                ],
            }
        )
    return result


def wanted_logprob(sequences: Sequence[Response]) -> float | None:
    """Median student log-probability of the teacher's first choice at each response's first outlier, nats; None where
    it is not known. Where a response leaves the teacher's road: was that road within the student's reach?

    Later outliers do not count: what the teacher wants there may follow from the first."""
    found = []
    for sequence in sequences:
        first = next((row for row in sequence.rows if row.region == "outlier" and row.written_by == "student"), None)
        if first is not None and first.teacher_top_k and first.teacher_top_k[0].student_logprob is not None:
            found.append(first.teacher_top_k[0].student_logprob)
    return quantile(sorted(found), 0.5) if found else None


def repetition(sequence: Response) -> float | None:
    """Share of the sequence's token 4-grams that occurred before in it; None where it is too short to have two."""
    tokens = [row.token if row.token_id is None else row.token_id for row in sequence.rows]
    grams = [tuple(tokens[place : place + NGRAM]) for place in range(len(tokens) - NGRAM + 1)]
    return 1.0 - len(set(grams)) / len(grams) if len(grams) > 1 else None


def _regions(rows: Sequence[TokenRow]) -> dict[str, dict[str, Any]]:
    count = Counter(row.region for row in rows)
    return {name: {"tokens": count[name], "share": count[name] / len(rows) if rows else None} for name in REGIONS}


def _distribution(ascending: Sequence[float]) -> dict[str, Any]:
    if not ascending:
        return {"mean": None, "min": None, "max": None, "quantiles": {str(level): None for level in QUANTILES}}
    return {
        "mean": fmean(ascending),
        "min": ascending[0],
        "max": ascending[-1],
        "quantiles": {str(level): quantile(ascending, level) for level in QUANTILES},
    }


def _outlier_credit_share(rows: Sequence[TokenRow]) -> float | None:
    total = math.fsum(row.total_credit for row in rows)
    return math.fsum(row.total_credit for row in rows if row.region == "outlier") / total if total else None
