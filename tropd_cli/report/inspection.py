"""Rows put together: which tokens make a sequence, and what each strategy says about them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from tropd_cli.errors import UserError

from .rows import Finish, TokenRow
from .text import visible_tokens


@dataclass(frozen=True)
class Rule:
    """How trust regions were drawn: where a page's slider starts. threshold: nats, REOPOLD's log(0.2) / 0.8."""

    KINDS: ClassVar[tuple[str, ...]] = ("acceptance", "soft", "threshold")
    kind: str = "acceptance"
    threshold: float = math.log(0.2) / 0.8


@dataclass
class Sequence:
    """One response under one strategy, its tokens in order."""

    index: int
    rows: list[TokenRow]

    @property
    def prompt(self) -> str | None:
        return next((row.prompt for row in self.rows if row.prompt is not None), None)

    @property
    def finish(self) -> Finish | None:
        return self.rows[-1].finish

    @cached_property
    def shown(self) -> list[str]:
        """Every token as harmless visible text."""
        return visible_tokens([row.token for row in self.rows])


@dataclass
class Inspection:
    """Everything a report shows.

    rows: of one or several strategies, in any order. facts: what heads the report ("student", "teacher", "run", ...).
    metrics: a run's metrics.jsonl. notes: lines a reader must know. rule: where the HTML slider starts.

    Raises:
        UserError: two strategies speak of different tokens, or one says two things about a token.
    """

    rows: list[TokenRow]
    facts: dict[str, str] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rule: Rule = field(default_factory=Rule)

    @cached_property
    def by_strategy(self) -> dict[str, list[Sequence]]:
        """Strategy name -> its sequences, both in order. Without names: one entry, the name of the strategy of `facts` or ''."""
        unnamed = self.facts.get("strategy", "").partition(",")[0]
        tokens: dict[str, dict[int, list[TokenRow]]] = {}
        for row in self.rows:
            tokens.setdefault(row.strategy or unnamed, {}).setdefault(row.sequence, []).append(row)
        grouped = {
            name: [Sequence(index, sorted(rows, key=lambda row: row.position)) for index, rows in sorted(parts.items())]
            for name, parts in tokens.items()
        }
        _check_same_tokens(grouped)
        return grouped

    @property
    def strategies(self) -> list[str]:
        return list(self.by_strategy)

    @property
    def sequences(self) -> list[Sequence]:
        """The first strategy's sequences."""
        return next(iter(self.by_strategy.values()), [])


def _check_same_tokens(grouped: dict[str, list[Sequence]]) -> None:
    first: list[tuple[int, int, str]] | None = None
    for name, sequences in grouped.items():
        keys = [(s.index, row.position, row.token) for s in sequences for row in s.rows]
        if len({key[:2] for key in keys}) < len(keys):
            raise UserError(
                f"a token occurs twice under strategy '{name}': rows of two recordings cannot share a report"
            )
        if first is None:
            first = keys
        if keys != first:
            raise UserError(f"strategy '{name}' speaks of other tokens than '{next(iter(grouped))}'")
