"""The forms of `tropd eval` with a model: which models and tasks the options mean, one process or many."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tropd_cli.benchmarks import Sampling, load_all
from tropd_cli.commands import quiet_libraries
from tropd_cli.config import Config, build_config, merge, parse_set, read_yaml
from tropd_cli.data import read_rows
from tropd_cli.display import Display
from tropd_cli.errors import UserError
from tropd_cli.evaluate import EvalRequest
from tropd_cli.judging import resolve_verifier
from tropd_cli.launch import make_accelerator, start_workers
from tropd_cli.processes import is_first, one_voice
from tropd_cli.run_directory import RunDirectory

from .forms import emit
from .subject import Subject, find_adapter
from .tasks import Task, from_benchmark, from_rows, label_of, try_references

METRICS = ("accuracy", "divergence")
#: Options of a run whose place is taken by a flag here.
FLAGS_INSTEAD = {
    "max_response_length": "--max-response-length",
    "eval_samples": "--samples",
    "eval_prompts": "--limit",
    "verifier": "--verifier",
    "student": "--model",
    "teacher": "--teacher",
    "data": "--data",
}
#: Prompts looked at where only a run's training prompts are there, unless --limit says otherwise.
TRAIN_PROMPTS = 256


@dataclass(frozen=True)
class Job:
    """One model and what it is evaluated on."""

    subject: Subject
    tasks: Sequence[Task]
    divergence: bool


def evaluate_models(request: EvalRequest) -> None:
    """Runs every job of the request and prints the results. Raises UserError."""
    with one_voice():
        jobs = plan_jobs(request)
        start_workers(jobs[0].subject.config, reads_input=request.data == "-" or "=-" in str(request.benchmark))
        run_jobs(request, jobs)


def run_jobs(request: EvalRequest, jobs: Sequence[Job]) -> None:
    """Evaluates in this process and prints, on the first process, what came out."""
    import torch

    from tropd_cli.sharding import with_launcher_options

    from .loop import Evaluation, evaluate_task
    from .subject import load_subject

    quiet_libraries()
    display = Display(active=is_first())
    config = jobs[0].subject.config
    if config.threads:
        torch.set_num_threads(config.threads)
    if request.model is None and not request.targets:
        display.note("No model or run given: evaluating the built-in demo's two models on its held-out problems.")
    paths = sample_paths(request, jobs)
    if not request.output and sum(len(t.items) * t.sampling.samples for j in jobs for t in j.tasks) > 1000:
        display.note("the samples are not kept. To keep them, and to be able to continue: --output DIR")
    accelerator = make_accelerator(with_launcher_options(config), request.output or ".")
    results: list[dict[str, Any]] = []
    try:
        for job in jobs:
            pair = load_subject(job.subject)
            evaluation = Evaluation(job.subject, pair, accelerator, display, job.divergence)
            for task in job.tasks:
                path = paths.get((job.subject.label, task.name))
                results.append(evaluate_task(evaluation, task, path, overwrite=request.overwrite))
            del pair, evaluation
    except KeyboardInterrupt:
        display.note("interrupted" + (". The same command continues where it stopped" if request.output else ""))
        raise
    finally:
        accelerator.end_training()
    if not accelerator.is_main_process:
        return
    save_results(request, results)
    emit(results, request, display)


def sample_paths(request: EvalRequest, jobs: Sequence[Job]) -> dict[tuple[str, str], Path]:
    """(model, task) -> samples file. Raises UserError for one .jsonl and several of them."""
    if request.output is None:
        return {}
    keys = [(job.subject.label, task.name) for job in jobs for task in job.tasks]
    output = Path(request.output)
    if output.suffix == ".jsonl":
        if len(keys) > 1:
            raise UserError(f"--output {output} is one file, but there are {len(keys)} sets of samples. Give a folder")
        return {keys[0]: output}
    if output.is_file():
        raise UserError(f"--output '{output}' is a file, but no .jsonl. Give a folder, or a name that ends with .jsonl")
    several = len({model for model, _ in keys}) > 1
    names = [f"{task}.{slug(model)}" if several else task for model, task in keys]
    return {key: output / f"{slug(name)}.samples.jsonl" for key, name in zip(keys, names, strict=True)}


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def save_results(request: EvalRequest, results: Sequence[dict[str, Any]]) -> None:
    """results.jsonl in the --output folder, replaced as a whole."""
    if request.output is None or request.output.endswith(".jsonl"):
        return
    path = Path(request.output, "results.jsonl")
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in results), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}. The samples are kept") from error


# ── what the options mean ───────────────────────────────────────────────────────────────────────────────────────────


def plan_jobs(request: EvalRequest) -> list[Job]:
    """The jobs of a request, every reference tried. Raises UserError."""
    if request.targets:
        jobs = [run_job(request, Path(request.targets[0]))]
    elif request.model is None and not (request.benchmark or request.data or request.teacher):
        jobs = demo_jobs(request)
    else:
        jobs = [model_job(request)]
    for job in jobs:
        for task in job.tasks:
            try_references(task, allow_code_execution=request.allow_code_execution)
    return jobs


def demo_jobs(request: EvalRequest) -> list[Job]:
    """Nothing named: the demo's student, with its divergence from the teacher, and the teacher."""
    tasks = [from_benchmark(b, request.sampling, limit=request.limit, chat=request.chat) for b in load_all("demo")]
    divergence = "divergence" in wanted_metrics(request, METRICS)
    student = config_of(request, {"student": "demo:student", "teacher": "demo:teacher" if divergence else None})
    teacher = config_of(request, {"student": "demo:teacher"})
    return [
        Job(Subject(student, "demo:student"), tasks, divergence),
        Job(Subject(teacher, "demo:teacher"), tasks, False),
    ]


def model_job(request: EvalRequest) -> Job:
    """`--model` on `--benchmark` or `--data`."""
    if request.model is None:
        raise UserError("--model missing. Give --model M with --benchmark or --data; nothing at all evaluates the demo")
    if not (request.benchmark or request.data):
        raise UserError(f"--model {request.model} on what? --benchmark gsm8k, or --data problems.jsonl --verifier math")
    default = METRICS if request.teacher else METRICS[:1]
    metrics = wanted_metrics(request, default)
    if "divergence" in metrics and request.teacher is None:
        raise UserError("--metrics divergence needs something to diverge from: --teacher T")
    name, adapter = find_adapter(request.model)
    config = config_of(request, {"student": name, "teacher": request.teacher if "divergence" in metrics else None})
    tasks = named_tasks(request, Sampling(), metrics)
    return Job(Subject(config, request.model, adapter), tasks, "divergence" in metrics)


def run_job(request: EvalRequest, path: Path) -> Job:
    """A run's student on the run's held-out data, or on what is named instead."""
    run = RunDirectory(path)
    if not run.config.is_file():
        hint = f" A model's folder is evaluated with --model {path}" if (path / "config.json").is_file() else ""
        raise UserError(f"'{path}' is no run directory: it has no config.yaml.{hint}")
    stored = build_config(read_yaml(str(run.config)))
    named = bool(request.benchmark or request.data)
    trained_on = stored.eval_data is None and not named
    default = METRICS[:1] if request.benchmark else METRICS[1:] if trained_on else METRICS
    metrics = wanted_metrics(request, default)
    divergence = "divergence" in metrics
    changes: dict[str, Any] = {"teacher": (request.teacher or stored.teacher) if divergence else None}
    changes |= {"num_processes": 1, "log_with": []}  # how it was trained says nothing about how to evaluate it
    if request.teacher:
        changes["teacher_revision"] = None
    adapter = None
    if not request.before:
        if not run.student.is_dir():
            raise UserError(
                f"'{path}' has no finished student. Finish it: tropd distill --resume {path}, or measure the start: --before"
            )
        adapter = str(run.student) if (run.student / "adapter_config.json").is_file() else None
        if adapter is None:
            changes |= {"student": str(run.student), "student_revision": None}
    config = config_of(request, stored.model_dump() | changes)
    sampling = Sampling(
        samples=stored.eval_samples, temperature=stored.temperature, max_response_length=stored.max_response_length
    )
    tasks = named_tasks(request, sampling, metrics) if named else [run_task(request, stored, sampling, metrics)]
    label = f"{path} (before)" if request.before else str(path)
    return Job(Subject(config, label, adapter), tasks, divergence)


def run_task(request: EvalRequest, stored: Config, sampling: Sampling, metrics: Sequence[str]) -> Task:
    """The run's held-out prompts as its own evaluation reads them, or its training prompts, marked as such."""
    source = str(stored.eval_data or stored.data)
    limit = request.limit or (stored.eval_prompts if stored.eval_data else TRAIN_PROMPTS)
    verifier = request.verifier or resolve_verifier(stored.verifier, stored.data)
    rows, problems = read_rows(source, skip_bad_rows=stored.skip_bad_rows)
    if problems:
        Display(active=is_first()).warn(f"{source}: {len(problems)} bad rows skipped, first: {problems[0]}")
    return from_rows(
        label_of(source), rows[:limit], with_flags(sampling, request), verifier=verifier if "accuracy" in metrics else None,
        required=request.verifier is not None, chat=bool(request.chat), split=None if stored.eval_data else "train",
    )  # fmt: skip


def named_tasks(request: EvalRequest, sampling: Sampling, metrics: Sequence[str]) -> list[Task]:
    """The tasks of --benchmark and --data. Raises UserError, also where accuracy alone is wanted of rows without answers."""
    tasks = []
    if request.benchmark:
        tasks += [
            from_benchmark(b, request.sampling, limit=request.limit, chat=request.chat, verifier=request.verifier)
            for b in load_all(request.benchmark)
        ]
    if request.data:
        rows, _ = read_rows(request.data)
        verifier = request.verifier or resolve_verifier("auto", request.data)
        task = from_rows(
            label_of(request.data),
            rows[: request.limit],
            with_flags(sampling, request),
            verifier=verifier if "accuracy" in metrics else None,
            required=request.verifier is not None,
            chat=bool(request.chat),
        )
        if task.verifier is None and "divergence" not in metrics:
            raise UserError(
                f"{request.data} has no `answer`, so there is no accuracy. Add answers, or measure divergences: --teacher T"
            )
        if task.name in [other.name for other in tasks]:
            raise UserError(f"--data {request.data} would be called '{task.name}' like the benchmark. Rename the file")
        tasks.append(task)
    return tasks


def with_flags(sampling: Sampling, request: EvalRequest) -> Sampling:
    return sampling.model_copy(update=request.sampling)


def wanted_metrics(request: EvalRequest, default: Sequence[str]) -> list[str]:
    """The metrics asked for. Raises UserError for an unknown one."""
    if request.metrics is None:
        return list(default)
    names = [name.strip() for name in request.metrics.split(",") if name.strip()]
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise UserError(f"--metrics {request.metrics!r} is none of: {', '.join(METRICS)}, or both with a comma")
    return names


def config_of(request: EvalRequest, base: dict[str, Any]) -> Config:
    """Models, seed, device and budgets as a configuration; flags and --set win."""
    flags = {key: getattr(request, key) for key in ("seed", "device", "num_processes")}
    layers = [base, {key: value for key, value in flags.items() if value is not None}]
    for assignment in request.assignments:
        layers.append(parse_set(assignment))
        instead = next((FLAGS_INSTEAD[key] for key in layers[-1] if key in FLAGS_INSTEAD), None)
        if instead:
            raise UserError(f"--set {assignment} means nothing to an evaluation. Give it as {instead}")
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge(merged, layer)
    return build_config(merged)
