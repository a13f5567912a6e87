"""Credit loss against the bare matrix products: CPU-seconds, peak allocations, fraction of the limit.

    python -m tests.benchmarks.credit_loss --tokens 512 2048 --vocabulary 32000 151936 --hidden 256

The limit is the time of the products nobody can avoid: one for the teacher's logits, three for the student (logits,
gradient of the hidden states, gradient of the weight). One JSON object per case on stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from strategies import STRATEGIES, Needs
from tests.memory import allocations
from tropd_cli.batching import TokenBatch
from tropd_cli.credit_loss import CreditRequest, _Fused, _Job
from tropd_cli.crediting import region_uniforms, token_credit
from tropd_cli.models import Head
from tropd_cli.scoring import ScoringOptions, score_teacher


def flat_batch(count: int, vocabulary: int) -> TokenBatch:
    """N tokens of one row, each predicted by the hidden state of the same number."""
    index = torch.arange(count)
    zeros = torch.zeros_like(index)
    inputs = zeros.unsqueeze(0)
    tokens = torch.randint(vocabulary, (count,))
    return TokenBatch(0, inputs, index, inputs, index, tokens, zeros.bool(), zeros, index, zeros, zeros)


def stages(
    count: int, vocabulary: int, hidden_size: int, strategy_name: str
) -> tuple[Callable[[], None], Callable[[], None]]:
    """(score and update from given hidden states, the four bare products)."""
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(count, hidden_size), torch.randn(count, hidden_size)
    student_head, teacher_head = (nn.Linear(hidden_size, vocabulary, bias=False) for _ in range(2))
    batch = flat_batch(count, vocabulary)
    strategy = STRATEGIES.build(strategy_name)
    needs = strategy.needs | Needs(teacher_logprob=True, student_entropy=True)
    output = SimpleNamespace(last_hidden_state=teacher_hidden.unsqueeze(0))
    teacher = SimpleNamespace(head=Head(teacher_head), backbone=lambda **_: output, vocabulary=vocabulary)
    options = ScoringOptions(1.0, torch.ones(vocabulary, dtype=torch.bool))
    uniforms = region_uniforms(0, batch)
    chunk = 64

    def ours() -> None:
        scores = score_teacher(teacher, batch, needs, options)  # type: ignore[arg-type]
        request = CreditRequest(needs, token_credit(strategy, 0.001), count, uniforms=uniforms)
        job = _Job(Head(student_head), batch, scores, request, 1.0, None)
        leaf = hidden.clone().requires_grad_()
        _Fused.apply(leaf, job, student_head.weight).backward()
        student_head.zero_grad(set_to_none=True)

    def bare() -> None:
        logits = torch.empty(chunk, vocabulary)
        gradient = torch.zeros_like(student_head.weight)
        with torch.no_grad():
            for start in range(0, count, chunk):
                h = hidden[start : start + chunk]
                out: Tensor = logits[: len(h)]
                torch.mm(teacher_hidden[start : start + chunk], teacher_head.weight.t(), out=out)
                torch.mm(h, student_head.weight.t(), out=out)
                torch.mm(out, student_head.weight)
                gradient.addmm_(out.t(), h)

    return ours, bare


def cpu_seconds(action: Callable[[], None]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 151_936, 256_000])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--strategy", default="trust-region")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    for vocabulary in args.vocabulary:
        for count in args.tokens:
            ours, bare = stages(count, vocabulary, args.hidden, args.strategy)
            bare()
            pairs = [(cpu_seconds(ours), cpu_seconds(bare)) for _ in range(args.repeats)]
            row = {
                "tokens": count,
                "vocabulary": vocabulary,
                "hidden": args.hidden,
                "strategy": args.strategy,
                "threads": torch.get_num_threads(),
                "cpu_seconds": round(statistics.median(p[0] for p in pairs), 3),
                "bare_cpu_seconds": round(statistics.median(p[1] for p in pairs), 3),
                "fraction_of_limit": round(statistics.median(p[1] / p[0] for p in pairs), 3),
                "peak_bytes": allocations(ours).peak,
                "weight_bytes": vocabulary * args.hidden * 4,
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
