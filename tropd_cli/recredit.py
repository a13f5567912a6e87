"""Recorded tokens under other strategies: their signals are in the rows, so no model is needed.

Axes: N recorded tokens, K recorded teacher top-k. Units: nats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from strategies import Credit, Signals, Strategy
from strategies.guidance import WEIGHT

from .credit_loss import credit_record
from .crediting import padded_signals, select, token_credit
from .errors import UserError
from .inspected_strategies import Asked
from .recording import REGION_NAMES
from .report.rows import TokenRow

#: Signals of one number per token that a row holds under the same name, and where missing means log 0.
NUMBERS = ("student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy", "uniform")
LOG_ZERO = ("student_logprob", "teacher_logprob")
MODELS = "Models can be asked instead: give --student, --teacher and --data"


def recredit(
    rows: Sequence[TokenRow], asked: Sequence[Asked], *, config: dict[str, Any], step: int | None
) -> tuple[list[TokenRow], list[str]]:
    """The rows once per strategy, with its region and credit.

    Args:
        rows: of one strategy.
        config: the run's, for the guidance weight and the fraction of the run; {} without a run.

    Returns:
        (rows, what a reader must know).

    Raises:
        UserError: a strategy reads what a row does not hold.
    """
    rows = sorted(rows, key=lambda row: (row.sequence, row.position))
    guidance, steps = config.get("guidance"), config.get("steps")
    weight = guidance.get("weight", WEIGHT) if isinstance(guidance, dict) else WEIGHT
    progress = (step - 1) / steps if step and isinstance(steps, int) and steps else 0.0
    made: list[TokenRow] = []
    notes: list[str] = []
    for one in asked:
        tokens = recorded_tensors(rows, one)
        notes += _notes(one, tokens, len({row.sequence for row in rows}))
        credit = _credit(one.strategy, tokens, progress, weight)
        made += _with_credit(rows, credit, one.label if len(asked) > 1 else None)
    return made, notes


def recorded_tensors(rows: Sequence[TokenRow], one: Asked) -> dict[str, Tensor]:
    """The signals a strategy declared and the places of the tokens, all [N] or [N, K].

    Raises:
        UserError: something it reads was not recorded.
    """
    needs = one.strategy.needs
    for missing, what in (
        (needs.full_distribution, "whole distributions"),
        (needs.reference_logprob, "a reference model"),
    ):
        if missing:
            raise UserError(f"strategy '{one.label}' reads {what}, which a recording does not hold. {MODELS}")
    tensors = {"teacher_wrote": torch.tensor([row.written_by == "teacher" for row in rows])}
    for name in NUMBERS:
        if name == "student_logprob" or getattr(needs, name, False):
            tensors[name] = _column(rows, name, one.label)
    if needs.teacher_top_k:
        width = min((len(row.teacher_top_k) for row in rows), default=0)
        if not width:
            raise UserError(f"strategy '{one.label}' reads the teacher's top k, and these rows have none. {MODELS}")
        for name in ("teacher", "student"):
            lists = [[getattr(choice, f"{name}_logprob") for choice in row.teacher_top_k[:width]] for row in rows]
            tensors[f"{name}_topk_logprob"] = torch.tensor([[-torch.inf if v is None else v for v in r] for r in lists])
    group, sample = {}, {}
    for row in rows:
        group.setdefault(row.sequence, row.sequence if row.group is None else row.group)
        sample.setdefault(row.sequence, row.sequence if row.sample is None else row.sample)
    tensors["group"] = torch.tensor([group[row.sequence] for row in rows])
    tensors["sample"] = torch.tensor([sample[row.sequence] for row in rows])
    tensors["position"] = torch.tensor([row.position for row in rows])
    return tensors


def _column(rows: Sequence[TokenRow], name: str, label: str) -> Tensor:
    values = [getattr(row, name) for row in rows]
    if name in LOG_ZERO:
        values = [-torch.inf if value is None else value for value in values]
    if None in values:
        raise UserError(f"strategy '{label}' reads '{name}', which not every row here has. {MODELS}")
    return torch.tensor(values, dtype=torch.float64 if name == "uniform" else torch.float32)


def _notes(one: Asked, tokens: dict[str, Tensor], sequences: int) -> list[str]:
    notes = []
    wanted = one.strategy.needs.teacher_top_k
    if wanted and tokens["teacher_topk_logprob"].shape[1] < wanted:
        held = tokens["teacher_topk_logprob"].shape[1]
        notes.append(
            f"{one.label} reads the teacher's top {wanted}; the recording holds {held}, so its credit beyond them is "
            f"missing in credit_top_k_mass and |credit|. To keep more: tropd distill --set record.top_k={wanted}"
        )
    if one.strategy.scope == "batch":
        notes.append(batch_scope_note(one.label, sequences))
    return notes


def batch_scope_note(label: str, sequences: int) -> str:
    """What a strategy that looks across a batch says of less than one."""
    return f"{label} looks across a batch: its quantiles and baselines are those of the {sequences} sequences here, not a training step's."


def _credit(strategy: Strategy, tokens: dict[str, Tensor], progress: float, weight: float) -> Credit:
    """[N] credit, guidance applied."""
    credit_of = token_credit(strategy, weight)
    if strategy.scope == "token":
        flat = {name: value for name, value in tokens.items() if name not in ("group", "sample", "position")}
        return credit_of(Signals(**flat, progress=progress), slice(None))
    signals, row, position, _ = padded_signals(tokens, progress)
    return select(credit_of(signals, slice(None)), (row, position))


def _with_credit(rows: Sequence[TokenRow], credit: Credit, label: str | None) -> list[TokenRow]:
    columns = {name: value.tolist() for name, value in credit_record(credit).items() if name != "floored"}
    columns["region"] = [REGION_NAMES[region] for region in columns["region"]]
    return [
        dataclasses.replace(row, strategy=label, **{name: column[place] for name, column in columns.items()})
        for place, row in enumerate(rows)
    ]
