"""Micro-batches as training cuts them against one padded batch: score and update of responses of mixed lengths.

    python -m tests.benchmarks.bucketing

A model of 135M weights' shape; lengths drawn evenly between two bounds, in arrival order; both ways compute the same loss
of the same tokens. Tokens are response tokens: padding counts for nothing, and so only costs. What the ways give is compared
as well: log-probabilities of the tokens in nats, loss and gradient relative to sum |credit x log q| / N.
"""

from __future__ import annotations

import argparse
import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.tiny import random_rollout
from tropd_cli.rollout import Rollout

from .engine import Engine, Plan, planned, with_packing
from .process import RESULTS, alternating, write_results
from .shapes import llama_135m, random_pair


def plans(rollout: Rollout, token_budget: int) -> dict[str, Plan]:
    """The ways that are compared; the first is what the others are measured against, the last what training does."""
    return {
        "one padded batch": Plan([list(range(len(rollout)))]),
        "by length, padded": planned(rollout, token_budget, packed=False),
        "packed": planned(rollout, token_budget, packed=True),
    }


@dataclass(frozen=True)
class Outcome:
    """What one pass over a rollout gives. logprob [N] in row order; scale: sum |credit x log q| / N; gradient:
    of every weight."""

    loss: float
    scale: float
    logprob: Tensor
    gradient: list[Tensor]

    def gaps(self, other: Outcome) -> dict[str, float]:
        """Largest differences from another way to compute the same."""
        gradient = max(float((a - b).abs().max()) for a, b in zip(self.gradient, other.gradient, strict=True))
        return {
            "logprob_gap": float((self.logprob - other.logprob).abs().max()),
            "loss_gap": abs(self.loss - other.loss) / other.scale,
            "gradient_gap": gradient / other.scale,
        }


def score_and_update(engine: Engine, rollout: Rollout, plan: Plan) -> Outcome:
    """One pass over the rollout; the gradient is left in the weights, too."""
    tokens = int(rollout.mask.sum())
    loss, scale = 0.0, 0.0
    logprob = torch.zeros(rollout.mask.shape)
    for batch in plan.batches(rollout, engine.student.device):
        batch_loss, record = engine.update(batch, engine.score(batch), tokens)
        loss += float(batch_loss)
        scale += float((record["credit_absolute"] * record["student_logprob"].abs()).sum()) / tokens
        logprob[batch.row, batch.position] = record["student_logprob"].float()
    gradient = [p.grad for p in engine.student.model.parameters() if p.grad is not None]
    return Outcome(loss, scale, logprob[rollout.mask], gradient)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    draw = random.Random(args.seed)
    engine = with_packing(Engine(*random_pair(llama_135m(layers=args.layers))))
    lengths = [draw.randint(*args.lengths) for _ in range(args.rows)]
    rollout = random_rollout(lengths, vocabulary=engine.student.vocabulary)
    found = plans(rollout, args.token_budget)
    outcomes: dict[str, Outcome] = {}

    def action(name: str) -> None:
        engine.forget_gradient()
        outcomes[name] = score_and_update(engine, rollout, found[name])

    warm = random_rollout([8], vocabulary=engine.student.vocabulary)
    score_and_update(engine, warm, Plan([[0]]))
    seconds = alternating([functools.partial(action, name) for name in found], args.repeats)
    tokens, first = sum(lengths), next(iter(found))
    for (name, plan), taken in zip(found.items(), seconds, strict=True):
        yield {
            "plan": name,
            "micro_batches": len(plan.rows),
            "rows": args.rows,
            "tokens": tokens,
            "token_budget": args.token_budget,
            "layers": args.layers,
            "threads": torch.get_num_threads(),
            "cpu_seconds": taken,
            "tokens_per_cpu_second": tokens / taken,
            "speed_up": seconds[0] / taken,
            **outcomes[name].gaps(outcomes[first]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--lengths", type=int, nargs=2, default=[51, 512], metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--token-budget", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "bucketing.json")
    args = parser.parse_args()
    write_results(args.out, "bucketing", measure(args))


if __name__ == "__main__":
    main()
