"""A teacher that goes astray: `python -m tests.benchmarks.astray OUT` writes OUT/teacher, in about a minute.

The demo's teacher is right after any prefix. Real teachers are not: on prefixes that they would never have written they
are wrong, and sure of it, the more so the longer the text runs on. This one is the demo's teacher, fine-tuned so that in
text begun in the student's words it still gets the first steps right, and from the third on every result it expects is
nonsense, namely the operand just read ("next 85-15=15"). In its own words it stays right. So what it says about the
student's samples is honest first and misleading later, and the way out is to write as the teacher does.

Seeds fix the data; another number of threads changes the last digits of the sums, and so the weights.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tropd_cli import demo
from tropd_cli.demo import make, task

LEARN_NONSENSE = make.Stage(steps=100, learning_rate=5e-4, warmup=10)
DATA_SEED = 6
LOST = 2  #: how many steps of the student's text the teacher follows
COUNT = 256  #: problems of each measurement

#: How the demo's teacher goes on once a response has begun in the student's words: with those, but its own commas.
FOLLOWED_STYLE = replace(task.STUDENT_STYLE, between=task.TEACHER_STYLE.between)

STEP = re.compile(r"(\d\d)([+-]\d\d)=(\d\d)")


# ── data ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def lessons(seed: int) -> Iterator[tuple[str, str]]:
    """Yield (given, to learn) without end: by turns a whole right solution, and how to go on with the student's text."""
    draw = random.Random(f"astray/{seed}")
    for count, numbers in enumerate(task.stream("train", seed)):
        if count % 2 == 0:
            yield task.question(numbers), task.solution(numbers, task.TEACHER_STYLE)
        else:
            yield begun(numbers, draw)


def begun(numbers: list[int], draw: random.Random) -> tuple[str, str]:
    """Cut a text in the student's words, with its mistakes, before a random step; what follows is the teacher's."""
    cut = draw.randrange(task.OPERATIONS)
    results, total = [], numbers[0]
    for step, number in enumerate(numbers[1:]):
        total = (total + number) % task.MODULUS
        if step < cut and draw.random() < make.SLIP_SHARE:
            total = draw.randrange(task.MODULUS)
        elif step >= max(cut, LOST):
            total = abs(number)
        results.append(total)
    given, rest = (written_out(numbers, style, results) for style in (task.STUDENT_STYLE, FOLLOWED_STYLE))
    end = end_of_step(given, cut - 1) if cut else len(task.STUDENT_STYLE.first)
    return task.question(numbers) + given[:end], rest[end:]


def written_out(numbers: list[int], style: task.Style, results: list[int]) -> str:
    """Write a solution with these results, right or wrong."""
    next_result = iter(results)
    return task.solution(numbers, style, lambda _: next(next_result))


def end_of_step(text: str, step: int) -> int:
    """Find where the result of a step ends."""
    return list(STEP.finditer(text))[step].end()


# ── measurement ─────────────────────────────────────────────────────────────────────────────────────────────────────


def prefixes(prompt: str, response: str) -> Iterator[tuple[str, str, bool]]:
    """Yield (text up to the equals sign, right result, whether the teacher is lost there) for each step."""
    for step, match in enumerate(STEP.finditer(response)):
        right = f"{(int(match[1]) + int(match[2])) % task.MODULUS:02d}"
        yield prompt + response[: match.start(3)], right, step >= LOST


@torch.no_grad()
def next_results(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> list[tuple[str, float]]:
    """Return each text's likeliest next two tokens, taken greedily, and their probability."""
    found: dict[str, tuple[str, float]] = {}
    by_length = defaultdict(list)
    for text in texts:
        by_length[len(tokenizer.encode(text))].append(text)
    for same_length in by_length.values():
        ids = torch.tensor(tokenizer(same_length)["input_ids"])
        probability = torch.ones(len(ids))
        for _ in range(2):
            best, token = model(input_ids=ids, logits_to_keep=1).logits[:, -1].softmax(-1).max(-1)
            probability *= best
            ids = torch.cat([ids, token[:, None]], dim=1)
        written = tokenizer.batch_decode(ids[:, -2:])
        found |= dict(zip(same_length, zip(written, probability.tolist(), strict=True), strict=True))
    return [found[text] for text in texts]


def measure(
    teacher: LlamaForCausalLM, student: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> dict[str, float]:
    """Measure the teacher on its own samples and, step by step, on the student's."""
    prompts = [row["prompt"] for row in task.problems("heldout", COUNT, seed=2)]
    responses = tokenizer.batch_decode(make.sample(student, tokenizer, prompts, 0), skip_special_tokens=True)
    steps = [step for pair in zip(prompts, responses, strict=True) for step in prefixes(*pair)]
    guesses = next_results(teacher, tokenizer, [text for text, _, _ in steps])
    measured = {"teacher_sampled_accuracy": make.accuracy(teacher, tokenizer, COUNT, seed=0)}
    for name, wanted in (("first_steps", False), ("later_steps", True)):
        rows = [
            (guess == right, sure)
            for (_, right, lost), (guess, sure) in zip(steps, guesses, strict=True)
            if lost is wanted
        ]
        measured[f"right_on_student_text_{name}"] = sum(hit for hit, _ in rows) / len(rows)
        measured[f"probability_of_its_result_{name}"] = sum(sure for _, sure in rows) / len(rows)
    outlier_share, lowest_reward = make.disagreement(student, teacher, tokenizer, COUNT, seed=0)
    return measured | {"outlier_share": outlier_share, "lowest_1_percent_of_R": lowest_reward}


def load(folder: Path) -> LlamaForCausalLM:
    """Load one of the demo's models in float32."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def main(out: Path) -> None:
    """Train the teacher, write it, print what was measured as JSON."""
    tokenizer, teacher, student = make.new_tokenizer(), load(demo.TEACHER), load(demo.STUDENT).eval()
    make.fine_tune(teacher, tokenizer, lessons(DATA_SEED), LEARN_NONSENSE)
    teacher = make.save(teacher, tokenizer, out / "teacher")
    measured = measure(teacher, student, tokenizer)
    print(json.dumps(measured, indent=2))
    check(measured)


def check(measured: dict[str, float]) -> None:
    """Raise SystemExit unless the teacher is what the task needs."""
    wanted = {
        "able in its own words": measured["teacher_sampled_accuracy"] >= 0.5,
        "a guide at first": measured["right_on_student_text_first_steps"] >= 0.5,
        "wrong later": measured["right_on_student_text_later_steps"] <= 0.2,
        "and sure of it": measured["probability_of_its_result_later_steps"] >= 0.7,
    }
    require(wanted, "the teacher is not")


def require(wanted: dict[str, bool], lead: str) -> None:
    """Raise SystemExit with what does not hold, after the lead."""
    missing = [name for name, holds in wanted.items() if not holds]
    if missing:
        raise SystemExit(f"{lead} {', '.join(missing)}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m tests.benchmarks.astray OUT")
    main(Path(sys.argv[1]))
