"""Micro-batches: rows of a rollout, grouped by length under a token budget, flattened to their valid response tokens.

Axes: b rows, L padded row length, N valid response tokens of the micro-batch in row order.
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

    inputs [b, L] prompt and response, right-padded; predicts [N] flat index into b * L of the hidden state that predicts
    each response token. teacher_inputs / teacher_predicts: the same with the teacher's prompt. token_ids, teacher_wrote,
    row (of the rollout), position (in the response), group, sample [N].
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

    def __len__(self) -> int:
        return self.token_ids.shape[0]

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()})


def plan_micro_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Rows sorted by length, cut so that rows x longest row stays within `token_budget` (a single row may exceed it)."""
    plan: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if plan and lengths[plan[-1][0]] * (len(plan[-1]) + 1) <= token_budget:
            plan[-1].append(row)
        else:
            plan.append([row])
    return plan


def row_lengths(rollout: Rollout) -> list[int]:
    """Tokens of each row for the longer of the two models' prompts, response included."""
    return [
        max(len(p), len(t)) + int(n)
        for p, t, n in zip(rollout.prompt_ids, rollout.teacher_prompt_ids, rollout.lengths, strict=True)
    ]


def token_batch(rollout: Rollout, rows: Sequence[int], *, pad_id: int, length_multiple: int = 1) -> TokenBatch:
    """Flattens some rows. No rows gives one row of padding without tokens: a rank with nothing to do still takes part."""
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
    inputs, predicts = _inputs(rollout.prompt_ids, rollout, rows, local, position, pad_id, length_multiple)
    teacher_inputs, teacher_predicts = (
        (inputs, predicts)
        if same_prompt
        else _inputs(rollout.teacher_prompt_ids, rollout, rows, local, position, pad_id, length_multiple)
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
    )


def _inputs(
    prompts: list[list[int]],
    rollout: Rollout,
    rows: Sequence[int],
    local: Tensor,
    position: Tensor,
    pad_id: int,
    length_multiple: int,
) -> tuple[Tensor, Tensor]:
    sequences = [prompts[r] + rollout.ids[r][rollout.mask[r]].tolist() for r in rows]
    width = -(-max(map(len, sequences)) // length_multiple) * length_multiple
    inputs = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        inputs[row, : len(sequence)] = torch.tensor(sequence)
    prompt_lengths = torch.tensor([len(prompts[r]) for r in rows])
    return inputs, local * width + prompt_lengths[local] + position - 1
