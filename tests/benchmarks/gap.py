"""A capacity gap: `python -m tests.benchmarks.gap OUT` writes two models and two files of prompts to OUT.

Chains of eight sums and differences, twice as long as the demo's, so that there is time to drift. The student has an
eighth of the teacher's weights; trained on the teacher's kind of text from the start, for 2000 steps, it does not become
as good. It writes in the teacher's words, slips, and has a habit that the teacher never has: in a share of the places
between two steps it writes "; " instead of ", ". The teacher is right in its own words, after wrong results too; but once
the habit has appeared, every result it expects is the operand just read ("then 85-15=15"), and it is sure of it. So what
the teacher wishes at the habit is something the student mostly writes by itself, what the teacher says is honest up to
the habit and misleading after it, and the way out is to lose the habit.

Takes about twelve CPU-minutes. Seeds fix data and initial weights, and one thread the order of the sums.
"""

from __future__ import annotations

import copy
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tropd_cli import demo
from tropd_cli.demo import make, task

from .astray import STEP, end_of_step, load, next_results, require, written_out
from .rows import TASKS

#: Operands are small, or two narrow layers would take hours to learn to add; a well-formed response has 88 tokens.
CHAIN = task.Chain(operations=8, below=30, most_tokens=TASKS["gap"].own["max_response_length"])
STUDENT_LAYERS, STUDENT_WIDTH = 2, 48

OWN, HABIT = task.TEACHER_STYLE.between, task.STUDENT_STYLE.between
HABIT_SHARE = 0.2  #: of the places between two steps, in the student's text
#: Of the results in the student's text, and in what the teacher learns to go on with.
STUDENT_SLIPS, LESSON_SLIPS = 0.01, 0.1

LEARN_THE_TASK = make.Stage(steps=2000, learning_rate=3e-3, warmup=100, batch=64)
SETTLE = make.Stage(steps=400, learning_rate=2e-3, warmup=20, batch=64)
LEARN_TO_STRAY = make.Stage(steps=250, learning_rate=1e-3, warmup=10)
TASK_SEED, SETTLE_SEED, LESSON_SEED = 7, 8, 9

COUNT = 256  #: problems of each measurement
PROMPTS = {"train": 4096, "heldout": 192}  #: problems in each of the two files


# ── data ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def habitual(seed: int) -> Iterator[tuple[str, str]]:
    """Yield prompts and responses as the student is to write them: with slips, and with the habit here and there."""
    draw = random.Random(f"habit/{seed}")
    for prompt, response in make.texts("train", seed, task.TEACHER_STYLE, STUDENT_SLIPS, CHAIN):
        yield prompt, parted(response, [draw.random() < HABIT_SHARE for _ in range(CHAIN.operations - 1)])


def lessons(seed: int) -> Iterator[tuple[str, str]]:
    """Yield (given, to learn) without end: by turns a whole right solution, and how to go on with the student's text."""
    draw = random.Random(f"lessons/{seed}")
    for count, numbers in enumerate(task.stream("train", seed, CHAIN)):
        if count % 2 == 0:
            yield task.question(numbers), task.solution(numbers, task.TEACHER_STYLE)
        else:
            yield begun(numbers, draw)


def begun(numbers: list[int], draw: random.Random) -> tuple[str, str]:
    """Cut a text like the student's between two steps; the rest is the teacher's, right unless the habit has appeared."""
    cut = draw.randrange(1, CHAIN.operations)
    habits = [place < cut and draw.random() < HABIT_SHARE for place in range(CHAIN.operations - 1)]
    results, total = [], numbers[0]
    for step, number in enumerate(numbers[1:]):
        total = (total + number) % task.MODULUS
        if step < cut and draw.random() < LESSON_SLIPS:
            total = draw.randrange(task.MODULUS)
        elif step >= cut and any(habits):
            total = abs(number)
        results.append(total)
    text = parted(written_out(numbers, task.TEACHER_STYLE, results), habits)
    end = end_of_step(text, cut - 1) + len(OWN)
    return task.question(numbers) + text[:end], text[end:]


def parted(text: str, habits: list[bool]) -> str:
    """Put the habit's mark in those places between two steps for which `habits` says so."""
    next_one = iter(habits)
    return re.sub(OWN, lambda _: HABIT if next(next_one) else OWN, text)


# ── measurement ─────────────────────────────────────────────────────────────────────────────────────────────────────


def prefixes(prompt: str, response: str) -> Iterator[tuple[str, str, bool]]:
    """Yield (text up to the equals sign, right result, whether the habit has appeared) for each step."""
    for match in STEP.finditer(response):
        right = f"{(int(match[1]) + int(match[2])) % task.MODULUS:02d}"
        before = response[: match.start(3)]
        yield prompt + before, right, HABIT in before


def measure(
    teacher: LlamaForCausalLM, student: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> dict[str, float]:
    """Measure both on their own samples, and the teacher step by step on the student's."""
    prompts = [row["prompt"] for row in task.problems("heldout", COUNT, 2, CHAIN)]
    responses = make.sample(student, tokenizer, prompts, 0, CHAIN.most_tokens)
    written = tokenizer.batch_decode(responses, skip_special_tokens=True)
    steps = [step for pair in zip(prompts, written, strict=True) for step in prefixes(*pair)]
    guesses = next_results(teacher, tokenizer, [text for text, _, _ in steps])
    measured = {
        "teacher_sampled_accuracy": solved(teacher, tokenizer),
        "student_sampled_accuracy": solved(student, tokenizer),
    }
    for name, wanted in (("before_the_habit", False), ("after_the_habit", True)):
        rows = [
            (guess == right, sure)
            for (_, right, after), (guess, sure) in zip(steps, guesses, strict=True)
            if after is wanted
        ]
        measured[f"right_{name}"] = sum(hit for hit, _ in rows) / len(rows)
        measured[f"probability_of_its_result_{name}"] = sum(sure for _, sure in rows) / len(rows)
    reward, wish = make.compare(student, teacher, tokenizer, prompts, responses)
    rejected = 1 - reward.exp().clamp(max=1)
    outliers = torch.rand(len(reward), generator=torch.Generator().manual_seed(0)) < rejected
    return measured | {
        "outlier_share": rejected.mean().item(),
        "lowest_1_percent_of_R": reward.quantile(0.01).item(),
        "median_log_q_of_the_teacher_s_choice_at_outliers": wish[outliers].median().item(),
    }


def solved(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Measure the share of held-out problems solved by one sample each."""
    return make.accuracy(model, tokenizer, COUNT, 0, CHAIN)


# ── command ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def main(out: Path) -> None:
    """Train both models, write them and the prompts, print what was measured as JSON."""
    torch.set_num_threads(1)
    tokenizer = make.new_tokenizer()
    small = make.new_model(tokenizer, STUDENT_LAYERS, STUDENT_WIDTH)
    make.fine_tune(small, tokenizer, make.texts("train", TASK_SEED, task.TEACHER_STYLE, chain=CHAIN), LEARN_THE_TASK)
    student, teacher = copy.deepcopy(small), load(demo.TEACHER)
    make.fine_tune(student, tokenizer, habitual(SETTLE_SEED), SETTLE)
    make.fine_tune(teacher, tokenizer, lessons(LESSON_SEED), LEARN_TO_STRAY)
    student = make.save(student, tokenizer, out / "student")
    teacher = make.save(teacher, tokenizer, out / "teacher")
    for split, count in PROMPTS.items():
        write_prompts(out / f"{split}.jsonl", split, count)
    measured = measure(teacher, student, tokenizer) | {"small_model_on_the_teacher_s_text": solved(small, tokenizer)}
    print(json.dumps(measured, indent=2))
    check(measured)


def write_prompts(file: Path, split: str, count: int) -> None:
    """Write the problems of a split with their answers, one JSON object a line."""
    rows = ({key: row[key] for key in ("prompt", "answer")} for row in task.problems(split, count, 0, CHAIN))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def check(measured: dict[str, float]) -> None:
    """Raise SystemExit unless the models are what the task needs."""
    start, best = measured["student_sampled_accuracy"], measured["small_model_on_the_teacher_s_text"]
    wanted = {
        "a teacher able in its own words": measured["teacher_sampled_accuracy"] >= 0.9,
        "a teacher right before the habit": measured["right_before_the_habit"] >= 0.8,
        "a teacher wrong after it": measured["right_after_the_habit"] <= 0.2,
        "a teacher sure of what is wrong": measured["probability_of_its_result_after_the_habit"] >= 0.7,
        "a student weak but not hopeless": 0.15 <= start <= 0.4,
        "a student that can improve": best >= start + 0.15,
        "a gap that training does not close": best <= measured["teacher_sampled_accuracy"] - 0.05,
        "outliers, but not everywhere": 0.1 <= measured["outlier_share"] <= 0.45,
        "strong disagreement": measured["lowest_1_percent_of_R"] <= -6,
        "a teacher's choice within the student's reach": measured["median_log_q_of_the_teacher_s_choice_at_outliers"]
        > -8,
    }
    require(wanted, "the models lack:")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m tests.benchmarks.gap OUT")
    main(Path(sys.argv[1]))
