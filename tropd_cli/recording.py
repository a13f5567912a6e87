"""From tensors to token rows: what `distill` keeps in rollouts/ and what `inspect-regions` shows of models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from strategies import Region

from .batching import TokenBatch
from .credit_loss import Record
from .crediting import region_uniforms
from .report.rows import Choice, RegionName, TokenRow
from .rollout import Rollout
from .scoring import Scores
from .token_texts import TokenTexts

REGION_NAMES: dict[int, RegionName] = {
    int(Region.IGNORED): "ignored",
    int(Region.TRUST): "trust",
    int(Region.OUTLIER): "outlier",
    int(Region.GUIDANCE): "guidance",
}


def token_rows(
    rollout: Rollout,
    batches: Sequence[TokenBatch],
    scores: Sequence[Scores],
    records: Sequence[Record],
    *,
    tokenizer: PreTrainedTokenizerBase,
    kept: Mapping[int, int],
    top_k: int,
    seed: int,
) -> Iterator[TokenRow]:
    """Rows of the responses in `kept`: row of the rollout -> number it is shown under. Needs scores with
    teacher_entropy, teacher_rank and top-k, and records with student_topk_logprob."""
    texts = TokenTexts(tokenizer)
    columns = [_columns(*parts, kept, top_k, seed) for parts in zip(batches, scores, records, strict=True)]
    cells = {
        key: {name: column[cell] for name, column in part.items()}
        for part in columns
        for cell, key in enumerate(zip(part.pop("row"), part.pop("position"), strict=True))
    }
    for place, sequence in kept.items():
        ids = rollout.ids[place][rollout.mask[place]].tolist()
        for position, text in enumerate(texts.sequence(ids)):
            values = cells[place, position]
            top = zip(values.pop("top_ids"), values.pop("top_teacher"), values.pop("top_student"), strict=True)
            behind = ids[position - 1] if position else None
            row = TokenRow(
                sequence=sequence,
                position=position,
                token_id=ids[position],
                token=text,
                written_by="teacher" if values.pop("teacher_wrote") else "student",
                region=REGION_NAMES[values.pop("region")],
                teacher_top_k=[Choice(texts.one(i, behind=behind), p, q) for i, p, q in top],
                **values,
            )
            if position == 0:
                row.prompt = rollout.prompts[place].text if rollout.prompts else ""
                row.group, row.sample = int(rollout.group[place]), int(rollout.sample[place])
            if position == len(ids) - 1:
                row.finish = "eos" if rollout.ended[place] else "length"
            yield row


def spread(rollout: Rollout, most: int, prompts: int) -> dict[int, int]:
    """Which rows to keep, and their numbers in reading order over all processes: one response of as many of the step's
    `prompts` as possible before a second one of any."""
    chosen = sorted((place % prompts, place // prompts) for place in range(most))
    numbers = {key: number for number, key in enumerate(chosen)}
    rows = zip(rollout.group.tolist(), rollout.sample.tolist(), strict=True)
    return {row: numbers[key] for row, key in enumerate(rows) if key in numbers}


def _columns(
    batch: TokenBatch, scores: Scores, record: Record, kept: Mapping[int, int], top_k: int, seed: int
) -> dict[str, list[Any]]:
    """One micro-batch's values of the kept rows' tokens as Python lists, keyed like a row."""
    if not len(batch):
        return {"row": [], "position": []}
    assert scores.teacher_topk_ids is not None and scores.teacher_topk_logprob is not None
    assert scores.teacher_entropy is not None and scores.teacher_rank is not None
    reward = scores.teacher_logprob - record["student_logprob"]
    tensors = {
        "row": batch.row,
        "position": batch.position,
        "student_logprob": record["student_logprob"],
        "teacher_logprob": scores.teacher_logprob,
        "p_trust": reward.clamp_max(0).exp(),
        "region": record["region"],
        "credit": record["credit"],
        "credit_top_k_mass": record["credit_top_k_mass"],
        "credit_absolute": record["credit_absolute"],
        "outlier_weight": record["outlier_weight"],
        "student_entropy": record["student_entropy"],
        "teacher_entropy": scores.teacher_entropy,
        "teacher_rank": scores.teacher_rank,
        "uniform": region_uniforms(seed, batch),
        "teacher_wrote": batch.teacher_wrote,
        "top_ids": scores.teacher_topk_ids[:, :top_k],
        "top_teacher": scores.teacher_topk_logprob[:, :top_k],
        "top_student": record["student_topk_logprob"][:, :top_k],
    }
    wanted = torch.isin(batch.row, torch.tensor(list(kept), device=batch.row.device))
    return {name: value[wanted].tolist() for name, value in tensors.items()}
