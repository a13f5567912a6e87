"""What two processes run to compare a student and a teacher in pieces with whole ones: sampling, updates, measuring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor

from strategies import STRATEGIES
from tropd_cli.divergence import token_divergences
from tropd_cli.heldout import divergence_batches
from tropd_cli.models import LanguageModel
from tropd_cli.rollout import Request, TransformersGenerator

from .split_update import share, training, two_updates_per_rollout
from .tiny import random_rollout, tiny_vocabulary

#: (model, LoRA, strategy, shard): untied, tied, tied with another head than a bare matrix; every way a head is read.
CASES = [
    ("llama", False, "trust-region", "full"),
    ("qwen", False, "gkd", "grad_op"),
    ("gemma", False, "trust-region", "full"),
    ("llama", True, "reopold", "grad_op"),
    ("qwen", True, "trust-region", "full"),
]
#: Rows of very different length on the first process, two of them with one prompt; none on the second.
REQUESTS = [[([3, 5, 7], 6), ([4], 1), ([9, 2], 9), ([9, 2], 9)], []]


def sampled(model: LanguageModel, requests: list[Any]) -> list[list[int]]:
    write = TransformersGenerator(model, tiny_vocabulary(), seed=0, stream="student", temperature=1.0, token_budget=24)
    return write([Request(prompt, [], length, (0, i, 0)) for i, (prompt, length) in enumerate(requests)])


def same_tokens(sharded: Any, reference: Any, role: str, requests: list[Any]) -> None:
    """On this process's requests; the others have other numbers of tokens, batches and steps."""
    tokens, expected = (sampled(getattr(t.pair, role), requests) for t in (sharded, reference))
    assert tokens == expected, (role, tokens, expected)
    in_pieces(sharded)


def same_divergences(sharded: Any, reference: Any) -> None:
    """On rows of which the second process has one fewer, and so one micro-batch fewer."""
    rollout = share(random_rollout([5, 9, 3, 7, 12], seed=3), dist.get_rank(), 2)
    for batch, values in divergence_batches(sharded.pair, rollout, temperature=1.0, token_budget=16):
        expected = token_divergences(reference.pair.student, reference.pair.teacher, batch)
        torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-11)


def in_pieces(t: Any) -> None:
    for module in (t.module, t.pair.teacher.backbone):
        for name, parameter in module.named_parameters():
            assert isinstance(parameter, DTensor), name
            assert parameter.to_local().numel() <= (parameter.numel() + 1) // 2 + parameter.shape[-1], name


def compare(folder: Path) -> None:
    """Everything as with whole models: tokens, metrics of every update, trained weights."""
    transformers.logging.set_verbosity_error()
    for kind, lora, strategy, shard in CASES:
        assert strategy in STRATEGIES.names()
        reference, sharded = (
            training(strategy, lora=lora, folder=folder, kind=kind, shard=how) for how in ("none", shard)
        )
        in_pieces(sharded)
        same_tokens(sharded, reference, "student", REQUESTS[dist.get_rank()])  # before any update, as the probe does
        results = [two_updates_per_rollout(t, 20) for t in (reference, sharded)]
        compare_updates(*results, case=f"{kind}, LoRA {lora}, {strategy}, {shard}")
        in_pieces(sharded)
        same_tokens(sharded, reference, "teacher" if lora else "student", REQUESTS[1 - dist.get_rank()])
        same_divergences(sharded, reference)


def compare_updates(reference: Any, other: Any, *, case: str) -> None:
    """Raises AssertionError naming the case and what differs."""
    for row, wanted in zip(other[0], reference[0], strict=True):
        for name in ("loss", "grad_norm", "update_norm", "reverse_kl", "entropy", "outlier_share", "tokens"):
            assert abs(row[name] - wanted[name]) <= 1e-9 * abs(wanted[name]) + 1e-11, (
                case,
                name,
                row[name],
                wanted[name],
            )
    for name, value in reference[1].items():
        torch.testing.assert_close(
            other[1][name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{case}, {n}: {m}"
        )
