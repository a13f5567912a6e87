"""Credit loss against the bare matrix products: CPU-seconds, peak allocations, fraction of the limit.

    python -m tests.benchmarks.credit_loss
    python -m tests.benchmarks.credit_loss --tokens 512 --vocabulary 151936

Teacher scores with the strategy's top-k, and the student's loss and gradient, from hidden states that are given: no backbone.
The limit is the time of the products nobody can avoid: one for the teacher's logits, three for the student (logits,
gradient of the hidden states, gradient of the weight), in chunks of that number of rows which is fastest here out of
BARE_CHUNKS. A case of more than LARGE tokens is timed once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from strategies import Credit
from tests.memory import allocations
from tests.tiny import reference_loss
from tropd_cli.batching import TokenBatch
from tropd_cli.models import Head

from .engine import Engine, equal_rows
from .process import RESULTS, alternating, cpu_seconds, write_results

LARGE = 4096  #: tokens

#: Rows of the bare products' logits: few stay in a CPU's cache, many keep the threads or the GPU busy.
BARE_CHUNKS = (64, 256, 512, 1024, 2048)


@dataclass
class Heads:
    """Hidden states of N tokens and the two models' heads, in the shape in which training meets them.

    student_hidden [1, L, H] a leaf, and student_head: float32, computed with under autocast unless `compute` is float32.
    teacher_hidden [1, L, H_teacher] and teacher_head: in `compute`.
    """

    batch: TokenBatch
    student_hidden: Tensor
    teacher_hidden: Tensor
    student_head: nn.Linear
    teacher_head: nn.Linear
    compute: torch.dtype

    def engine(self, strategy: str) -> Engine:
        """The program's engine on models that are all head."""
        student = _headed(self.student_head, self.student_hidden)
        return Engine(student, _headed(self.teacher_head, self.teacher_hidden), strategy, self.context)

    def context(self) -> torch.autocast:
        return torch.autocast(self.student_hidden.device.type, self.compute, enabled=self.compute != torch.float32)

    def used(self, hidden: Tensor) -> Tensor:
        """[N, H] of [1, L, H]: the states that predict response tokens."""
        return hidden[0, self.batch.predicts]

    def forget_gradient(self) -> None:
        self.student_hidden.grad = None
        self.student_head.zero_grad(set_to_none=True)


def _headed(projection: nn.Linear, hidden: Tensor) -> Any:
    """What the engine asks of a model, with hidden states that are there already."""
    output = SimpleNamespace(last_hidden_state=hidden)
    return SimpleNamespace(
        model=projection, head=Head(projection), backbone=lambda **_: output, vocabulary=projection.out_features
    )


def random_heads(
    count: int, vocabulary: int, hidden: int, *, teacher_hidden: int | None = None, device: str = "cpu",
    compute: torch.dtype = torch.float32,
) -> Heads:  # fmt: skip
    torch.manual_seed(0)
    batch = equal_rows(1, count, vocabulary).to(torch.device(device))
    length, width = batch.inputs.shape[1], teacher_hidden or hidden
    return Heads(
        batch,
        torch.randn(1, length, hidden, device=device).requires_grad_(),
        torch.randn(1, length, width, device=device, dtype=compute),
        nn.Linear(hidden, vocabulary, bias=False, device=device),
        nn.Linear(width, vocabulary, bias=False, device=device, dtype=compute).requires_grad_(False),
        compute,
    )


def ours(heads: Heads, strategy: str) -> Callable[[], None]:
    engine = heads.engine(strategy)

    def action() -> None:
        engine.score_and_update(heads.batch)
        heads.forget_gradient()

    return action


def bare(heads: Heads, chunk: int, most: int | None = None) -> Callable[[], None]:
    """The four products, `chunk` rows of logits at a time, and nothing else; of the first `most` tokens."""

    @torch.no_grad()
    def action() -> None:
        student, teacher = heads.used(heads.student_hidden)[:most].to(heads.compute), heads.used(heads.teacher_hidden)
        weight, teacher_weight = heads.student_head.weight.to(heads.compute), heads.teacher_head.weight
        logits = student.new_empty(chunk, weight.shape[0])
        gradient = torch.zeros_like(weight)
        for start in range(0, len(student), chunk):
            h = student[start : start + chunk]
            out = logits[: len(h)]
            torch.mm(teacher[start : start + chunk], teacher_weight.t(), out=out)
            torch.mm(h, weight.t(), out=out)
            torch.mm(out, weight)
            gradient.addmm_(out.t(), h)

    return action


def fastest_bare(
    heads: Heads, seconds_of: Callable[[Callable[[], object]], float] = cpu_seconds
) -> tuple[int, Callable[[], None]]:
    """(chunk, action) of the limit: each chunk is tried once on some of the tokens, after one whose time does not count,
    for the first products of a process are slow. `seconds_of`: what measures."""
    candidates = {chunk: bare(heads, chunk, BARE_CHUNKS[-1]) for chunk in BARE_CHUNKS}
    candidates[BARE_CHUNKS[0]]()
    chunk = min(candidates, key=lambda size: seconds_of(candidates[size]))
    return chunk, bare(heads, chunk)


def full(heads: Heads, top_k: int) -> Callable[[], None]:
    """The same kind of loss (sampled token, and the teacher's top-k) by autograd on all logits at once."""

    def action() -> None:
        with heads.context():
            with torch.no_grad():
                teacher = heads.teacher_head(heads.used(heads.teacher_hidden)).float().log_softmax(-1).topk(top_k)
            logits = heads.student_head(heads.used(heads.student_hidden)).float()
        credit = Credit(torch.ones_like(logits[:, 0]), top_k=teacher.values.exp())
        reference_loss(logits, heads.batch.token_ids, teacher.indices, credit, len(logits)).backward()
        heads.forget_gradient()

    return action


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for vocabulary in args.vocabulary:
        for count in args.tokens:
            heads = random_heads(count, vocabulary, args.hidden)
            repeats = 1 if count > LARGE else args.repeats
            chunk, limit_action = fastest_bare(heads)
            actions = [ours(heads, args.strategy), limit_action]
            seconds, limit = alternating(actions, repeats)
            yield {
                "tokens": count,
                "vocabulary": vocabulary,
                "hidden": args.hidden,
                "strategy": args.strategy,
                "threads": torch.get_num_threads(),
                "repeats": repeats,
                "cpu_seconds": seconds,
                "bare_cpu_seconds": limit,
                "bare_chunk": chunk,
                "fraction_of_limit": limit / seconds,
                "peak_bytes": allocations(actions[0]).peak,
                "weight_bytes": vocabulary * args.hidden * 4,
                "logits_bytes": vocabulary * count * 4,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 151_936, 256_000])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--strategy", default="trust-region")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "credit_loss.json")
    args = parser.parse_args()
    write_results(args.out, "credit_loss", measure(args))


if __name__ == "__main__":
    main()
