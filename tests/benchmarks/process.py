"""What a benchmark measures of its own process, and the file it leaves. Imports torch only, so another environment can too.

CPU-seconds are those of all threads: unlike wall time they change little when other jobs use the machine. Peak resident
memory is that of one stage: /proc/self/clear_refs forgets earlier peaks, which getrusage would go on reporting (Linux).
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path("build/bench")

#: Threads that wait for work sleep: spinning ones would be counted as work.
QUIET_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Stage:
    """growth: bytes of resident memory at the stage's peak beyond what was resident just before it."""

    cpu_seconds: float
    seconds: float
    growth: int


class Stages:
    """Stages of one process, begun and ended by hooks. They must not overlap."""

    def __init__(self) -> None:
        self.done: dict[str, Stage] = {}
        self._begun: dict[str, tuple[float, float, int]] = {}
        self._started = self._spent = (0.0, 0.0)

    def start(self) -> None:
        """Begins the step that the stages are part of."""
        self._started, self._spent = _now(), (0.0, 0.0)

    def begin(self, name: str) -> None:
        """Gives freed memory back to the system first, so that none of it hides the stage's growth."""
        cpu, wall = _now()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        resident = _resident("VmRSS")
        cpu_now, wall_now = _now()
        self._spent = (self._spent[0] + cpu_now - cpu, self._spent[1] + wall_now - wall)
        self._begun[name] = (cpu_now, wall_now, resident)

    def end(self, name: str) -> None:
        cpu, wall, resident = self._begun.pop(name)
        cpu_now, wall_now = _now()
        self.done[name] = Stage(cpu_now - cpu, wall_now - wall, _resident("VmHWM") - resident)

    def report(self) -> dict[str, dict[str, float]]:
        """Every stage that has ended, and the step as a whole without what measuring took."""
        pairs = zip(_now(), self._started, self._spent, strict=True)
        cpu, wall = (now - started - spent for now, started, spent in pairs)
        stages: dict[str, dict[str, float]] = {name: asdict(stage) for name, stage in self.done.items()}
        return stages | {"step": {"cpu_seconds": cpu, "seconds": wall}}


def _now() -> tuple[float, float]:
    """(CPU-seconds of this process, seconds)."""
    return time.process_time(), time.perf_counter()


def hook(
    owner: Any, name: str, *, before: Callable[[], None] | None = None, after: Callable[[], None] | None = None
) -> None:
    """Puts calls around a method of one object."""
    inner = getattr(owner, name)

    def hooked(*args: Any, **kwargs: Any) -> Any:
        if before:
            before()
        result = inner(*args, **kwargs)
        if after:
            after()
        return result

    setattr(owner, name, hooked)


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def cpu_seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def alternating(actions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median CPU-seconds of each action; they take turns, so that what slows the machine down slows all of them."""
    rounds = [[cpu_seconds(action) for action in actions] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


# ── the file ────────────────────────────────────────────────────────────────────────────────────────────────────────


def environment() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    import torch

    found = {}
    for package in ("torch", "transformers", "accelerate", "trl"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        **found,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_results(path: Path, module: str, cases: Iterable[dict[str, Any]]) -> None:
    """One file per benchmark: the command, the environment, and one object per case, written again after each."""
    document = {
        "command": " ".join(["python", "-m", f"tests.benchmarks.{module}", *sys.argv[1:]]),
        "environment": environment(),
        "cases": [],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    for case in cases:
        print(json.dumps(case), flush=True)
        document["cases"].append(case)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
