"""`--dry-run`: the resolved configuration, the first prompt as both models see it, checks, and an estimate."""

from __future__ import annotations

from .config import Config, build_strategy, to_yaml
from .data import load_prompts
from .display import Display
from .pair import Pair, load_pair
from .scoring import CHUNK_BYTES


def dry_run(config: Config, display: Display) -> None:
    """Loads and checks everything a run would, and says what it would cost. Trains and writes nothing."""
    display.note(to_yaml(config))
    strategy = build_strategy(config)
    pair = load_pair(config, strategy.needs)
    display.note(
        f"tokenizers agree on {int(pair.vocabulary.allowed.sum())} tokens; stop ids {list(pair.vocabulary.stop_ids)}"
    )
    for label, source in (("data", config.data), ("eval_data", config.eval_data)):
        if source is None:
            continue
        prompts, problems = load_prompts(source, pair.prompt_format, skip_bad_rows=config.skip_bad_rows)
        display.note(f"{label}: {len(prompts)} prompts" + (f", {len(problems)} bad rows skipped" if problems else ""))
        if label == "data":
            first = prompts[0]
            display.note(f"first prompt, student ({len(first.ids)} tokens): {pair.tokenizer.decode(first.ids)!r}")
            display.note(
                f"first prompt, teacher ({len(first.teacher_ids)} tokens): {pair.tokenizer.decode(first.teacher_ids)!r}"
            )
    for line in estimate(config, pair):
        display.note(line)
    display.note("dry run: nothing was trained or written")


def estimate(config: Config, pair: Pair) -> list[str]:
    """Memory and work of one step, from parameter counts and lengths at their maximum."""
    trained = sum(p.numel() for p in pair.student.model.parameters() if p.requires_grad)
    student = sum(p.numel() * p.element_size() for p in pair.student.model.parameters())
    teacher = sum(p.numel() * p.element_size() for p in pair.teacher.model.parameters())
    rows = config.prompts_per_step * config.rollouts_per_prompt
    tokens = rows * config.max_response_length
    count_s = sum(p.numel() for p in pair.student.model.parameters())
    count_t = sum(p.numel() for p in pair.teacher.model.parameters())
    flops = 2 * tokens * (count_s + count_t + 3 * count_s)
    chunk = CHUNK_BYTES.get(pair.device.type, CHUNK_BYTES["cuda"])
    return [
        f"memory beside activations: student {_size(student)}, gradients and AdamW {_size(12 * trained)}, teacher {_size(teacher)}, "
        f"chunks of the loss {_size(3 * chunk)}",
        f"one step: {rows} responses of at most {config.max_response_length} tokens, at most {flops:.2g} floating-point operations "
        f"({config.steps} steps: {flops * config.steps:.2g})",
    ]


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
