"""Scoring, update, rollout and credit loss at real sizes on one CUDA device: one command, no download.

    python -m tests.benchmarks.gpu
    python -m tests.benchmarks.gpu --tiny --device cpu        # the same code at toy sizes, in seconds, anywhere

Randomly initialised models of the shapes of Qwen2.5 1.5B (student, float32 masters, bfloat16 autocast) and 7B (teacher,
bfloat16). Four parts, one JSON object each or more:

    step          seconds and peak memory of scoring and of update (optimizer included) on responses of 8192 tokens, packed
    rollout       tokens per second of ours and of plain `generate`
    credit loss   from given hidden states: ours, the four bare products, and a loss on full log_softmax

MFU is the arithmetic the models need divided by what the device could have done meanwhile: FLOPs / (seconds x peak), with
2 FLOPs per weight and token of a forward pass, 2 x heads x head size x L^2 for the causal attention of a sequence of L
tokens per layer, the head at response tokens only, and an update three times the student's forward (recomputation does
not count as work). `--peak-tflops` is 989 unless given: dense bfloat16 of an H100 or H200 SXM.
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config

from tests.tiny import random_rollout
from tropd_cli.batching import row_lengths
from tropd_cli.memory import is_out_of_memory

from .credit_loss import fastest_bare, full, ours, random_heads
from .engine import Engine, planned, with_packing
from .process import RESULTS, Stages, write_results
from .rollout import Case, writers
from .shapes import qwen2, random_pair

PEAK_TFLOPS = 989.0  #: H100 and H200 SXM, dense bfloat16, from the vendor's data sheet


@dataclass(frozen=True)
class Sizes:
    """rows responses of `length` tokens; rollout: prompts x samples of so many tokens; credit_tokens: cases of the loss."""

    student: Qwen2Config
    teacher: Qwen2Config
    rows: int = 4
    length: int = 8192
    token_budget: int = 16384
    prompts: int = 8
    samples: int = 8
    prompt: int = 512
    written: int = 512
    credit_tokens: tuple[int, ...] = (8192, 16384, 32768)


FULL = Sizes(
    qwen2(151_936, hidden=1536, layers=28, ffn=8960, heads=12, key_value_heads=2),
    qwen2(152_064, hidden=3584, layers=28, ffn=18944, heads=28, key_value_heads=4, tied=False),
)
TINY = Sizes(
    qwen2(1000, hidden=64, layers=2), qwen2(1010, hidden=128, layers=2, tied=False),
    rows=3, length=48, token_budget=96, prompts=2, samples=2, prompt=8, written=8, credit_tokens=(64,),
)  # fmt: skip


def forward_flops(config: Qwen2Config, lengths: list[int], response_tokens: int) -> float:
    """Of one forward pass over sequences of these lengths, logits at the response tokens only."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head_size = hidden // config.num_attention_heads
    keys = config.num_key_value_heads * head_size
    weights = config.num_hidden_layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner)
    attention = config.num_hidden_layers * sum(2 * hidden * length**2 for length in lengths)
    return 2.0 * weights * sum(lengths) + attention + 2.0 * hidden * config.vocab_size * response_tokens


def timed(action: Callable[[], object], device: str) -> dict[str, Any]:
    """Seconds, and peak bytes: allocated by tensors on a GPU; on a CPU what resident memory grew by."""
    gc.collect()
    if device == "cpu":
        stages = Stages()
        stages.begin("it")
        action()
        stages.end("it")
        return {"seconds": stages.done["it"].seconds, "peak_bytes": stages.done["it"].growth}
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start, "peak_bytes": torch.cuda.max_memory_allocated()}


def timed_if_it_fits(action: Callable[[], object], device: str) -> dict[str, Any]:
    """Running out of memory is a result."""
    try:
        action()  # warm
        return timed(action, device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return {"seconds": None, "peak_bytes": None, "out_of_memory": True}


# ── the parts ───────────────────────────────────────────────────────────────────────────────────────────────────────


def step_case(engine: Engine, sizes: Sizes, device: str, peak_tflops: float | None) -> dict[str, Any]:
    """Scoring of all micro-batches, then update of all, as in training; the second of two steps."""
    rollout = random_rollout([sizes.length] * sizes.rows, vocabulary=sizes.student.vocab_size)
    plan = planned(rollout, sizes.token_budget, packed=True)
    batches = plan.batches(rollout, engine.student.device)
    optimizer = torch.optim.AdamW(engine.module.parameters(), lr=1e-6)
    tokens = sum(map(len, batches))
    scores: list[Any] = []

    def score() -> None:
        scores[:] = [engine.score(batch) for batch in batches]

    def update() -> None:
        for batch, its_scores in zip(batches, scores, strict=True):
            engine.update(batch, its_scores, tokens)
        optimizer.step()
        engine.forget_gradient()

    score()
    update()
    lengths = row_lengths(rollout)
    work = {
        "score": forward_flops(sizes.teacher, lengths, tokens),
        "update": 3 * forward_flops(sizes.student, lengths, tokens),
    }
    result: dict[str, Any] = {"part": "step", "rows": sizes.rows, "length": sizes.length, "tokens": tokens}
    result |= {"micro_batches": len(batches), "peak_tflops": peak_tflops}
    for name, action in (("score", score), ("update", update)):
        found = timed(action, device)
        found |= {"tokens_per_second": tokens / found["seconds"], "flops": work[name]}
        found["mfu"] = work[name] / (found["seconds"] * peak_tflops * 1e12) if peak_tflops else None
        result[name] = found
    return result


def rollout_cases(engine: Engine, sizes: Sizes, device: str) -> Iterator[dict[str, Any]]:
    """Ours and plain `generate`, the student under autocast as in training."""
    case = Case(
        "equal lengths", sizes.prompts, sizes.samples, sizes.prompt, [sizes.written] * sizes.prompts * sizes.samples
    )
    for name, action in writers(engine.student, case, context=engine.context).items():
        found = timed(action, device)
        rate = sum(case.lengths) / found["seconds"]
        shape = {"rows": len(case.lengths), "prompt": sizes.prompt, "length": sizes.written}
        yield {"part": "rollout", "who": name, **shape, **found, "tokens_per_second": rate}


def credit_loss_cases(sizes: Sizes, device: str) -> Iterator[dict[str, Any]]:
    vocabulary, hidden = sizes.student.vocab_size, sizes.student.hidden_size
    for count in sizes.credit_tokens:
        heads = random_heads(
            count, vocabulary, hidden, teacher_hidden=sizes.teacher.hidden_size, device=device, compute=torch.bfloat16
        )
        _, products = fastest_bare(heads, lambda action: timed(action, device)["seconds"])
        actions = {
            "ours": ours(heads, "trust-region"),
            "bare products": products,
            "full log_softmax": full(heads, 64),
        }
        for name, action in actions.items():
            found = timed_if_it_fits(action, device)
            heads.forget_gradient()
            yield {"part": "credit loss", "who": name, "tokens": count, "vocabulary": vocabulary, **found}


def measure(sizes: Sizes, device: str, peak_tflops: float | None, *, checkpointing: bool) -> Iterator[dict[str, Any]]:
    pair = random_pair(sizes.student, sizes.teacher, device=device, teacher_dtype=torch.bfloat16)
    context = functools.partial(torch.autocast, device, dtype=torch.bfloat16)
    engine = with_packing(Engine(*pair, context=context))
    del pair
    yield from rollout_cases(engine, sizes, device)
    if checkpointing:
        engine.student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    yield step_case(engine, sizes, device, peak_tflops) | {"gradient_checkpointing": checkpointing}
    del engine
    yield from credit_loss_cases(sizes, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="for devices of less than 80 GB")
    parser.add_argument(
        "--peak-tflops", type=float, help=f"of the device, for MFU (default: {PEAK_TFLOPS:g}; none on a CPU)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "no CUDA device here: run this on a machine with one (80 GB for the full sizes). "
            "To see that it works: python -m tests.benchmarks.gpu --tiny --device cpu"
        )
    if args.device == "cpu" and not args.tiny:
        raise SystemExit("the full sizes need a GPU; on a CPU add --tiny")
    peak = args.peak_tflops or (PEAK_TFLOPS if args.device == "cuda" else None)
    cases = measure(TINY if args.tiny else FULL, args.device, peak, checkpointing=args.gradient_checkpointing)
    write_results(args.out, "gpu", cases)


if __name__ == "__main__":
    main()
