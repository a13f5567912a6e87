"""Three strengths of a log-ratio, and the names and marks of regions that all formats share."""

from __future__ import annotations

from .rows import RegionName

#: |R| in nats at which a token's colour grows stronger: from 1 nat p and q differ by a factor e, from 3 by a factor 20.
STRONGER = (1.0, 3.0)

#: Colours told apart with every common colour blindness (Okabe and Ito), as used in figures.
COLOURS: dict[RegionName, str] = {
    "trust": "#0072B2",
    "outlier": "#E69F00",
    "guidance": "#CC79A7",
    "ignored": "#999999",
}

#: What a region means, in a legend's words.
MEANING: dict[RegionName, str] = {
    "trust": "trust: supervised by R",
    "outlier": "outlier: the estimator's",
    "guidance": "guidance: the teacher wrote it",
    "ignored": "ignored: no credit",
}


def strength(log_ratio: float | None) -> int:
    """0, 1 or 2: how far p and q are apart on a token. A ratio that is missing or infinite counts as far."""
    return 2 if log_ratio is None else sum(abs(log_ratio) >= limit for limit in STRONGER)
