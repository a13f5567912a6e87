"""Rollout against plain `model.generate`: the same model, prompts and number of tokens.

    python -m tests.benchmarks.rollout

Plain: `generate(do_sample=True)` at temperature 1 on the whole batch of prompts x samples. It knows one limit for all rows,
so with mixed lengths it samples every row to the longest and the tokens beyond a row's own limit are thrown away; ours has
a limit per row. The end token is forbidden on both sides, so that lengths are what the case says. Only tokens within the
limits are counted.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from tropd_cli.models import LanguageModel
from tropd_cli.rollout import Request, TransformersGenerator

from .process import RESULTS, alternating, write_results
from .shapes import END, PAD, endless, language_model, qwen2, random_model

SHORTEST = 16  #: of the mixed lengths, which go evenly up to the longest


@dataclass(frozen=True)
class Case:
    """prompt: tokens of each prompt. lengths: how far each row is written, samples of a prompt one after another."""

    name: str
    prompts: int
    samples: int
    prompt: int
    lengths: list[int]

    def requests(self, vocabulary: int) -> list[Request]:
        draw = random.Random(0)
        rows = []
        for slot in range(self.prompts):
            ids = [draw.randrange(2, vocabulary) for _ in range(self.prompt)]
            limits = self.lengths[slot * self.samples : (slot + 1) * self.samples]
            rows += [Request(ids, [], limit, (0, slot, sample)) for sample, limit in enumerate(limits)]
        return rows


def cases(prompts: int, samples: int, prompt: int, long_prompt: int, length: int) -> list[Case]:
    """Equal lengths, mixed lengths, and prompts long enough for their own forward pass to count."""
    rows, draw = prompts * samples, random.Random(0)
    mixed = [draw.randint(min(SHORTEST, length), length) for _ in range(rows)]
    return [
        Case("equal lengths", prompts, samples, prompt, [length] * rows),
        Case("mixed lengths", prompts, samples, prompt, mixed),
        Case("long prompts", prompts, samples, long_prompt, [length] * rows),
    ]


def writers(model: LanguageModel, case: Case, **options: Any) -> dict[str, Callable[[], object]]:
    """plain and ours. `options` go to the generator."""
    requests = case.requests(model.vocabulary)
    ids = torch.tensor([r.prompt_ids for r in requests], device=model.device)
    longest = max(case.lengths)
    settings = GenerationConfig(
        max_new_tokens=longest, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=PAD,
        eos_token_id=END, suppress_tokens=[PAD, END],
    )  # fmt: skip
    budget = len(requests) * (case.prompt + longest)
    generator = TransformersGenerator(
        model, endless(model.vocabulary), seed=0, stream="student", temperature=1.0, token_budget=budget, **options
    )

    def plain() -> None:
        with torch.no_grad(), generator.context():
            out = model.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        assert out.shape[1] == case.prompt + longest

    def ours() -> None:
        assert [len(response) for response in generator(requests)] == case.lengths

    return {"plain": plain, "ours": ours}


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    config = qwen2(args.vocabulary, hidden=args.hidden, layers=args.layers)
    model = language_model(random_model(config, seed=0).eval())
    for case in cases(args.prompts, args.samples, args.prompt, args.long_prompt, args.length):
        actions = writers(model, case)
        actions["ours"]()  # what is made once
        seconds = dict(zip(actions, alternating(list(actions.values()), args.repeats), strict=True))
        tokens = sum(case.lengths)
        yield {
            "case": case.name,
            "rows": len(case.lengths),
            "samples": case.samples,
            "prompt": case.prompt,
            "longest": max(case.lengths),
            "tokens": tokens,
            "vocabulary": args.vocabulary,
            "hidden": args.hidden,
            "layers": args.layers,
            "threads": torch.get_num_threads(),
            "cpu_seconds": seconds["ours"],
            "plain_cpu_seconds": seconds["plain"],
            "tokens_per_cpu_second": tokens / seconds["ours"],
            "plain_tokens_per_cpu_second": tokens / seconds["plain"],
            "speed_up": seconds["plain"] / seconds["ours"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--long-prompt", type=int, default=512)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "rollout.json")
    args = parser.parse_args()
    write_results(args.out, "rollout", measure(args))


if __name__ == "__main__":
    main()
