"""Micro-batches as training cuts them against one padded batch: score and update of responses of mixed lengths.

    python -m tests.benchmarks.bucketing

A model of 135M weights' shape; lengths drawn evenly between two bounds, in arrival order; both ways compute the same loss
of the same tokens. Tokens are response tokens: padding counts for nothing, and so only costs.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

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


def score_and_update(engine: Engine, rollout: Rollout, plan: Plan) -> Callable[[], float]:
    """One pass over the rollout; returns the loss."""
    tokens = int(rollout.mask.sum())

    def action() -> float:
        loss = 0.0
        for batch in plan.batches(rollout, engine.student.device):
            loss += float(engine.update(batch, engine.score(batch), tokens).detach())
        engine.forget_gradient()
        return loss

    return action


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    draw = random.Random(args.seed)
    engine = with_packing(Engine(*random_pair(llama_135m(layers=args.layers))))
    lengths = [draw.randint(*args.lengths) for _ in range(args.rows)]
    rollout = random_rollout(lengths, vocabulary=engine.student.vocabulary)
    found = plans(rollout, args.token_budget)
    actions = [score_and_update(engine, rollout, plan) for plan in found.values()]
    warm = random_rollout([8], vocabulary=engine.student.vocabulary)
    score_and_update(engine, warm, Plan([[0]]))()
    seconds = alternating(actions, args.repeats)
    tokens = sum(lengths)
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
