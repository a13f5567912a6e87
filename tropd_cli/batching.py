"""Micro-batches: rows of a rollout, grouped by length under a token budget, flattened to their valid response tokens.

Axes: b rows, L padded row length, N valid response tokens of the micro-batch in row order. Packed, the rows stand end to
end in one: b is 1, L the sum of their lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .rollout import Rollout


@dataclass
class TokenBatch:
    """What the models need to score some rows.

    inputs [b, L] prompt and response, right-padded or packed; predicts [N] flat index into b * L of the hidden state that
    predicts each response token. teacher_inputs / teacher_predicts: the same with the teacher's prompt. token_ids,
    teacher_wrote, row (of the rollout), position (in the response), group, sample [N]. lengths, teacher_lengths: of the
    packed sequences; None where the rows are padded.
    """

    step: int
    inputs: Tensor
    predicts: Tensor
    teacher_inputs: Tensor
    teacher_predicts: Tensor
    token_ids: Tensor
    teacher_wrote: Tensor
    row: Tensor
    position: Tensor
    group: Tensor
    sample: Tensor
    lengths: tuple[int, ...] | None = None
    teacher_lengths: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return self.token_ids.shape[0]

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()})


def plan_micro_batches(lengths: Sequence[int], token_budget: int, *, packed: bool = False) -> list[list[int]]:
    """Rows sorted by length, cut so that the tokens of a micro-batch stay within `token_budget`: rows x longest row, or
    the sum of the lengths when packed. A single row may exceed it."""
    plan: list[list[int]] = []
    used = 0
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        cost = lengths[row] if packed or not plan else lengths[plan[-1][0]]
        if plan and used + cost <= token_budget:
            plan[-1].append(row)
            used += cost
        else:
            plan.append([row])
            used = lengths[row]
    return plan


def row_lengths(rollout: Rollout) -> list[int]:
    """Tokens of each row for the longer of the two models' prompts, response included."""
    return [
        max(len(p), len(t)) + int(n)
        for p, t, n in zip(rollout.prompt_ids, rollout.teacher_prompt_ids, rollout.lengths, strict=True)
    ]


def token_batch(
    rollout: Rollout, rows: Sequence[int], *, pad_id: int, packed: bool = False, length_multiple: int = 1
) -> TokenBatch:
    """Flattens some rows. No rows gives one row of padding without tokens: a rank with nothing to do still takes part.

    Args:
        packed: rows end to end instead of padded; for models that can (packing.py).
        length_multiple: padded rows are that long, or a multiple.
    """
    if not rows:
        empty = torch.zeros(0, dtype=torch.int64)
        padding = torch.full((1, 1), pad_id, dtype=torch.int64)
        flags = empty.bool()
        return TokenBatch(rollout.step, padding, empty, padding, empty, empty, flags, empty, empty, empty, empty)
    index = torch.tensor(list(rows))
    mask = rollout.mask[index]
    counts = mask.sum(-1)
    position = torch.arange(mask.shape[1]).expand_as(mask)[mask]
    local = torch.arange(len(rows)).repeat_interleave(counts)
    same_prompt = all(rollout.prompt_ids[r] is rollout.teacher_prompt_ids[r] for r in rows)

    def laid_out(prompts: list[list[int]]) -> tuple[Tensor, Tensor, tuple[int, ...] | None]:
        sequences = [prompts[r] + rollout.ids[r][rollout.mask[r]].tolist() for r in rows]
        inputs, starts = _packed(sequences) if packed else _padded(sequences, pad_id, length_multiple)
        first = starts + torch.tensor([len(prompts[r]) for r in rows]) - 1
        return inputs, first[local] + position, tuple(map(len, sequences)) if packed else None

    inputs, predicts, lengths = laid_out(rollout.prompt_ids)
    teacher_inputs, teacher_predicts, teacher_lengths = (
        (inputs, predicts, lengths) if same_prompt else laid_out(rollout.teacher_prompt_ids)
    )
    return TokenBatch(
        step=rollout.step,
        inputs=inputs,
        predicts=predicts,
        teacher_inputs=teacher_inputs,
        teacher_predicts=teacher_predicts,
        token_ids=rollout.ids[index][mask],
        teacher_wrote=rollout.teacher_wrote[index][mask],
        row=index[local],
        position=position,
        group=rollout.group[index][local],
        sample=rollout.sample[index][local],
        lengths=lengths,
        teacher_lengths=teacher_lengths,
    )


def _padded(sequences: list[list[int]], pad_id: int, length_multiple: int) -> tuple[Tensor, Tensor]:
    """(inputs [b, L], flat index at which each sequence starts [b])."""
    width = -(-max(map(len, sequences)) // length_multiple) * length_multiple
    inputs = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        inputs[row, : len(sequence)] = torch.tensor(sequence)
    return inputs, torch.arange(len(sequences)) * width


def _packed(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(inputs [1, total], index at which each sequence starts [b])."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return torch.tensor([[token for sequence in sequences for token in sequence]]), lengths.cumsum(0) - lengths
