"""What a model is asked, and by what it is judged: problems of a benchmark, of a data file, or of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strategies.registry import RegistryError
from tropd_cli.benchmarks import Benchmark, Problem, Sampling, prompt_hash
from tropd_cli.errors import UserError
from tropd_cli.grading import Completion, check_allowed, grade_one
from tropd_cli.verifiers import VERIFIERS, Verifier, reference_of

#: Verifiers whose extracted text is no answer that could be equal to another one: there is no majority.
WITHOUT_VOTES = ("code", "ifbench")


@dataclass(frozen=True)
class Item:
    """One problem. `row` is what becomes a prompt (`prompt` or `messages`, maybe `response`); `reference` None: ungraded."""

    id: str
    row: Mapping[str, Any]
    reference: Mapping[str, Any] | None
    place: str

    @property
    def text(self) -> str:
        """The prompt before any chat template."""
        return str(self.row["prompt"]) if "prompt" in self.row else json.dumps(self.row.get("messages"))


@dataclass(frozen=True)
class Task:
    """Problems, their judge, and how to sample.

    Args:
        name: shown as the benchmark.
        verifier: None where nothing is graded.
        chat: whether plain prompts become a user's message; None: if the tokenizer has a chat template.
        split: "train" for prompts that a run was trained on.
        verifier_name: for messages and for the settings beside the samples.
    """

    name: str
    items: Sequence[Item]
    verifier: Verifier | None
    verifier_name: str | None
    sampling: Sampling
    chat: bool | None = None
    split: str | None = None

    @property
    def votes(self) -> bool:
        return self.verifier_name not in WITHOUT_VOTES

    @property
    def prompt_hash(self) -> str:
        return prompt_hash([Problem(item.id, item.text, {}) for item in self.items])


def build_verifier(spec: str | Mapping[str, Any]) -> tuple[Verifier, str]:
    """(verifier, its name). Raises UserError: unknown name or option, with what is near."""
    try:
        return VERIFIERS.build(spec), str(spec if isinstance(spec, str) else spec.get("name"))
    except RegistryError as error:
        raise UserError(str(error)) from error


def sampling_of(published: Sampling, flags: Mapping[str, Any]) -> Sampling:
    """Published sampling with the flags that were given on top."""
    return published.model_copy(update={k: v for k, v in flags.items() if k in Sampling.model_fields and v is not None})


def from_benchmark(
    benchmark: Benchmark, flags: Mapping[str, Any], *, limit: int | None, chat: bool | None, verifier: str | None = None
) -> Task:
    """A benchmark as a task. Raises UserError: data that cannot be had or does not fit."""
    chosen, name = build_verifier(verifier or benchmark.spec.verifier)
    where = benchmark.file or f"benchmark {benchmark.name}"
    items = [
        Item(p.id, {"prompt": p.prompt}, p.reference, f"{where}, problem {p.id}") for p in benchmark.problems(limit)
    ]
    return Task(benchmark.name, items, chosen, name, sampling_of(benchmark.spec.sampling, flags), chat)


def from_rows(
    name: str,
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    sampling: Sampling,
    *,
    verifier: str | None,
    required: bool,
    chat: bool,
    split: str | None = None,
) -> Task:
    """Rows of `--data` as a task.

    Args:
        rows: (place, row) with `prompt` or `messages`, maybe `id`, `response` and the reference's fields.
        verifier: None: nothing is graded.
        required: whether every row must have a reference; else those without one are not graded.

    Raises:
        UserError: no prompt, a missing field of the reference, an id that is used twice.
    """
    chosen, verifier_name = build_verifier(verifier) if verifier else (None, None)
    items: list[Item] = []
    seen: set[str] = set()
    for number, (place, row) in enumerate(rows):
        identity = str(row.get("id", number))
        if identity in seen:
            raise UserError(f"{place}: the id '{identity}' is used twice")
        seen.add(identity)
        given = chosen is not None and any(row.get(field) is not None for field in chosen.fields)
        if chosen is not None and required and not given:
            have = ", ".join(row) or "nothing"
            raise UserError(
                f"{place}: field '{chosen.fields[0]}' is missing, verifier '{verifier_name}' needs it; the row has {have}"
            )
        asked = {key: row[key] for key in ("prompt", "messages", "response") if row.get(key) is not None}
        items.append(Item(identity, asked, row if given else None, place))
    if not any(item.reference is not None for item in items):
        chosen = verifier_name = None
    return Task(name, items, chosen, verifier_name, sampling, chat, split)


def try_references(task: Task, *, allow_code_execution: bool) -> None:
    """Finds out before the long work whether this verifier can judge these problems.

    Raises:
        UserError: code that may not be run, a verifier that lacks its library, a reference that cannot be used.
    """
    if task.verifier is None:
        return
    check_allowed(task.verifier, allow_code_execution)
    for item in task.items:
        if item.reference is None:
            continue
        if not task.verifier.executes_code:
            grade_one(Completion(item.id, 0, "0", item.reference, item.place), task.verifier)
            continue
        try:
            reference_of(task.verifier, item.reference)
        except KeyError as error:
            have = ", ".join(item.reference)
            raise UserError(
                f"{item.place}: field {error} is missing, the verifier needs it; the row has {have}"
            ) from error


def label_of(source: str) -> str:
    """How a data source is called in a result: the name of a file without its ending."""
    if source == "-":
        return "stdin"
    return Path(source).name.split(".jsonl")[0] if Path(source).is_file() else source
