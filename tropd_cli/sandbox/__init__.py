"""Runs code that a model wrote: behind namespaces or another user, with limits, and killed as a group.

Protects the machine and its files against code that is wrong or careless and against ordinary malice: fork bombs,
endless loops, floods of output, deleted files, signals to other processes, forged test results. It is no virtual
machine: a hole in the kernel is a hole in the box.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tropd_cli.errors import UserError

SUPERVISOR = Path(__file__).with_name("supervisor.py")
GRACE_SECONDS = 30.0  # for starting and taking down boxes on a busy machine, beyond the wall time of the code
REASON_CHARACTERS = 300


class SandboxUnavailable(UserError):
    """This system offers no way to keep the code away from the machine, so it is not run."""


@dataclass(frozen=True)
class Limits:
    """What one run may use. `cpu_seconds` and `memory_mb` hold for each process, `memory_mb` for their sum as well."""

    cpu_seconds: float = 10.0
    wall_seconds: float = 30.0
    memory_mb: int = 1024
    file_mb: int = 16
    tmp_mb: int = 64
    processes: int = 32
    output_kb: int = 4096

    def as_job(self) -> dict[str, float]:
        return {
            "cpu_seconds": self.cpu_seconds,
            "wall_seconds": self.wall_seconds,
            "memory_bytes": self.memory_mb << 20,
            "file_bytes": self.file_mb << 20,
            "tmp_bytes": self.tmp_mb << 20,
            "processes": self.processes,
            "output_bytes": self.output_kb << 10,
        }


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `reason` is one line for the graded sample; `output` what the last program printed."""

    passed: bool
    reason: str
    output: str = ""


@dataclass(frozen=True)
class Isolation:
    """What separates the code from the machine: one of the modes of `isolation.py`, and what it does not cover."""

    mode: str
    network: bool  #: whether the code can reach the network

    def describe(self) -> str:
        ways = {
            "namespaces": "own process, mount, network and IPC namespaces and a user id of its own",
            "user-namespace": "own user, process, mount, network and IPC namespaces",
            "other-user": "a user id of its own; this system grants no namespaces, so files that everyone can read "
            "and the network stay reachable",
        }
        return ways[self.mode]


def run_program(source: str, cases: list[tuple[str, str]], limits: Limits | None = None) -> Outcome:
    """Runs a program once per case, with the case's stdin, until its stdout differs from the expected one.

    Args:
        source: a Python program.
        cases: pairs of stdin and expected stdout, compared line by line, numbers by value.
        limits: for each case.

    Raises:
        SandboxUnavailable: no isolation on this system.
    """
    if not cases:
        raise ValueError("a program without test cases would always pass")
    jobs = [{"roles": [{"role": "program", "source": source, "stdin": i}], "expected": o} for i, o in cases]
    results = supervise(jobs, available().mode, limits or Limits())
    last, output = results[-1], results[-1]["boxes"][-1]["output"]
    where = f"case {len(results)} of {len(cases)}"
    if last["same"]:
        return Outcome(True, f"passed, {len(cases)} cases", output)
    reason = broken(last, 0)
    if reason is None:
        shown = " ".join(output.split())[:80]
        reason = f"printed {shown!r}" if shown else "printed nothing"
    return Outcome(False, f"{where}: {reason}"[:REASON_CHARACTERS], output)


def run_tests(
    source: str,
    tests: str,
    *,
    setup: str = "",
    entry_point: str | None = None,
    keep_lines: int = 0,
    limits: Limits | None = None,
) -> Outcome:
    """Runs tests against code that lives in a box of its own and hands over plain values only.

    Args:
        source: the code under test; lines at its end that are no Python are cut off, down to `keep_lines`.
        tests: Python that raises when the code is wrong; a function `check` is called with the entry point.
        setup: code of the benchmark that the tests may use (HumanEval: the prompt with its helper functions).
        entry_point: the name under test, also known to the tests as `candidate`.
        keep_lines: how many first lines of `source` must stay.
        limits: for the whole run.

    Raises:
        SandboxUnavailable: no isolation on this system.
    """
    worker = {"role": "worker", "source": source, "keep_lines": keep_lines}
    judge = {"role": "judge", "tests": tests, "setup": setup, "entry_point": entry_point}
    (result,) = supervise([{"roles": [worker, judge]}], available().mode, limits or Limits())
    output = result["boxes"][0]["output"]
    if result["kind"] != "ended":  # a verdict that was written while the boxes were taken down says nothing
        return Outcome(False, str(result["reason"]), output)
    verdict = read_verdict(result["boxes"][1]["verdict"])
    if verdict is None:
        return Outcome(False, (broken(result, 1) or "the tests did not finish")[:REASON_CHARACTERS], output)
    reason = str(verdict["reason"])
    if not verdict["passed"]:
        reason = worker_end(result["boxes"][0]["status"]) or reason
    return Outcome(verdict["passed"] is True, reason[:REASON_CHARACTERS], output)


def read_verdict(text: str) -> dict[str, Any] | None:
    try:
        verdict = json.loads(text)
    except ValueError:
        return None
    return verdict if isinstance(verdict, dict) and {"passed", "reason"} <= set(verdict) else None


def broken(result: dict[str, Any], which: int) -> str | None:
    """Why a box did not end as a program should, or None."""
    if result["kind"] != "ended":
        return str(result["reason"])
    box = result["boxes"][which]
    if box["status"].get("exit") == 0:
        return None
    lines = [line for line in box["errors"].splitlines() if line.strip()]
    return worker_end(box["status"]) or (lines[-1].strip() if lines else f"exit status {box['status'].get('exit')}")


def worker_end(status: dict[str, Any]) -> str | None:
    """The signal that ended a process, in words, or None when none did."""
    code = status.get("exit", 0)
    if code >= 0:
        return None
    names = {24: "used up its CPU time", 9: "was killed (CPU time or memory)", 25: "wrote a file beyond the limit"}
    return names.get(-code, f"was ended by signal {-code}")


def supervise(cases: list[dict[str, Any]], mode: str, limits: Limits) -> list[dict[str, Any]]:
    """Hands a job to a supervisor process and returns its report.

    Raises:
        SandboxUnavailable: a box could not be built; names the step.
    """
    job = json.dumps({"mode": mode, "limits": limits.as_job(), "cases": cases})
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    process = subprocess.Popen(
        [sys.executable, "-S", "-s", "-B", str(SUPERVISOR)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd="/",
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
    try:
        report, errors = process.communicate(job, timeout=GRACE_SECONDS + limits.wall_seconds * len(cases))
    except BaseException:
        process.terminate()  # it takes its boxes down
        process.wait(GRACE_SECONDS)
        raise
    if process.returncode:
        raise SandboxUnavailable(f"the sandbox did not start: {errors.strip().splitlines()[-1:] or 'no message'}")
    results: list[dict[str, Any]] = json.loads(report)
    for box in (box for result in results for box in result["boxes"]):
        if "failed" in box["status"]:
            raise SandboxUnavailable(f"the sandbox could not be built ({mode}): {box['status']['failed']}")
    return results


@functools.cache
def available() -> Isolation:
    """The best isolation this system grants, found by trying.

    Raises:
        SandboxUnavailable: none, with the reason for each way that was tried.
    """
    if sys.platform != "linux":
        raise SandboxUnavailable(f"code cannot be run safely on {sys.platform}: the sandbox needs Linux. {ADVICE}")
    from .isolation import modes

    tried = []
    for mode in modes():
        probe = {"role": "program", "source": "import statistics\nprint(6 * 7)", "stdin": ""}
        try:
            (result,) = supervise([{"roles": [probe], "expected": "42"}], mode, Limits())
        except SandboxUnavailable as error:
            tried.append(str(error))
            continue
        if result["same"]:
            return Isolation(mode, network=mode == "other-user")
        tried.append(f"{mode}: {broken(result, 0)}")
    raise SandboxUnavailable(f"code cannot be run safely here, so it is not run. {'; '.join(tried)}. {ADVICE}")


ADVICE = (
    "Run it where user namespaces are allowed (sysctl kernel.unprivileged_userns_clone=1 or "
    "kernel.apparmor_restrict_unprivileged_userns=0, docker run --security-opt seccomp=unconfined), or as root"
)
