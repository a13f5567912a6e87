"""Jobs of several processes, forked after torch has been imported once: an import costs more than a small run."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Job:
    """Processes of one job. `codes` are exit codes, negative for a signal, None while running."""

    pids: list[int]
    codes: list[int | None]

    def wait(self, seconds: float) -> list[int | None]:
        """Waits until all have ended, and kills what has not by then (its code stays None; its log shows where it stood).

        As torchrun does: when one fails, the others get SIGTERM.
        """
        end, told = time.monotonic() + seconds, False
        while not self.ended() and time.monotonic() < end:
            if not told and any(self.codes):
                told = True
                self.send(signal.SIGTERM)
            time.sleep(0.02)
        codes = list(self.codes)
        if self.running():
            self.send(signal.SIGUSR1)
            time.sleep(0.5)
        for pid in self.running():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return codes

    def ended(self) -> bool:
        for index in range(len(self.pids)):
            if self.codes[index] is None:
                pid, status = os.waitpid(self.pids[index], os.WNOHANG)
                if pid:
                    self.codes[index] = os.waitstatus_to_exitcode(status)
        return None not in self.codes

    def running(self) -> list[int]:
        self.ended()
        return [pid for pid, code in zip(self.pids, self.codes, strict=True) if code is None]

    def send(self, number: int, *, only: int | None = None) -> None:
        """A signal to all that run, or to one."""
        for pid in self.running() if only is None else [p for p in self.running() if p == self.pids[only]]:
            os.kill(pid, number)


def start(count: int, function: Callable[[], int | None], log: Path) -> Job:
    """Forks `count` processes that run `function` with a launcher's environment; stdout and stderr go to `log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            _run(function, _environment(rank, count, port), log)
        pids.append(pid)
    return Job(pids, [None] * count)


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    if count == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _run(function: Callable[[], int | None], environment: dict[str, str], log: Path) -> None:
    """In the child: never returns."""
    code = 1
    try:
        os.environ.update(environment)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        faulthandler.enable(file=handle)  # a segmentation fault has no other words
        faulthandler.register(signal.SIGUSR1, file=handle)
        code = function() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def tropd(*arguments: str) -> Callable[[], int | None]:
    """The command line, as a function to fork."""

    def run() -> int | None:
        from tropd_cli.main import app

        app(list(arguments), prog_name="tropd")
        return 0

    return run
