"""One process among several: whether it speaks for all of them, and whether the others are alive. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from .errors import UserError

#: Environment variable: folder that `tropd distill --num-processes` shares with the workers it starts.
JOB = "TROPD_JOB"
#: How the process groups' errors about a peer that has gone read.
SIGNS_OF_LOSS = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "gloo", "timed out waiting")


def is_worker() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process is the one that shows and prints."""
    return int(os.environ.get("RANK", "0")) == 0


# ── one voice ───────────────────────────────────────────────────────────────────────────────────────────────────────


def register() -> None:
    """Tells our launcher, if it is ours, which process it can pass signals to."""
    if JOB in os.environ:
        Path(os.environ[JOB], f"pid-{os.environ['RANK']}").write_text(str(os.getpid()), encoding="utf-8")


def may_speak() -> bool:
    """Whether this process is the first of its job on this machine to report a failure."""
    folder = os.environ.get(JOB)
    if folder is None and "TORCHELASTIC_ERROR_FILE" in os.environ:
        # torchrun's own: a folder per attempt, and in it one per worker.
        folder = str(Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parent.parent)
    if folder is None:
        return True
    try:
        Path(folder, "message").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Only the first worker that fails says so; those that fail with it, or because of it, end quietly."""
    try:
        yield
    except typer.Exit:
        raise
    except Exception as error:
        if not is_worker():
            raise
        lost = lost_contact(error)
        # Our launcher sees which process died of what, and says it.
        if (lost and JOB in os.environ) or not may_speak():
            raise typer.Exit(1) from None
        if lost:
            raise UserError("lost contact with another process, which has ended. Its own messages say why") from error
        raise


def lost_contact(error: BaseException) -> bool:
    """Whether an exception means that another process of the job has gone."""
    if type(error).__name__.startswith("Dist") and isinstance(error, RuntimeError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS_OF_LOSS)


# ── signs of life ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Watch:
    """Heartbeats of this process, and a thread that looks at everyone's and ends the job when one has none.

    Every process passes the same beats, so the one that hangs is the one that is behind in their number. With a single
    process nothing is written and nothing is watched.

    Args:
        folder: where the heartbeats lie, seen by all machines of the job.
        rank, count: number of this process, and of how many.
        timeout: seconds without a beat after which a process counts as hung.
        advice: how to go on after the job was ended.
        before_exit: called before this process is ended.
    """

    folder: Path
    rank: int
    count: int
    timeout: float
    advice: str
    before_exit: Callable[[], None] = lambda: None
    beats: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _parent: int = field(default_factory=os.getppid)

    def __enter__(self) -> Watch:
        if self.count > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.beat("starting")
            threading.Thread(target=self._watch, name="tropd-watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self.count > 1:
            with contextlib.suppress(OSError):
                self._path(self.rank).unlink()
                self.folder.rmdir()  # the last one succeeds

    def beat(self, doing: str) -> None:
        """A sign of life. `doing` is named should it be the last; it starts with "waiting" if others do the work."""
        if self.count == 1:
            return
        self.beats += 1
        sign = {"beats": self.beats, "doing": doing, "pid": os.getpid(), "host": socket.gethostname()}
        temporary = self._path(self.rank).with_suffix(".tmp")
        with contextlib.suppress(OSError):  # a full disk must not end a job that survives it
            temporary.write_text(json.dumps(sign), encoding="utf-8")
            os.replace(temporary, self._path(self.rank))

    def _path(self, rank: int) -> Path:
        return self.folder / f"process-{rank}.json"

    def _watch(self) -> None:
        # Times are when this process saw a beat change: the clocks of several machines need not agree.
        signs: dict[int, dict[str, Any]] = {}
        seen = dict.fromkeys(range(self.count), time.monotonic())
        while not self._stop.wait(min(5.0, self.timeout / 10)):
            if JOB in os.environ and os.getppid() != self._parent:
                os._exit(1)  # the launcher was killed: nobody would end us
            now = time.monotonic()
            for rank in seen:
                sign = _read(self._path(rank))
                if sign and sign != signs.get(rank):
                    signs[rank], seen[rank] = sign, now
            if self.count == len(signs) and now - min(seen.values()) > self.timeout:
                self._end(signs)

    def _end(self, signs: dict[int, dict[str, Any]]) -> None:
        """Names the process that is behind, kills it if it is on this machine, and ends this one."""
        rank = min(signs, key=lambda r: (signs[r]["beats"], signs[r]["doing"].startswith("waiting")))
        sign = signs[rank]
        if may_speak():
            self.before_exit()
            sys.stderr.write(
                f"error: process {rank} (pid {sign['pid']} on {sign['host']}) gave no sign of life for "
                f"{self.timeout:g} seconds; it was {sign['doing']}. The job was ended. {self.advice}. "
                "If it is only slow, raise hang_timeout\n"
            )
            sys.stderr.flush()
        if sign["host"] == socket.gethostname() and rank != self.rank:
            with contextlib.suppress(OSError):
                os.kill(sign["pid"], signal.SIGKILL)
        os._exit(1)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
