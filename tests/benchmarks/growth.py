"""How memory of score and update grows with response length and with vocabulary: allocations counted, nothing timed.

    python -m tests.benchmarks.growth

Peaks of tensor allocations on the CPU through backward, rows packed as in training, leaving out tensors of the shape of
the embedding (its gradient, and the head's). With length: against the student's backbone alone, forward and backward,
whose activations have to be kept. With vocabulary: against one [N, V] float32 tensor of logits, which is what a loss on
full logits adds several times.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.memory import allocations
from tropd_cli.batching import TokenBatch
from tropd_cli.models import LanguageModel

from .engine import Engine, equal_rows, with_packing
from .process import RESULTS, write_results
from .shapes import qwen2, random_pair


def peak(engine: Engine, batch: TokenBatch) -> int:
    """Bytes at the peak of score and update, apart from tensors of the embedding's shape."""
    counted = allocations(lambda: engine.score_and_update(batch))
    engine.forget_gradient()
    return counted.peak_apart_from(_embedding_bytes(engine.student))


def backbone_peak(student: LanguageModel, batch: TokenBatch) -> int:
    """The same of the backbone alone, its hidden states given a gradient of ones."""

    def forward_and_backward() -> torch.Tensor:
        hidden = student.backbone(input_ids=batch.inputs, use_cache=False).last_hidden_state
        hidden.sum().backward()
        return hidden.detach()

    counted = allocations(forward_and_backward)
    student.model.zero_grad(set_to_none=True)
    return counted.peak_apart_from(_embedding_bytes(student))


def _embedding_bytes(student: LanguageModel) -> set[int]:
    weight = student.base.get_input_embeddings().weight
    return {weight.numel() * weight.element_size()}


def with_length(engine: Engine, lengths: list[int], rows: int) -> Iterator[dict[str, Any]]:
    """One case per response length; per token: growth since the first one."""
    first: tuple[int, int, int] | None = None
    for length in lengths:
        batch = equal_rows(rows, length, engine.student.vocabulary)
        packed = equal_rows(rows, length, engine.student.vocabulary, packed=True)
        tokens, ours, backbone = len(batch), peak(engine, packed), backbone_peak(engine.student, batch)
        case = {"kind": "length", "length": length, "tokens": tokens, "peak": ours, "backbone_peak": backbone}
        if first is None:
            first = tokens, ours, backbone
        else:
            grown, backbone_grown = ours - first[1], backbone - first[2]
            case |= {"growth": grown, "backbone_growth": backbone_grown, "ratio": grown / backbone_grown}
        yield case


def with_vocabulary(
    vocabularies: list[int], rows: int, length: int, hidden: int, layers: int
) -> Iterator[dict[str, Any]]:
    """One case per vocabulary; share: growth since the one before, of a [N, V] float32 tensor of the larger V."""
    before: int | None = None
    for vocabulary in vocabularies:
        engine = with_packing(Engine(*random_pair(qwen2(vocabulary, hidden=hidden, layers=layers))))
        batch = equal_rows(rows, length, vocabulary, packed=True)
        ours, logits = peak(engine, batch), len(batch) * vocabulary * 4
        case = {"kind": "vocabulary", "vocabulary": vocabulary, "tokens": len(batch), "peak": ours, "logits": logits}
        if before is not None:
            case |= {"growth": ours - before, "share_of_logits": (ours - before) / logits}
        before = ours
        yield case


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    shape = {"hidden": args.hidden, "layers": args.layers, "rows": args.rows}
    engine = with_packing(Engine(*random_pair(qwen2(args.vocabulary[-1], hidden=args.hidden, layers=args.layers))))
    for case in with_length(engine, args.lengths, args.rows):
        yield case | shape | {"vocabulary": args.vocabulary[-1]}
    del engine
    for case in with_vocabulary(args.vocabulary, args.rows, args.lengths[-1], args.hidden, args.layers):
        yield case | shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[37_984, 75_968, 151_936])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS / "growth.json")
    args = parser.parse_args()
    write_results(args.out, "growth", measure(args))


if __name__ == "__main__":
    main()
