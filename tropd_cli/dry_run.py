"""`--dry-run`: the resolved configuration, the first prompt as both models see it, checks, and an estimate."""

from __future__ import annotations

import time
from typing import Any

import torch

from .config import Config, build_strategy, to_yaml
from .data import load_prompts
from .display import Display
from .models import LanguageModel
from .pair import Pair, load_pair
from .scoring import rows_of_block, rows_of_chunk

#: Tokens of the forward pass that is timed.
TIMED_TOKENS = 256


def dry_run(config: Config, display: Display) -> dict[str, Any]:
    """Loads and checks everything a run would, and says what it would cost. Trains and writes nothing.

    Returns:
        The estimate: bytes of memory and seconds of one step.
    """
    display.note(to_yaml(config))
    pair = load_pair(config, build_strategy(config).needs)
    shared = int(pair.vocabulary.allowed.sum())
    display.note(f"tokenizers agree on {shared} tokens; stop ids {list(pair.vocabulary.stop_ids)}")
    for label, source in (("data", config.data), ("eval_data", config.eval_data)):
        if source is None:
            continue
        prompts, problems = load_prompts(source, pair.prompt_format, skip_bad_rows=config.skip_bad_rows)
        display.note(f"{label}: {len(prompts)} prompts" + (f", {len(problems)} bad rows skipped" if problems else ""))
        if label == "data":
            for role, ids in (("student", prompts[0].ids), ("teacher", prompts[0].teacher_ids)):
                display.note(f"first prompt, {role} ({len(ids)} tokens): {pair.tokenizer.decode(ids)!r}")
    estimate = estimated_cost(config, pair)
    display.note(
        f"memory beside activations and KV cache: student {_size(estimate['student_bytes'])}, gradients and AdamW "
        f"{_size(estimate['training_bytes'])}, teacher {_size(estimate['teacher_bytes'])}, loss chunks {_size(estimate['chunk_bytes'])}"
    )
    display.note(
        f"time: about {estimate['seconds_per_step']:.3g} s for a step of {estimate['tokens_per_step']} tokens, "
        f"{config.steps * estimate['seconds_per_step'] / 3600:.2g} h in all, from one timed forward of each model and "
        "responses of full length; sampling token by token may take several times its share"
    )
    display.note("dry run: nothing was trained or written")
    return estimate


def estimated_cost(config: Config, pair: Pair) -> dict[str, Any]:
    """Bytes of one process from parameter counts; seconds from timed forwards: one for sampling and three for the update (forward and
    backward) of the student, one of the teacher."""
    parameters = list(pair.student.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    tokens = config.prompts_per_step * config.rollouts_per_prompt * config.max_response_length
    per_token = (4 * seconds_per_forward(pair.student) + seconds_per_forward(pair.teacher)) / TIMED_TOKENS
    pieces = 1 if config.shard == "none" else config.num_processes
    width, device = pair.student.vocabulary, pair.device
    chunk_rows = rows_of_chunk(width, device, config.chunk_tokens) + rows_of_block(width, device)
    return {
        "student_bytes": sum(p.numel() * p.element_size() for p in parameters) // pieces,
        "training_bytes": 12 * trained // pieces,
        "teacher_bytes": sum(p.numel() * p.element_size() for p in pair.teacher.model.parameters()) // pieces,
        "chunk_bytes": chunk_rows * width * 4,
        "tokens_per_step": tokens,
        "seconds_per_step": tokens * per_token,
    }


@torch.no_grad()
def seconds_per_forward(language_model: LanguageModel) -> float:
    """Wall time of the second of two forwards of the backbone over TIMED_TOKENS tokens."""
    length = min(TIMED_TOKENS, language_model.context_length or TIMED_TOKENS)
    ids = torch.ones(1, length, dtype=torch.int64, device=language_model.device)
    for _ in range(2):
        started = time.perf_counter()
        language_model.backbone(input_ids=ids, use_cache=False)
        if language_model.device.type == "cuda":
            torch.cuda.synchronize(language_model.device)
    return (time.perf_counter() - started) * TIMED_TOKENS / length


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
