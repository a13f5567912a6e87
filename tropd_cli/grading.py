"""Completions -> verdicts -> one result per model and benchmark. No model is loaded here.

Completions are JSON Lines rows `id, completion` and the reference's fields (`answer`, `tests`, ...); several rows with
one id are several samples. Optional: `sample` (its number), `tokens` (length), `truncated`.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from tropd_cli import sandbox, statistics
from tropd_cli.benchmarks import rows as source
from tropd_cli.errors import UserError
from tropd_cli.verifiers import Verdict, Verifier, reference_of

SCHEMA = "tropd-eval/1"
DIGITS = 6  # of the numbers in a result
LOOK_AHEAD = 4  # samples per worker that are graded while an earlier one is waited for


@dataclass(frozen=True)
class Completion:
    """One sample of one problem. `place` is what an error about it names; `row` holds the reference's fields."""

    id: str
    sample: int
    completion: str
    row: Mapping[str, Any]
    place: str
    tokens: int | None = None
    truncated: bool | None = None


@dataclass(frozen=True)
class Graded:
    """A line of the graded samples."""

    id: str
    sample: int
    completion: str
    extracted: str | None
    correct: bool
    reason: str
    tokens: int | None = None
    truncated: bool | None = None

    def as_row(self) -> dict[str, Any]:
        """The JSON Lines row; length and truncation only where they are known."""
        row = asdict(self)
        return {k: v for k, v in row.items() if v is not None or k not in ("tokens", "truncated")}


def read_completions(name: str, references: Mapping[str, Mapping[str, Any]] | None = None) -> Iterator[Completion]:
    """Rows of a file, or of stdin for `-`, checked one by one.

    Args:
        name: JSON Lines file.
        references: fields per id, for rows that bring none of their own (`--benchmark`).

    Raises:
        UserError: a missing or wrong field with its line, an unknown id, the same sample twice, no row at all.
    """
    counts: collections.Counter[str] = collections.Counter()
    seen: set[tuple[str, int]] = set()
    for place, row in source.from_file(name):
        identity = str(source.column(row, "id", place))
        text = row.get("completion")
        if not isinstance(text, str):
            source.column(row, "completion", place)
            raise UserError(f"{place}: 'completion' is {type(text).__name__}; it must be text")
        sample = row.get("sample", counts[identity])
        if not isinstance(sample, int) or isinstance(sample, bool) or (identity, sample) in seen:
            raise UserError(
                f"{place}: sample {sample!r} of id '{identity}' is no new number; leave `sample` out to count"
            )
        if references is not None and identity not in references:
            raise UserError(f"{place}: id '{identity}' is none of the benchmark's {len(references)} problems")
        counts[identity] += 1
        seen.add((identity, sample))
        fields = {**(references[identity] if references is not None else {}), **row}
        yield Completion(identity, sample, text, fields, place, row.get("tokens"), row.get("truncated"))
    if not seen:
        raise UserError(f"{'stdin' if name == '-' else name} has no completions. A row: {EXAMPLE}")


EXAMPLE = '{"id": "1", "completion": "The answer is 4.", "answer": "4"}'


def check_allowed(verifier: Verifier, allow_code_execution: bool) -> None:
    """Refuses a verifier that runs code unless the user allowed it and this system can wall it in.

    Raises:
        UserError: not allowed; tells what the permission does and against whom it protects.
        SandboxUnavailable: no isolation here.
    """
    if not verifier.executes_code:
        return
    if not allow_code_execution:
        raise UserError(
            "this verifier runs the code in the completions. With --allow-code-execution it runs in a sandbox: its own "
            "processes, an empty temporary directory, no network and none of your files or variables, and limits on "
            "time, memory, processes and output. That protects against faulty and ordinary hostile code, not against "
            "code that exploits a hole in the kernel"
        )
    sandbox.available()


def grade(completions: Iterable[Completion], verifier: Verifier, workers: int | None = None) -> Iterator[Graded]:
    """Verdicts in the order of the completions, each as soon as it and those before it are known.

    Args:
        completions: read lazily.
        verifier: used from several threads if it runs code, which waits for other processes; else from this one.
        workers: number of threads; default one per CPU.

    Raises:
        UserError: a field of the reference is missing or cannot be used, with the line.
    """
    if not verifier.executes_code:
        for completion in completions:
            yield grade_one(completion, verifier)
        return
    count = workers or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(count) as pool:
        waiting: collections.deque[Future[Graded]] = collections.deque()
        try:
            for completion in completions:
                waiting.append(pool.submit(grade_one, completion, verifier))
                if len(waiting) > count * LOOK_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def grade_one(completion: Completion, verifier: Verifier) -> Graded:
    """The verdict on one completion. Raises UserError naming its line where the reference does not fit."""
    try:
        verdict: Verdict = verifier.verify(completion.completion, reference_of(verifier, completion.row))
    except KeyError as error:
        have = ", ".join(completion.row)
        raise UserError(
            f"{completion.place}: field {error} is missing, the verifier needs it; the row has {have}"
        ) from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{completion.place}: {error}") from error
    return Graded(
        completion.id,
        completion.sample,
        completion.completion,
        verdict.extracted,
        verdict.correct,
        verdict.reason,
        completion.tokens,
        completion.truncated,
    )


def summarize(
    graded: Sequence[Graded],
    *,
    benchmark: str,
    model: str,
    sampling: Mapping[str, Any] | None = None,
    prompt_hash: str | None = None,
    votes: bool = True,
) -> dict[str, Any]:
    """The result object of one model on one benchmark.

    Args:
        graded: all samples, in any order.
        benchmark, model: names to print.
        sampling: temperature and so on; None for text made elsewhere.
        prompt_hash: of `benchmarks.prompt_hash`; None where the prompts are unknown.
        votes: whether extracted answers can be equal, as programs cannot; without it `majority_at_k` is null.

    Returns:
        `ci95` is [low, high]. `pass_at_k` and `majority_at_k` map k, as text, to a number, for k up to the smallest
        number of samples. `mean_length` is in tokens and null, like `truncated_share`, where the samples do not say.
    """
    if not graded:
        raise ValueError("a result of no samples")
    problems: dict[str, list[Graded]] = {}
    for one in sorted(graded, key=lambda g: g.sample):
        problems.setdefault(one.id, []).append(one)
    means = {problem: sum(g.correct for g in samples) / len(samples) for problem, samples in problems.items()}
    fewest = min(map(len, problems.values()))
    lengths = [g.tokens for g in graded if g.tokens is not None]
    cut = [g.truncated for g in graded if g.truncated is not None]
    low, high = statistics.accuracy_interval(list(means.values()), len(graded))
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "model": model,
        "accuracy": rounded(statistics.accuracy(list(means.values()))),
        "ci95": [rounded(low), rounded(high)],
        "problems": len(problems),
        "samples": len(graded),
        "samples_per_problem": fewest if len(graded) == fewest * len(problems) else None,
        "pass_at_k": over_k(problems, fewest, pass_at),
        "majority_at_k": over_k(problems, fewest, majority_at) if votes else None,
        "no_answer_share": rounded(sum(g.extracted is None and not g.correct for g in graded) / len(graded)),
        "truncated_share": rounded(sum(cut) / len(cut)) if cut else None,
        "mean_length": rounded(sum(lengths) / len(lengths)) if lengths else None,
        "per_problem": {
            problem: {"correct": sum(g.correct for g in samples), "samples": len(samples)}
            for problem, samples in problems.items()
        },
        "sampling": dict(sampling) if sampling is not None else None,
        "prompt_hash": prompt_hash,
    }


def over_k(problems: Mapping[str, Sequence[Graded]], fewest: int, measure: Any) -> dict[str, float]:
    """A measure for k = 1, 2, 4, ... and the number of samples that every problem has."""
    ks = sorted({*(2**i for i in range(fewest.bit_length())), fewest})
    return {str(k): rounded(sum(measure(s, k) for s in problems.values()) / len(problems)) for k in ks}


def pass_at(samples: Sequence[Graded], k: int) -> float:
    return statistics.pass_at_k(len(samples), sum(g.correct for g in samples), k)


def majority_at(samples: Sequence[Graded], k: int) -> float:
    return statistics.majority_at_k([g.extracted for g in samples], [g.correct for g in samples], k)


def rounded(value: float) -> float:
    return round(float(value), DIGITS) + 0.0
