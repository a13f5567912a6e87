"""The launcher and its workers: one message, signals passed on, a dead or hung worker named, torn files cut."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from tropd_cli import launch, processes
from tropd_cli.errors import UserError
from tropd_cli.prefixes import TeacherPrefixes
from tropd_cli.processes import JOB, Signs, Watch, may_speak, one_voice
from tropd_cli.run_directory import RunDirectory, cut_torn_line

from .test_distill import arguments, metrics
from .tiny import tiny_vocabulary


def start_job(args: list[str], folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from tropd_cli.main import run; run()", *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out, err = (folder / "stdout").open("w"), (folder / "stderr").open("w")
    return subprocess.Popen(command, env=environment, text=True, stdout=out, stderr=err)


def wait_for_lines(run: Path, count: int, job: subprocess.Popen[str]) -> None:
    while job.poll() is None and (not (run / "metrics.jsonl").is_file() or len(metrics(run)) < count):
        time.sleep(0.05)


def test_sigterm_to_the_launcher_saves_and_exits_130(tiny_pair: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start_job(arguments(tiny_pair, run, num_processes=2, steps=5000, prompts_per_step=2), tmp_path)
    wait_for_lines(run, 3, job)
    job.send_signal(signal.SIGTERM)
    assert job.wait(300) == 130
    said = (tmp_path / "stderr").read_text()
    assert said.count(f"interrupted; everything is saved. Continue with: tropd distill --resume {run}") == 1
    assert "Traceback" not in said and said.count("step 1/5000") == 1
    assert (run / "checkpoints" / f"step-{metrics(run)[-1]['step']:06d}").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_hung_worker_ends_the_job(tiny_pair: dict[str, Path], tmp_path: Path, number: int) -> None:
    run = tmp_path / "run"
    options = {"num_processes": 2, "steps": 5000, "prompts_per_step": 2, "checkpoint_every": 1, "hang_timeout": 20.0}
    job = start_job(arguments(tiny_pair, run, **options), tmp_path)
    wait_for_lines(run, 3, job)
    pid = json.loads((run / "processes" / "process-1.json").read_text())["pid"]
    os.kill(pid, number)
    assert job.wait(60) == 1
    said = (tmp_path / "stderr").read_text()
    wanted = "was killed by SIGKILL" if number == signal.SIGKILL else "gave no sign of life for 20 seconds"
    assert f"process 1 (pid {pid}" in said and wanted in said and f"--resume {run}" in said
    assert said.count("error:") == 1 and "Traceback" not in said


@pytest.mark.slow
def test_a_problem_of_all_workers_is_said_once(tiny_pair: dict[str, Path], tmp_path: Path) -> None:
    pair = tiny_pair | {"student": tmp_path / "nothing"}
    job = start_job(arguments(pair, tmp_path / "run", num_processes=2), tmp_path)
    assert job.wait(300) == 1
    said = (tmp_path / "stderr").read_text()
    assert said.count("error:") == 1 and "Traceback" not in said


# ── one voice ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_the_first_worker_that_fails_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(JOB, str(tmp_path))
    with pytest.raises(UserError), one_voice():
        raise UserError("the reason")
    with pytest.raises(typer.Exit), one_voice():
        raise UserError("the reason")
    with pytest.raises(typer.Exit), one_voice():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")


def test_under_another_launcher_the_loss_of_a_peer_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv(JOB, raising=False)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    with pytest.raises(UserError, match="lost contact"), one_voice():
        raise RuntimeError("Connection reset by peer")
    assert not may_speak()


def test_the_reason_goes_before_the_loss_that_follows_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv(JOB, raising=False)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    speaking = threading.Timer(0.05, may_speak)
    speaking.start()
    with pytest.raises(typer.Exit), one_voice():
        raise RuntimeError("Connection reset by peer")
    speaking.join()


def failure(code: int) -> Any:
    return SimpleNamespace(exitcode=code, pid=4711)


@pytest.mark.parametrize(
    ("codes", "interrupted", "code", "said"),
    [
        ({0: 130, 1: -15}, True, 130, ""),
        ({0: -15, 1: -15}, True, 130, ""),
        ({0: -15, 1: -9}, False, 1, "process 1 (pid 4711) was killed by SIGKILL (often by the system, out of memory)"),
        ({0: -11}, False, 1, "process 0 (pid 4711) was killed by SIGSEGV"),
        ({0: 1, 1: 1}, False, 1, "lost contact with each other"),
    ],
)
def test_exit_code_and_message_of_a_failed_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], codes: dict[int, int], interrupted: bool, code: int, said: str
) -> None:
    failures = {rank: failure(number) for rank, number in codes.items()}
    assert launch.exit_code(failures, tmp_path, tmp_path, interrupted=interrupted) == code
    assert said in capsys.readouterr().err
    (tmp_path / "message").touch()
    launch.exit_code(failures, tmp_path, tmp_path, interrupted=interrupted)
    assert capsys.readouterr().err == ""


# ── who hangs ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("signs", "hung"),
    [
        ([{"beats": 3, "pulse": 9}, {"beats": 2, "pulse": 9}], 1),  # the one behind
        ([{"beats": 3, "pulse": 9, "place": 2}, {"beats": 3, "pulse": 9, "place": 0}], 1),  # it has not arrived
        ([{"beats": 3, "pulse": 9, "place": 0}, {"beats": 3, "pulse": 9, "place": 1}], 0),
        (
            [{"beats": 3, "pulse": 9, "place": 0}, {"beats": 3, "pulse": 0, "place": 2}],
            1,
        ),  # it stands still where it waited
        ([{"beats": 3, "pulse": 0}, {"beats": 2, "pulse": 9}], 0),
    ],
)
def test_the_hung_process_is_the_one_that_the_others_wait_for(signs: list[dict[str, int]], hung: int) -> None:
    """Beats stopped at second 0; the pulse of a process that stands still did too."""
    seen = Signs(2)
    start = seen.now
    for second in range(0, 30, 2):  # not 30: start + 30 - start may be a bit more than 30
        now = [sign | {"pulse": second if sign["pulse"] else 0} for sign in signs]
        seen.look(dict(enumerate(now)), start + second, 30.0)
        assert seen.hung(30.0) is None
    seen.look(seen.last, start + 32, 30.0)
    assert seen.hung(30.0) == hung


def test_a_job_that_was_suspended_as_a_whole_is_no_hung_one() -> None:
    seen = Signs(2)
    signs: dict[int, Any] = {rank: {"beats": 1, "pulse": 1} for rank in (0, 1)}
    seen.look(signs, seen.now, 30.0)
    seen.look(signs, seen.now + 3600.0, 30.0)
    assert seen.hung(30.0) is None
    for _ in range(4):
        seen.look(signs, seen.now + 10.0, 30.0)
    assert seen.hung(30.0) == 0


def test_a_process_that_never_showed_itself_is_not_judged() -> None:
    seen = Signs(2)
    for _ in range(9):
        seen.look({0: {"beats": 1}, 1: None}, seen.now + 10.0, 30.0)
    assert seen.hung(30.0) is None


@pytest.mark.parametrize(
    ("module", "place"), [("tropd_cli.rollout", 0), ("torch.autograd.graph", 1), ("torch.distributed.c10d", 2)]
)
def test_the_place_of_the_work_is_read_from_its_stack(tmp_path: Path, module: str, place: int) -> None:
    inside, go_on = threading.Event(), threading.Event()
    scope = {"__name__": module, "inside": inside, "go_on": go_on}
    exec("def wait():\n    inside.set()\n    go_on.wait()", scope)
    worker = threading.Thread(target=scope["wait"])
    worker.start()
    inside.wait()
    watch = Watch(tmp_path, 0, 2, timeout=30.0, advice="")
    watch._worker = worker.ident or 0
    watch.beat("scoring step 3")
    watch.pulse()
    go_on.set()
    worker.join()
    sign = json.loads((tmp_path / "process-0.json").read_text())
    assert (sign["doing"], sign["beats"], sign["pulse"], sign["place"]) == ("scoring step 3", 1, 1, place)


def test_the_hung_process_is_named_and_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(JOB, raising=False)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    ended: list[Any] = []
    monkeypatch.setattr(processes.os, "_exit", ended.append)
    monkeypatch.setattr(processes.os, "kill", lambda *args: ended.append(args))
    watches = [Watch(tmp_path, rank, 2, timeout=30.0, advice="Go on") for rank in (0, 1)]
    watches[1].beat("sampling step 3")
    watches[0]._end(1, json.loads((tmp_path / "process-1.json").read_text()))
    assert ended == [(os.getpid(), signal.SIGKILL), 1]
    said = capsys.readouterr().err
    assert "process 1 (pid" in said and "no sign of life for 30 seconds; it was sampling step 3" in said


# ── torn files ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_torn_last_line_is_cut_before_lines_are_added(tmp_path: Path) -> None:
    path = tmp_path / "process-0.jsonl"
    path.write_bytes(b'{"prompt": 1, "ids": [5, 1]}\n{"prompt": 2, "ids": [7, ')
    requests: list[Any] = []

    def write(asked: list[Any]) -> list[list[int]]:
        requests.extend(asked)
        return [[9, 1] for _ in asked]

    def cache() -> TeacherPrefixes:
        return TeacherPrefixes(
            tmp_path, write, tokenizer=None, vocabulary=tiny_vocabulary(), seed=0, rule="min", rank=0
        )  # type: ignore[arg-type]

    prompts: list[Any] = [SimpleNamespace(index=i, response=None, teacher_ids=[3]) for i in (1, 2)]
    assert cache().responses(prompts, 8) == [[5, 1], [9, 1]]
    assert len(requests) == 1
    assert [json.loads(line)["prompt"] for line in path.read_text().splitlines()] == [1, 2]
    assert cache().responses(prompts, 8) == [[5, 1], [9, 1]] and len(requests) == 1


def test_cutting_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for content, kept in ((b"", b""), (b"a\nb\n", b"a\nb\n"), (b"a\nb", b"a\n"), (b"b", b"")):
        path.write_bytes(content)
        cut_torn_line(path)
        assert path.read_bytes() == kept
    cut_torn_line(tmp_path / "nothing")


def test_a_run_that_died_before_its_configuration_was_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.tmp").write_text("stu")
    RunDirectory(tmp_path).refuse_existing(overwrite=False)


# ── inspect-regions, as distill ─────────────────────────────────────────────────────────────────────────────────────


def inspection(pair: dict[str, Path], folder: Path, data: Path, **options: Any) -> subprocess.Popen[str]:
    given = {"student": pair["student"], "teacher": pair["teacher"], "data": data, "max_prompt_length": 16} | options
    flags = [x for name, value in given.items() for x in (f"--{name.replace('_', '-')}", str(value))]
    return start_job(["inspect-regions", *flags, "--num-processes", "2", "--format", "jsonl"], folder)


@pytest.mark.slow
def test_an_inspection_by_two_workers_is_one_command(tiny_pair: dict[str, Path], tmp_path: Path) -> None:
    job = inspection(tiny_pair, tmp_path, tiny_pair["data"], max_response_length=8)
    assert job.wait(100) == 0
    rows = [json.loads(line) for line in (tmp_path / "stdout").read_text().splitlines()]
    assert list(dict.fromkeys(row["sequence"] for row in rows)) == list(range(12))
    assert (tmp_path / "stderr").read_text().count("12 responses of") == 1

    bad = tmp_path / "bad.jsonl"
    bad.write_text(tiny_pair["data"].read_text() + '{"prompt": "w1", "response": ""}\n')
    assert inspection(tiny_pair, tmp_path, bad, max_response_length=8).wait(100) == 1
    said = (tmp_path / "stderr").read_text()
    assert said.count("error:") == 1 and "row 13: `response` is empty" in said and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_inspection_ends_as_one(tiny_pair: dict[str, Path], tmp_path: Path, number: int) -> None:
    """SIGKILL: of a worker."""
    many = tmp_path / "many.jsonl"
    many.write_text(tiny_pair["data"].read_text() * 200)
    job = inspection(tiny_pair, tmp_path, many, max_response_length=64)
    while job.poll() is None and not (tmp_path / "stdout").stat().st_size:
        time.sleep(0.05)
    workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(workers[-1]) if number == signal.SIGKILL else job.pid, number)
    assert job.wait(60) == (1 if number == signal.SIGKILL else 130)
    said = (tmp_path / "stderr").read_text()
    assert ("was killed by SIGKILL" in said) == (number == signal.SIGKILL)
    assert said.count("error:") == (number == signal.SIGKILL) and "Traceback" not in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
