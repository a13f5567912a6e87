"""Rows of a benchmark from the hub, a file or the demo, each with the place to name in an error."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import pickle
import random
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from tropd_cli.demo import task
from tropd_cli.errors import UserError

LETTERS = "ABCDEFGHIJ"
REQUIRED = object()


def from_file(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a JSON Lines file, also gzipped, or of stdin for `-`.

    Raises:
        UserError: a line that is no JSON object, with its number.
    """
    shown = "stdin" if name == "-" else name
    try:
        if name == "-":
            yield from numbered(sys.stdin, shown)
            return
        with gzip.open(name, "rt", encoding="utf-8") if name.endswith(".gz") else open(name, encoding="utf-8") as file:
            yield from numbered(file, shown)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{shown} cannot be read: {error}") from error


def numbered(lines: Any, shown: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        place = f"{shown} line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place}: no JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{place}: not an object but {type(row).__name__}")
        yield place, row


def from_demo(split: str, count: int, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(task.problems(split, count, seed), 1):
        yield f"demo problem {number}", dict(row)


def from_hub(
    benchmark: str, path: str, name: str | None, split: str, file: str | None, revision: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a hub data set. No code of the data set is run.

    Raises:
        UserError: `datasets` is not installed, or the hub cannot be reached or refuses.
    """
    instead = f"--benchmark {benchmark}=FILE.jsonl with the rows of https://huggingface.co/datasets/{path}"
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"benchmark '{benchmark}' is on the hub and needs 'datasets', which is not installed: "
            f"pip install 'tropd[data]', or give a local copy: {instead}"
        ) from error
    try:
        if file is not None:
            source = f"hf://datasets/{path}{'@' + revision if revision else ''}/{file}"
            parts = [datasets.load_dataset("json", data_files=source, split="train")]
        else:
            configurations = datasets.get_dataset_config_names(path, revision=revision) if name == "*" else [name]
            parts = [datasets.load_dataset(path, c, split=split, revision=revision) for c in sorted(configurations)]
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise UserError(
            f"benchmark '{benchmark}' could not be loaded from the hub ({reason}). "
            f"If it is gated: hf auth login. Without network: {instead}"
        ) from error
    number = 0
    for part in parts:
        for row in part:
            number += 1
            yield f"{path} row {number}", dict(row)


def column(row: dict[str, Any], names: str, place: str, default: Any = REQUIRED) -> Any:
    """The value of the first column that the row has out of `first | second`.

    Raises:
        UserError: none of them, with the place and what the row has.
    """
    wanted = [name.strip() for name in names.split("|")]
    for name in wanted:
        if row.get(name) is not None:
            return row[name]
    if default is not REQUIRED:
        return default
    have = ", ".join(row) or "nothing"
    raise UserError(f"{place}: field {' or '.join(map(repr, wanted))} is missing; the row has {have}")


def lettered(row: dict[str, Any], choices: Any, values: dict[str, Any], place: str) -> dict[str, Any]:
    """`choices` as lettered lines and `answer` as a letter; separate columns are shuffled by their content."""
    if choices.list is not None:
        options = [str(option) for option in column(row, choices.list, place)]
        answer = values["answer"]
        letter = LETTERS[answer] if isinstance(answer, int) and 0 <= answer < len(options) else str(answer)
    else:
        correct = str(column(row, choices.correct, place)).strip()
        options = [correct, *(str(column(row, name, place)).strip() for name in choices.wrong)]
        seed = hashlib.sha256("\n".join(options).encode()).digest()
        random.Random(seed).shuffle(options)
        letter = LETTERS[options.index(correct)]
    if len(options) > len(LETTERS):
        raise UserError(f"{place}: {len(options)} options, more than {len(LETTERS)}")
    lines = [f"{name}. {option}" for name, option in zip(LETTERS, options, strict=False)]
    return {"choices": "\n".join(lines), "answer": letter}


def decode_livecodebench(row: dict[str, Any], place: str) -> dict[str, Any]:
    """`tests` of a LiveCodeBench row, public and private, and the `format` sentence of its prompt."""
    public = json.loads(column(row, "public_test_cases", place))
    cases = public + private_tests(column(row, "private_test_cases", place, default="[]"), place)
    metadata = json.loads(column(row, "metadata", place, default="{}"))
    tests: dict[str, Any] = {"inputs": [c["input"] for c in cases], "outputs": [c["output"] for c in cases]}
    starter = column(row, "starter_code", place, default="")
    if metadata.get("func_name"):
        tests |= {"fn_name": metadata["func_name"]}
        return {"tests": tests, "starter": "", "format": f"Start from this:\n\n```python\n{starter}\n```"}
    return {"tests": tests, "starter": "", "format": "The program reads from stdin and writes to stdout."}


def private_tests(text: str, place: str) -> list[dict[str, Any]]:
    """Test cases as JSON, or as base64 of zlib of a pickled JSON string. The pickle may contain nothing else."""
    try:
        cases = json.loads(text)
    except ValueError:
        try:
            packed = zlib.decompress(base64.b64decode(text))
            cases = json.loads(OnlyText(io.BytesIO(packed)).load())
        except Exception as error:
            raise UserError(f"{place}: private_test_cases cannot be decoded: {error}") from error
    return list(cases)


class OnlyText(pickle.Unpickler):
    """Unpickles plain values and refuses every class and function, so that data cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it contains {module}.{name}")


DECODERS: dict[str, Callable[[dict[str, Any], str], dict[str, Any]]] = {"livecodebench": decode_livecodebench}
