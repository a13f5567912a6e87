"""Make the demo's tokenizer, teacher and student from nothing: `python -m tropd_cli.demo.make OUT`.

One network learns the task from right solutions, then to write them in either of two styles. The teacher is that
network settled on its own style; the student is the same network settled on the other one, from solutions in which 12 %
of the intermediate results are random. So the student can be taught quickly, and yet disagrees with the teacher.

Takes about 15 minutes on two idle cores. Measured on held-out problems, after rounding the weights to bfloat16: the
teacher solves 99.2 % by sampling at temperature 1 (512 problems) and all of them greedily; the student 25.9 % by
sampling (1024) and 98.2 % greedily: it knows how, but slips. On the student's own samples (256) the outlier share is
0.20 and the lowest 1 % of R = log p(x) - log q(x) lies at -28.5 nats. Seeds fix data and initial weights; another number
of threads adds in another order, and so ends with slightly different weights.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tropd_cli.demo import task

SEED = 20
BATCH = 128


@dataclass(frozen=True)
class Stage:
    """One run of supervised fine-tuning; warm-up and steps in batches of `batch` texts."""

    steps: int
    learning_rate: float
    warmup: int
    batch: int = BATCH


LEARN_THE_TASK = Stage(steps=2000, learning_rate=2e-3, warmup=100)
LEARN_BOTH_STYLES = Stage(steps=300, learning_rate=1e-3, warmup=20)
SETTLE_ON_ONE = Stage(steps=60, learning_rate=5e-4, warmup=10)
SLIP_SHARE = 0.12  # of the intermediate results the student learns from


def new_model(tokenizer: PreTrainedTokenizerFast, layers: int = 3, width: int = 128) -> LlamaForCausalLM:
    """Make the untrained model: three layers of width 128, about 0.5 million weights, unless it is to be smaller."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Wrap the task's tokenizer for transformers."""
    return PreTrainedTokenizerFast(
        tokenizer_object=task.build_tokenizer(),
        pad_token=task.PAD,
        eos_token=task.EOS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=256,
    )


def texts(
    split: str, seed: int, style: task.Style, slip_share: float = 0.0, chain: task.Chain = task.DEMO_CHAIN
) -> Iterator[tuple[str, str]]:
    """Yield prompts and responses without end; each step's result is replaced by a random one with `slip_share`."""
    draw = random.Random(f"slips/{seed}")

    def slip(result: int) -> int:
        return draw.randrange(task.MODULUS) if draw.random() < slip_share else result

    for numbers in task.stream(split, seed, chain):
        yield task.question(numbers), task.solution(numbers, style, slip)


def alternate(*streams: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield from each stream in turn."""
    for items in zip(*streams, strict=True):
        yield from items


def fine_tune(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Iterator[tuple[str, str]],
    stage: Stage,
) -> None:
    """Train on responses (not on prompts) with AdamW, a linear warm-up and a linear decay to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    decay = stage.steps - stage.warmup
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / stage.warmup, (stage.steps - step) / decay)
    )
    model.train()
    for step in range(1, stage.steps + 1):
        ids, labels = encode(tokenizer, [next(pairs) for _ in range(stage.batch)])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step} of {stage.steps}  loss {loss.item():.4f}", file=sys.stderr)
    model.eval()


def encode(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Return token ids [B, T], padded on the right, and labels [B, T], -100 on prompts and padding."""
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    responses = tokenizer([response + task.EOS for _, response in pairs])["input_ids"]
    rows = [(torch.tensor(left), torch.tensor(right)) for left, right in zip(prompts, responses, strict=True)]
    ids = [torch.cat([left, right]) for left, right in rows]
    labels = [torch.cat([torch.full_like(left, -100), right]) for left, right in rows]
    return (
        pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
        pad_sequence(labels, batch_first=True, padding_value=-100),
    )


@torch.no_grad()
def sample(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    seed: int | None,
    most_tokens: int = task.DEMO_CHAIN.most_tokens,
) -> Tensor:
    """Return response ids [B, T], padded after the end token: sampled at temperature 1, or greedy without a seed."""
    random_numbers = None if seed is None else torch.Generator().manual_seed(seed)
    ids = torch.tensor(tokenizer(prompts)["input_ids"])
    done = torch.zeros(len(prompts), dtype=torch.bool)
    cache, responses = DynamicCache(config=model.config), []
    while len(responses) < most_tokens and not done.all():
        logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        if random_numbers is None:
            token = logits.argmax(-1)
        else:
            token = torch.multinomial(logits.softmax(-1), 1, generator=random_numbers).squeeze(-1)
        responses.append(token.masked_fill(done, tokenizer.pad_token_id))
        done |= token == tokenizer.eos_token_id
        ids = responses[-1][:, None]
    return torch.stack(responses, dim=1)


def accuracy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    count: int,
    seed: int | None,
    chain: task.Chain = task.DEMO_CHAIN,
) -> float:
    """Measure the share of `count` held-out problems solved by one sample each, or greedily without a seed."""
    rows = task.problems("heldout", count, 0, chain)
    responses = sample(model, tokenizer, [row["prompt"] for row in rows], seed, chain.most_tokens)
    texts_ = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return sum(task.is_correct(text, row["answer"]) for text, row in zip(texts_, rows, strict=True)) / count


def disagreement(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, seed: int
) -> tuple[float, float]:
    """Measure, on the student's own samples, the outlier share and the lowest 1 % quantile of log p(x) - log q(x)."""
    prompts = [row["prompt"] for row in task.problems("heldout", count, seed=1)]
    responses = sample(student, tokenizer, prompts, seed)
    reward, _ = compare(student, teacher, tokenizer, prompts, responses)
    return (1 - reward.exp().clamp(max=1)).mean().item(), reward.quantile(0.01).item()


@torch.no_grad()
def compare(
    student: LlamaForCausalLM,
    teacher: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    responses: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return, for each response token in one row, log p(x) - log q(x) and the student's log q of the teacher's choice."""
    ids = torch.cat([torch.tensor(tokenizer(prompts)["input_ids"]), responses], dim=1)
    start = ids.shape[1] - responses.shape[1]
    student_logprobs, teacher_logprobs = (
        model(input_ids=ids[:, :-1]).logits[:, start - 1 :].log_softmax(-1) for model in (student, teacher)
    )
    reward = (teacher_logprobs - student_logprobs).gather(-1, responses[..., None]).squeeze(-1)
    wish = student_logprobs.gather(-1, teacher_logprobs.argmax(-1, keepdim=True)).squeeze(-1)
    ended = (responses == tokenizer.eos_token_id).cumsum(1) - (responses == tokenizer.eos_token_id).long()
    return reward[ended == 0], wish[ended == 0]


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> LlamaForCausalLM:
    """Write a Hugging Face folder in bfloat16 and load it again in float32, so that what is measured is what ships."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def main(out: Path) -> None:
    """Train both models, write OUT/teacher and OUT/student, print what was measured as JSON."""
    started = time.monotonic()
    tokenizer = new_tokenizer()

    base = new_model(tokenizer)
    fine_tune(base, tokenizer, texts("train", 1, task.TEACHER_STYLE), LEARN_THE_TASK)
    both = alternate(texts("train", 2, task.TEACHER_STYLE), texts("train", 3, task.STUDENT_STYLE))
    fine_tune(base, tokenizer, both, LEARN_BOTH_STYLES)

    teacher, student = copy.deepcopy(base), copy.deepcopy(base)
    fine_tune(teacher, tokenizer, texts("train", 4, task.TEACHER_STYLE), SETTLE_ON_ONE)
    fine_tune(student, tokenizer, texts("train", 5, task.STUDENT_STYLE, SLIP_SHARE), SETTLE_ON_ONE)
    teacher = save(teacher, tokenizer, out / "teacher")
    student = save(student, tokenizer, out / "student")

    outlier_share, lowest_reward = disagreement(student, teacher, tokenizer, count=256, seed=0)
    measured = {
        "teacher_sampled_accuracy": accuracy(teacher, tokenizer, count=1024, seed=0),
        "teacher_greedy_accuracy": accuracy(teacher, tokenizer, count=1024, seed=None),
        "student_sampled_accuracy": accuracy(student, tokenizer, count=1024, seed=0),
        "student_greedy_accuracy": accuracy(student, tokenizer, count=1024, seed=None),
        "outlier_share": outlier_share,
        "lowest_1_percent_of_R": lowest_reward,
        "seconds": time.monotonic() - started,
    }
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m tropd_cli.demo.make OUT")
    main(Path(sys.argv[1]))
