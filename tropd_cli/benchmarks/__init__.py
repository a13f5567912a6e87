"""Benchmarks: a YAML file each, from the hub, from a local file in its place, or built in.

`load("gsm8k")` reads the hub, `load("gsm8k=questions.jsonl")` a local file with the same columns, `load("mine.yaml")` a
user's own. Nothing is downloaded before `problems()` is called.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from strategies.registry import suggest
from tropd_cli.errors import UserError

from . import rows

FOLDER = Path(__file__).parent
PLACEHOLDER = re.compile(r"\{(\w+)\}")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Hub(Strict):
    """Where the hub keeps it. `name` "*" means all configurations; `file` is one JSON Lines file of the repository."""

    path: str
    name: str | None = None
    split: str = "test"
    file: str | None = None
    revision: str | None = None


class Builtin(Strict):
    """Problems of the built-in demo task."""

    split: str = "heldout"
    count: int = Field(gt=0)
    seed: int = 0


class Choices(Strict):
    """Options: a column with a list of them, or one with the correct and several with wrong ones, which are shuffled."""

    list: str | None = None
    correct: str | None = None
    wrong: tuple[str, ...] = ()


class Sampling(Strict):
    """Published or usual sampling; flags win over it."""

    samples: int = Field(1, gt=0)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_response_length: int = Field(2048, gt=0)


class Spec(Strict):
    """A benchmark's YAML file.

    fields: our name -> column, or alternatives as `first | second`. `id` may be missing: the row's number is used.
    keep: column -> value that a row must have to be used.
    decode: a reader for what renaming columns cannot express; see rows.py.
    """

    title: str
    paper: str | None = None
    hub: Hub | None = None
    builtin: Builtin | None = None
    fields: dict[str, str]
    choices: Choices | None = None
    keep: dict[str, Any] = {}
    decode: str | None = None
    prompt: str
    verifier: str | dict[str, Any]
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Problem:
    """`prompt` is what the model is asked; `reference` has the fields that the verifier reads."""

    id: str
    prompt: str
    reference: dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark and where its rows come from. `file` is the local file given in place of the hub."""

    name: str
    spec: Spec
    file: str | None = None

    def problems(self, limit: int | None = None) -> list[Problem]:
        """The first `limit` problems, or all.

        Raises:
            UserError: no network, no `datasets`, no such file, a missing column (with its line), no problem at all.
        """
        found: list[Problem] = []
        seen: set[str] = set()
        for place, row in self._rows():
            if limit is not None and len(found) >= limit:
                break
            if any(str(rows.column(row, key, place)) != str(value) for key, value in self.spec.keep.items()):
                continue
            problem = self._problem(row, place, len(found))
            if problem.id in seen:
                raise UserError(f"{place}: the id '{problem.id}' is used twice in benchmark '{self.name}'")
            seen.add(problem.id)
            found.append(problem)
        if not found:
            raise UserError(f"benchmark '{self.name}' has no problems in {self.file or 'its data set'}")
        return found

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if self.file is not None:
            return rows.from_file(self.file)
        if self.spec.builtin is not None:
            return rows.from_demo(**self.spec.builtin.model_dump())
        if self.spec.hub is None:
            raise UserError(
                f"benchmark '{self.name}' names no data set: give a file, --benchmark {self.name}=rows.jsonl"
            )
        return rows.from_hub(self.name, **self.spec.hub.model_dump())

    def _problem(self, row: dict[str, Any], place: str, number: int) -> Problem:
        columns = {key: value for key, value in self.spec.fields.items() if key != "id"}
        values = {key: rows.column(row, value, place) for key, value in columns.items()}
        if self.spec.choices is not None:
            values |= rows.lettered(row, self.spec.choices, values, place)
        if self.spec.decode is not None:
            values |= rows.DECODERS[self.spec.decode](row, place)
        prompt = PLACEHOLDER.sub(lambda m: str(values[m[1]]) if m[1] in values else m[0], self.spec.prompt)
        identity = str(number)
        if "id" in self.spec.fields:
            identity = str(rows.column(row, self.spec.fields["id"], place, default=number))
        return Problem(
            identity, prompt, {k: v for k, v in values.items() if k not in ("question", "choices", "format")}
        )


def names() -> list[str]:
    """The built-in benchmarks."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(text: str) -> Benchmark:
    """A benchmark from `name`, `name=rows.jsonl`, `own.yaml` or `own.yaml=rows.jsonl`.

    Raises:
        UserError: unknown name, no such file, or a YAML file that does not fit.
    """
    name, _, file = text.strip().partition("=")
    if name in names():
        path = FOLDER / f"{name}.yaml"
    elif name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"benchmark file '{name}' does not exist")
    else:
        raise UserError(
            f"unknown benchmark '{name}'.{suggest(name, names())} Known: {', '.join(names())}, or the path of "
            "your own YAML file. Your own rows without one: --data rows.jsonl --verifier NAME"
        )
    if file and file != "-" and not Path(file).is_file():
        raise UserError(f"file '{file}' of benchmark '{name}' does not exist")
    return Benchmark(path.stem, read_spec(path), file or None)


def load_all(text: str) -> list[Benchmark]:
    """Several benchmarks, separated by commas.

    Raises:
        UserError: as `load`, or the same benchmark twice.
    """
    found = [load(part) for part in text.split(",") if part.strip()]
    twice = {b.name for b in found if sum(b.name == other.name for other in found) > 1}
    if twice or not found:
        raise UserError(f"--benchmark {text!r} names {', '.join(twice) + ' twice' if twice else 'no benchmark'}")
    return found


def read_spec(path: Path) -> Spec:
    """A benchmark's YAML file, checked. Raises UserError naming the key, with a suggestion for a misspelt one."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"benchmark file '{path}' is no YAML: {error}") from error
    try:
        spec = Spec.model_validate(data)
    except ValidationError as error:
        problem = min(
            error.errors(), key=lambda e: e["type"] != "extra_forbidden"
        )  # a misspelt key explains a missing one
        key = ".".join(map(str, problem["loc"]))
        hint = suggest(str(problem["loc"][-1]), Spec.model_fields) if problem["type"] == "extra_forbidden" else ""
        raise UserError(f"benchmark file '{path}', key '{key}': {problem['msg'].lower()}.{hint}") from error
    if spec.decode is not None and spec.decode not in rows.DECODERS:
        raise UserError(f"benchmark file '{path}': decode '{spec.decode}' is none of {', '.join(rows.DECODERS)}")
    return spec


def prompt_hash(problems: list[Problem]) -> str:
    """Twelve digits that differ when an id, a prompt or their order differs."""
    text = json.dumps([[p.id, p.prompt] for p in problems], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
