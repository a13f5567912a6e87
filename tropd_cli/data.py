"""Prompts: JSONL, a hub data set, a list of the built-in demo, or standard input -> `Prompt` rows as token ids."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .demo import task
from .errors import UserError
from .randomness import permutation

#: Names of the built-in demo's data: split and number of problems.
DEMO_SPLITS = {"demo:train": ("train", 4096), "demo:heldout": ("heldout", 256)}


@dataclass(frozen=True)
class Prompt:
    """One prompt as both models see it.

    index: position in the data. text: what a person reads. ids / teacher_ids: the student's and the teacher's tokens.
    response: ready teacher response or None. answer: reference for a verifier or None.
    """

    index: int
    text: str
    ids: list[int]
    teacher_ids: list[int]
    response: str | None = None
    answer: Any = None


@dataclass(frozen=True)
class PromptFormat:
    """How rows become token ids.

    Args:
        tokenizer: the student's.
        teacher_tokenizer: only its chat template is used, and only with `teacher_template`.
        teacher_template: None: the teacher sees the student's tokens; "own": its own chat template; else a template's text.
        template_arguments: passed to both chat templates (`enable_thinking: false`).
        max_prompt_length: longest prompt in tokens, for either model.
        shared: [V of the student] bool, ids both models know. teacher_vocabulary: number of the teacher's ids.
    """

    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase
    max_prompt_length: int
    teacher_template: str | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)
    shared: Tensor | None = None
    teacher_vocabulary: int | None = None

    def encode(self, row: dict[str, Any], index: int, where: str) -> Prompt:
        """One row -> Prompt. Raises UserError naming `where`."""
        if row.get("messages") is not None:
            text, ids = self._chat(row["messages"], self.tokenizer, None, where)
            teacher_ids = ids
            if self.teacher_template is not None:
                template = None if self.teacher_template == "own" else self.teacher_template
                _, teacher_ids = self._chat(row["messages"], self.teacher_tokenizer, template, where)
        elif isinstance(row.get("prompt"), str) and row["prompt"]:
            text = row["prompt"]
            ids = teacher_ids = self.tokenizer(text)["input_ids"]
        else:
            fields = ", ".join(row) or "none"
            raise UserError(
                f"{where}: no prompt. A row needs a non-empty `prompt` or `messages`; its fields are: {fields}"
            )
        for owner, length in (("student", len(ids)), ("teacher", len(teacher_ids))):
            if length > self.max_prompt_length:
                raise UserError(
                    f"{where}: the prompt has {length} tokens for the {owner}, more than --max-prompt-length "
                    f"{self.max_prompt_length}. Raise it, shorten the prompt, or pass --skip-bad-rows"
                )
        if not ids or not teacher_ids:
            raise UserError(f"{where}: the prompt has no tokens")
        self._check_ids(ids, teacher_ids, where)
        response = row.get("response")
        if response is not None and not isinstance(response, str):
            raise UserError(f"{where}: `response` is {type(response).__name__}, it must be text")
        return Prompt(index, text, list(ids), list(teacher_ids), response, row.get("answer"))

    def _check_ids(self, ids: list[int], teacher_ids: list[int], where: str) -> None:
        """Raises UserError for a token that one of the models does not know."""
        if self.shared is not None and self.teacher_template is None:
            alien = [i for i in ids if i >= len(self.shared) or not self.shared[i]]
        else:
            alien = [i for i in teacher_ids if self.teacher_vocabulary is not None and i >= self.teacher_vocabulary]
        if alien:
            raise UserError(
                f"{where}: the prompt has the token {self.tokenizer.convert_ids_to_tokens(alien[0])!r} ({alien[0]}), which "
                "student and teacher do not share. If the chat templates differ: --teacher-chat-template own"
            )

    def _chat(
        self, messages: Any, tokenizer: PreTrainedTokenizerBase, template: str | None, where: str
    ) -> tuple[str, list[int]]:
        if not tokenizer.chat_template and template is None:
            raise UserError(
                f"{where}: the row has `messages`, and the tokenizer '{tokenizer.name_or_path}' has no chat template. "
                "Give `prompt` as plain text instead"
            )
        try:
            text = tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True, **self.template_arguments
            )
        except Exception as error:  # templates are programs of the model's author: anything may come out
            raise UserError(f"{where}: the chat template refused `messages`: {error}") from error
        return text, list(tokenizer(text, add_special_tokens=False)["input_ids"])


def read_rows(
    source: str, *, skip_bad_rows: bool = False, text: str | None = None
) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """Rows of a JSONL file, of standard input (`-`, or its `text` where it has been read) or of a hub data set (`owner/name[:split]`).

    Returns:
        ([("file, line 3", row), ...], problems skipped). Blank lines are passed over.

    Raises:
        UserError: missing or empty file, malformed line (unless skipped), no `data` extra for a hub data set.
    """
    if source in DEMO_SPLITS:
        split, count = DEMO_SPLITS[source]
        rows = [{"prompt": r["prompt"], "answer": r["answer"]} for r in task.problems(split, count, seed=0)]
        return [(f"{source}, row {i + 1}", row) for i, row in enumerate(rows)], []
    if source == "-":
        lines: Iterable[str] = sys.stdin if text is None else text.splitlines()
        label = "standard input"
    elif Path(source).is_file():
        try:
            lines = Path(source).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{source} is not UTF-8 text: {error}") from error
        label = source
    elif Path(source).exists() or source.startswith((".", "/", "~")) or source.endswith((".jsonl", ".json")):
        raise UserError(
            f"data file '{source}' does not exist. --data takes a JSONL file, `-`, or a hub data set owner/name"
        )
    else:
        return [(f"{source}, row {i + 1}", row) for i, row in enumerate(_hub_rows(source))], []
    rows = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{label}, line {number}"
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise UserError(f"{where}: a {type(row).__name__}, not an object")
        except json.JSONDecodeError as error:
            problems.append(f"{where}: not JSON ({error.msg} at column {error.colno})")
        except UserError as error:
            problems.append(str(error))
        else:
            rows.append((where, row))
            continue
        if not skip_bad_rows:
            raise UserError(f"{problems[-1]}. Mend it, or pass --skip-bad-rows")
    if not rows:
        raise UserError(
            f"{label} has no rows" + (f": all {len(problems)} are bad, first {problems[0]}" if problems else "")
        )
    return rows, problems


def _hub_rows(source: str) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"--data {source} is no file; to read it as a hub data set install the extra: pip install 'tropd[data]'"
        ) from error
    name, _, split = source.partition(":")
    try:
        yield from datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the data set library raises many kinds for the same causes
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"data set '{source}' could not be loaded (mistyped, private or no network): {first_line}"
        ) from error


def load_prompts(
    source: str, prompt_format: PromptFormat, *, skip_bad_rows: bool = False, text: str | None = None
) -> tuple[list[Prompt], list[str]]:
    """All prompts of a source, encoded. Returns (prompts, problems skipped). Raises UserError like `read_rows`."""
    rows, problems = read_rows(source, skip_bad_rows=skip_bad_rows, text=text)
    return encode_rows(rows, prompt_format, problems, skip_bad_rows=skip_bad_rows)


def encode_rows(
    rows: list[tuple[str, dict[str, Any]]], prompt_format: PromptFormat, problems: list[str], *, skip_bad_rows: bool
) -> tuple[list[Prompt], list[str]]:
    """`read_rows`' result -> prompts. Raises UserError on the first bad row unless they are skipped."""
    prompts: list[Prompt] = []
    for where, row in rows:
        try:
            prompts.append(prompt_format.encode(row, len(prompts), where))
        except UserError as error:
            if not skip_bad_rows:
                raise
            problems.append(str(error))
    if not prompts:
        raise UserError(f"no usable prompt: all {len(problems)} rows are bad, first {problems[0]}")
    return prompts, problems


def prompts_of_step(count: int, per_step: int, step: int, seed: int) -> list[int]:
    """Indices of the prompts of one step (counted from 0): reshuffled epochs over `count`, a pure function of its key."""
    orders: dict[int, list[int]] = {}
    chosen = []
    for position in range(step * per_step, (step + 1) * per_step):
        epoch, offset = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = permutation(seed, "prompt-order", epoch, count)
        chosen.append(orders[epoch][offset])
    return chosen
