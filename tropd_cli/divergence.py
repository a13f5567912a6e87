"""Exact divergences between student and teacher on given tokens, whole vocabularies, one chunk at a time.

Axes: N response tokens, c tokens of a chunk, V vocabulary. Units: nats.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from strategies.functional import entropy, kl_divergence

from .batching import TokenBatch
from .models import LanguageModel
from .scoring import chunk_slices, response_hidden


@torch.no_grad()
def token_divergences(
    student: LanguageModel, teacher: LanguageModel, batch: TokenBatch, *, temperature: float = 1.0,
    chunk_tokens: int | None = None, student_context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[str, Tensor]:  # fmt: skip
    """Per response token [N]: `reverse_kl` KL(q || p), `forward_kl` KL(p || q), `acceptance` sum min(p, q) = 1 - TV,
    `agreement` whether both prefer the same token, `student_entropy`, `teacher_entropy`, `student_logprob`,
    `teacher_logprob` of the token.

    Where the padded vocabularies differ, the surplus ids of the larger one count as impossible for the other only if
    they carry mass; they are compared on the smaller width.
    """
    with student_context():
        hidden = response_hidden(student, batch)
    elsewhere = batch.to(teacher.device)
    teacher_hidden = response_hidden(teacher, elsewhere, as_teacher=True)
    width = min(student.vocabulary, teacher.vocabulary)
    parts: dict[str, list[Tensor]] = {}
    for where in chunk_slices(len(batch), max(student.vocabulary, teacher.vocabulary), hidden.device, chunk_tokens):
        with student_context():
            q = (student.head(hidden[where]) / temperature).log_softmax(-1)[:, :width]
        p = (teacher.head(teacher_hidden[where]) / temperature).log_softmax(-1)[:, :width].to(q.device)
        tokens = batch.token_ids[where].unsqueeze(1)
        values = {
            "reverse_kl": kl_divergence(q, p),
            "forward_kl": kl_divergence(p, q),
            "acceptance": torch.minimum(p, q).exp_().sum(-1),
            "agreement": (p.argmax(-1) == q.argmax(-1)).to(q.dtype),
            "student_entropy": entropy(q),
            "teacher_entropy": entropy(p),
            "student_logprob": q.gather(1, tokens).squeeze(1),
            "teacher_logprob": p.gather(1, tokens).squeeze(1),
        }
        for name, value in values.items():
            parts.setdefault(name, []).append(value)
    return {name: torch.cat(pieces) for name, pieces in parts.items()}
