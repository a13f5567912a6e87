"""One model on one task: prompts -> samples in batches -> verdicts and divergences, row by row -> a result.

The batches are planned over all samples, whatever is done already, and an unfinished one is made again whole: so a sample
meets the same batch, and comes out the same to the last bit, however often the work was interrupted. With several
processes each takes every n-th batch, and the first one writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from tropd_cli.batching import plan_micro_batches
from tropd_cli.data import Prompt
from tropd_cli.dealing import in_rounds, mine
from tropd_cli.display import Display
from tropd_cli.errors import UserError
from tropd_cli.grading import SCHEMA, Completion, Graded, grade, summarize
from tropd_cli.heldout import given_rollout
from tropd_cli.memory import with_smaller_batches
from tropd_cli.pair import Pair
from tropd_cli.prefixes import encode_response
from tropd_cli.progress import WorkProgress
from tropd_cli.rollout import Request, TransformersGenerator
from tropd_cli.session import MICRO_BATCH_TOKENS, ROLLOUT_BATCH_TOKENS

from .divergences import averages, row_divergences
from .samples import Row, SampleFile
from .subject import Subject
from .tasks import Item, Task


@dataclass
class Evaluation:
    """What one model's tasks share."""

    subject: Subject
    pair: Pair
    accelerator: Accelerator
    display: Display
    divergence: bool

    @property
    def rollout_tokens(self) -> int:
        return self.subject.config.rollout_batch_tokens or ROLLOUT_BATCH_TOKENS.get(self.pair.device.type, 32768)

    @property
    def micro_batch_tokens(self) -> int:
        return self.subject.config.micro_batch_tokens or MICRO_BATCH_TOKENS.get(self.pair.device.type, 4096)


def evaluate_task(e: Evaluation, task: Task, path: Path | None, *, overwrite: bool) -> dict[str, Any]:
    """Samples, grades and measures; continues what `path` holds already.

    Returns:
        The result object, on every process; its numbers are complete on the first one only.

    Raises:
        UserError: prompts that do not fit the model, samples of other settings, a full disk.
    """
    chat = bool(e.pair.tokenizer.chat_template) if task.chat is None else task.chat
    prompts = encode_prompts(e.pair, task, chat)
    sampling = task.sampling.model_dump() | {"seed": e.subject.config.seed, "chat_template": chat}
    config = e.subject.config
    settings = {
        "benchmark": task.name, "model": e.subject.label, "student": config.student, "revision": config.student_revision,
        "adapter": e.subject.adapter, "teacher": config.teacher if e.divergence else None, "sampling": sampling,
        "prompt_hash": task.prompt_hash, "verifier": task.verifier_name,
        "temperature_of_divergences": config.temperature if e.divergence else None, "batch_tokens": e.rollout_tokens,
    }  # fmt: skip
    file = SampleFile(path, settings)
    if e.accelerator.is_main_process:
        file.open(overwrite=overwrite)
    sample_all(e, task, prompts, file)
    on_responses = given_text(e, task, prompts)
    if not e.accelerator.is_main_process:
        return {}
    return result_of(e, task, file.rows, sampling, on_responses)


def encode_prompts(pair: Pair, task: Task, chat: bool) -> list[Prompt]:
    """Every item as token ids. Raises UserError where the longest prompt and a response do not fit the model's context."""
    prompts = []
    for number, item in enumerate(task.items):
        row = dict(item.row)
        if chat and "messages" not in row:
            row["messages"] = [{"role": "user", "content": row.pop("prompt", "")}]
        prompts.append(pair.prompt_format.encode(row, number, item.place))
    longest = max(prompts, key=lambda p: max(len(p.ids), len(p.teacher_ids)))
    room = pair.prompt_format.max_prompt_length - max(len(longest.ids), len(longest.teacher_ids))
    if room < task.sampling.max_response_length:
        raise UserError(
            f"{task.items[longest.index].place}: the prompt leaves room for {room} tokens in the model's context, less than "
            f"max_response_length {task.sampling.max_response_length}. Pass --max-response-length {max(room, 1)}"
        )
    return prompts


def sample_all(e: Evaluation, task: Task, prompts: Sequence[Prompt], file: SampleFile) -> None:
    """Makes every sample that the file does not have yet."""
    keys = [(number, sample) for number in range(len(prompts)) for sample in range(task.sampling.samples)]
    lengths = [len(prompts[number].ids) + task.sampling.max_response_length for number, _ in keys]
    plan = plan_micro_batches(lengths, e.rollout_tokens)
    (done,) = broadcast_object_list([set(file.rows)])
    names = [(task.items[number].id, sample) for number, sample in keys]
    open_batches = [batch for batch in plan if any(names[i] not in done for i in batch)]
    write = generator(e, task)

    def sampled(batch: list[int]) -> list[Row]:
        return sample_batch(e, task, prompts, [keys[i] for i in batch], write)

    with WorkProgress(e.display, task.name, len(done), len(keys), unit="samples") as progress:
        for rows in in_rounds(e.accelerator, open_batches, sampled):
            if e.accelerator.is_main_process:
                file.append(rows)
                progress.update(len(file.rows), share_correct(file.rows.values()))


def share_correct(rows: Collection[Row]) -> str:
    """The accuracy so far, as the progress shows it."""
    verdicts = [row["correct"] for row in rows if row["correct"] is not None]
    return f"correct {sum(verdicts) / len(verdicts):.1%}" if verdicts else ""


def generator(e: Evaluation, task: Task) -> TransformersGenerator:
    """Writes with the evaluated model: the stream and keys of a run's own held-out evaluation."""
    return TransformersGenerator(
        e.pair.student, e.pair.vocabulary, seed=e.subject.config.seed, stream="evaluation",
        temperature=task.sampling.temperature, token_budget=e.rollout_tokens, context=e.pair.autocast,
        top_p=task.sampling.top_p,
    )  # fmt: skip


def sample_batch(
    e: Evaluation, task: Task, prompts: Sequence[Prompt], keys: Sequence[tuple[int, int]], write: TransformersGenerator
) -> list[Row]:
    """One batch of (item number, sample), as rows for the file."""
    longest = task.sampling.max_response_length
    requests = [Request(prompts[number].ids, [], longest, (0, number, sample)) for number, sample in keys]

    def attempt(budget: int) -> list[list[int]]:
        return dataclasses.replace(write, token_budget=budget)(requests)

    responses, write.token_budget = with_smaller_batches(
        attempt, write.token_budget, smallest=max(len(r.prompt_ids) for r in requests) + longest,
        knob="rollout_batch_tokens", warn=e.display.warn,
    )  # fmt: skip
    rows = graded_rows(e, task, [(task.items[number], sample) for number, sample in keys], responses)
    if e.divergence:
        rollout = given_rollout([prompts[number] for number, _ in keys], responses, e.pair.vocabulary)
        sums = row_divergences(e.pair, rollout, e.subject.config.temperature, e.micro_batch_tokens)
        rows = [row | {"divergence": row_sums} for row, row_sums in zip(rows, sums, strict=True)]
    return rows


def graded_rows(
    e: Evaluation, task: Task, keys: Sequence[tuple[Item, int]], responses: Sequence[list[int]]
) -> list[Row]:
    """Responses with their verdicts, in order; without a reference `correct` and `extracted` are null."""
    stops = e.pair.vocabulary.stop_ids
    completions = [
        Completion(
            item.id, sample, str(e.pair.tokenizer.decode(ids, skip_special_tokens=True)), item.reference or {},
            item.place, tokens=len(ids), truncated=not ids or ids[-1] not in stops,
        )
        for (item, sample), ids in zip(keys, responses, strict=True)
    ]  # fmt: skip
    judged = [c for c in completions if c.row]
    verdicts = iter(grade(judged, task.verifier)) if task.verifier is not None else iter(())
    rows = []
    for completion in completions:
        if completion.row and task.verifier is not None:
            rows.append(next(verdicts).as_row())
            continue
        row = {"id": completion.id, "sample": completion.sample, "completion": completion.completion}
        row |= {"extracted": None, "correct": None, "reason": "no reference"}
        rows.append(row | {"tokens": completion.tokens, "truncated": completion.truncated})
    return rows


def given_text(e: Evaluation, task: Task, prompts: Sequence[Prompt]) -> dict[str, Any] | None:
    """Divergences on the `response` texts of the data, or None where there are none."""
    given = [prompt for prompt in prompts if prompt.response is not None]
    if not e.divergence or not given:
        return None
    own = mine(e.accelerator, given)
    responses = [encode_response(str(p.response), e.pair.tokenizer, e.pair.vocabulary) for p in own]
    rollout = given_rollout(own, responses, e.pair.vocabulary)
    sums = row_divergences(e.pair, rollout, e.subject.config.temperature, e.micro_batch_tokens)
    return averages(gather_object(sums))


def result_of(
    e: Evaluation,
    task: Task,
    rows: dict[tuple[str, int], Row],
    sampling: dict[str, Any],
    on_responses: dict[str, Any] | None,
) -> dict[str, Any]:
    """The result object; without graded samples its accuracy is null."""
    wanted = [rows[item.id, sample] for item in task.items for sample in range(task.sampling.samples)]
    fields = [field.name for field in dataclasses.fields(Graded)]
    graded = [Graded(**{k: row.get(k) for k in fields}) for row in wanted if row["correct"] is not None]
    common = {"benchmark": task.name, "model": e.subject.label, "sampling": sampling, "prompt_hash": task.prompt_hash}
    if graded:
        result = summarize(graded, votes=task.votes, **common)
    else:
        lengths = [row["tokens"] for row in wanted]
        cut = [row["truncated"] for row in wanted]
        result = {"schema": SCHEMA, "accuracy": None, "ci95": None, "problems": len(task.items), "samples": len(wanted)}
        result |= {"pass_at_k": None, "majority_at_k": None, "per_problem": {}}
        result |= {"truncated_share": sum(cut) / len(cut), "mean_length": sum(lengths) / len(lengths)} | common
    result |= {"verifier": task.verifier_name, "split": task.split}
    if e.divergence:
        result["teacher"] = e.subject.config.teacher
        result["divergence"] = {
            "temperature": e.subject.config.temperature,
            "on_samples": averages([row["divergence"] for row in wanted]),
            "on_responses": on_responses,
        }
    return result
