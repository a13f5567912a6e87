"""Recorded rollouts: the same rows that `inspect-regions` writes, one object per token, with the region's uniform."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from strategies import Region

from .batching import TokenBatch
from .credit_loss import Record
from .crediting import region_uniforms
from .rollout import Rollout
from .scoring import Scores

REGION_NAMES = {int(region): region.name.lower() for region in Region}


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text each token adds, decoded in context: pieces keep their spaces, and their concatenation is the text.

    A token that is only part of a character adds nothing; the token that completes it adds the whole character.
    """
    texts, pending = [], 0
    for end in range(1, len(ids) + 1):
        start = max(0, min(pending, end - 1) - 4)
        before = tokenizer.decode(ids[start:pending], clean_up_tokenization_spaces=False)
        after = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        if after.endswith("\ufffd") and end < len(ids) and end - pending < 4:
            texts.append("")
            continue
        texts.append(after[len(before) :] if after.startswith(before) else tokenizer.decode([ids[end - 1]]))
        pending = end
    return texts


def token_rows(
    rollout: Rollout,
    batches: Sequence[TokenBatch],
    scores: Sequence[Scores],
    records: Sequence[Record],
    *,
    tokenizer: PreTrainedTokenizerBase,
    sequences: int,
    top_k: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Rows of the first `sequences` rows of a rollout, in reading order. Needs scores with teacher_entropy, teacher_rank
    and top-k, and records with student_topk_logprob."""
    cells: dict[tuple[int, int], tuple[int, int]] = {}
    for number, batch in enumerate(batches):
        for token, (row, position) in enumerate(zip(batch.row.tolist(), batch.position.tolist(), strict=True)):
            if row < sequences:
                cells[row, position] = (number, token)
    columns = [_columns(*parts, top_k, seed) for parts in zip(batches, scores, records, strict=True)]
    for row in range(min(sequences, len(rollout))):
        ids = rollout.ids[row][rollout.mask[row]].tolist()
        for position, text in enumerate(token_texts(tokenizer, ids)):
            number, token = cells[row, position]
            values = {name: column[token] for name, column in columns[number].items()}
            top = zip(values.pop("top_ids"), values.pop("top_teacher"), values.pop("top_student"), strict=True)
            line = {
                "sequence": row,
                "position": position,
                "token_id": ids[position],
                "token": text,
                "written_by": "teacher" if values.pop("teacher_wrote") else "student",
                **values,
                "region": REGION_NAMES[values["region"]],
                "teacher_top_k": [
                    {"token": tokenizer.decode([i]), "teacher_logprob": p, "student_logprob": q} for i, p, q in top
                ],
            }
            if position == 0:
                line["prompt"] = rollout.prompts[row].text if rollout.prompts else ""
            if position == len(ids) - 1:
                line["finish"] = "eos" if rollout.ended[row] else "length"
            yield line


def _columns(batch: TokenBatch, scores: Scores, record: Record, top_k: int, seed: int) -> dict[str, list[Any]]:
    """One micro-batch's values as Python lists, keyed like a row."""
    if not len(batch):
        return {}
    assert scores.teacher_topk_ids is not None and scores.teacher_topk_logprob is not None
    reward = scores.teacher_logprob - record["student_logprob"]
    tensors = {
        "student_logprob": record["student_logprob"],
        "teacher_logprob": scores.teacher_logprob,
        "p_trust": reward.clamp_max(0).exp(),
        "region": record["region"],
        "credit": record["credit"],
        "credit_top_k_mass": record["credit_top_k_mass"],
        "student_entropy": record["student_entropy"],
        "teacher_entropy": scores.teacher_entropy,
        "teacher_rank": scores.teacher_rank,
        "uniform": region_uniforms(seed, batch),
        "teacher_wrote": batch.teacher_wrote,
        "top_ids": scores.teacher_topk_ids[:, :top_k],
        "top_teacher": scores.teacher_topk_logprob[:, :top_k],
        "top_student": record["student_topk_logprob"][:, :top_k],
    }
    return {name: value.tolist() for name, value in tensors.items() if value is not None}
