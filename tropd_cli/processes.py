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

#: Environment variable: folder that a command with --num-processes shares with the workers it starts.
JOB = "TROPD_JOB"
#: File in it that says that the reader of the first worker's output has gone.
READER_GONE = "reader-gone"
#: How the process groups' errors about a peer that has gone read.
SIGNS_OF_LOSS = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "gloo", "timed out waiting")
#: Seconds in which a process that fails may give its reason, before those that lost it say that they did.
PATIENCE = 2.0


def is_worker() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process is the one that shows and prints."""
    return int(os.environ.get("RANK", "0")) == 0


# ── one voice ───────────────────────────────────────────────────────────────────────────────────────────────────────


def register() -> None:
    """Tells our launcher, if it is ours, which process it can pass signals to."""
    if JOB in os.environ and is_worker():
        Path(os.environ[JOB], f"pid-{os.environ.get('RANK', '0')}").write_text(str(os.getpid()), encoding="utf-8")


def reader_gone() -> None:
    """Tells our launcher that nobody reads our output any more, as with `| head`: the others lose this process, and no
    harm is done."""
    if JOB in os.environ:
        with contextlib.suppress(OSError):
            Path(os.environ[JOB], READER_GONE).touch()


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
        register()
        yield
    except typer.Exit:
        raise
    except Exception as error:
        if not is_worker():
            raise
        lost = lost_contact(error)
        if lost and JOB not in os.environ:
            time.sleep(PATIENCE)
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


#: Where a process is when it waits for the others, by the module that runs: the later, the less it is to blame. A
#: backward pass both computes and exchanges gradients.
PLACES = (("torch.autograd.graph", 1), ("torch.distributed", 2))


@dataclass
class Watch:
    """Heartbeats of this process, and a thread that looks at everyone's and ends the job when one has none.

    A beat is given by the work, at the same points in every process; a pulse by the watching thread, with the place where
    the work is just then. When beats stay away, the others wait for the one that hangs, so it is the one without a
    pulse (stopped, or its machine gone), or else the one that is behind in its beats, or else the one that has not
    arrived where the others wait. With a single process nothing is written and nothing is watched.

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
    _sign: dict[str, Any] = field(default_factory=dict)
    _writing: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _worker: int = field(default_factory=threading.get_ident)
    _parent: int = field(default_factory=os.getppid)

    def __enter__(self) -> Watch:
        if self.count > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.beat("starting")
            self._thread = threading.Thread(target=self._watch, name="tropd-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            with contextlib.suppress(OSError):
                self._path(self.rank).unlink()
                self.folder.rmdir()  # the last one succeeds

    def beat(self, doing: str) -> None:
        """A sign of life of the work; `doing` is named should it be the last."""
        self.beats += 1
        if self.count > 1:
            self._write(beats=self.beats, doing=doing)

    def pulse(self) -> None:
        """A sign of life of the process, whatever its work does."""
        self._write(pulse=self._sign.get("pulse", 0) + 1, place=_place(self._worker))

    def _write(self, **news: Any) -> None:
        with self._writing:
            self._sign |= {"pid": os.getpid(), "host": socket.gethostname(), **news}
            temporary = self._path(self.rank).with_suffix(".tmp")
            with contextlib.suppress(OSError):  # a full disk must not end a job that survives it
                temporary.write_text(json.dumps(self._sign), encoding="utf-8")
                os.replace(temporary, self._path(self.rank))

    def _path(self, rank: int) -> Path:
        return self.folder / f"process-{rank}.json"

    def _watch(self) -> None:
        signs = Signs(self.count)
        while not self._stop.wait(min(5.0, self.timeout / 10)):
            if JOB in os.environ and os.getppid() != self._parent:
                os._exit(1)  # the launcher was killed: nobody would end us
            self.pulse()
            signs.look({rank: _read(self._path(rank)) for rank in range(self.count)}, time.monotonic(), self.timeout)
            hung = signs.hung(self.timeout)
            if hung is not None:
                self._end(hung, signs.last[hung])

    def _end(self, rank: int, sign: dict[str, Any]) -> None:
        """Names the process that hangs, kills it if it is on this machine, and ends this one."""
        if may_speak():
            self.before_exit()
            sys.stderr.write(
                f"error: process {rank} (pid {sign['pid']} on {sign['host']}) gave no sign of life for "
                f"{self.timeout:g} seconds; it was {sign['doing']}. The job was ended. {self.advice}. "
                "If it is only slow, raise --hang-timeout\n"
            )
            sys.stderr.flush()
        if sign["host"] == socket.gethostname() and rank != self.rank:
            with contextlib.suppress(OSError):
                os.kill(sign["pid"], signal.SIGKILL)
        os._exit(1)


class Signs:
    """What one process has seen of all processes' heartbeats. Times are its own: clocks of machines need not agree."""

    def __init__(self, count: int) -> None:
        self.last: dict[int, dict[str, Any]] = {}
        self.now = time.monotonic()
        #: rank -> when its beat and its pulse last changed
        self.seen = {name: dict.fromkeys(range(count), self.now) for name in ("beats", "pulse")}

    def look(self, signs: dict[int, dict[str, Any] | None], now: float, timeout: float) -> None:
        """Takes note of what lies there `now`."""
        if now - self.now > timeout / 2:  # it was this process that stood still, perhaps all of them: begin anew
            self.seen = {name: dict.fromkeys(times, now) for name, times in self.seen.items()}
        self.now = now
        for rank, sign in signs.items():
            for name, times in self.seen.items():
                if sign and sign.get(name) != self.last.get(rank, {}).get(name):
                    times[rank] = now
            self.last |= {rank: sign} if sign else {}

    def hung(self, timeout: float) -> int | None:
        """The process that hangs, once some beat is older than `timeout`."""
        if len(self.last) < len(self.seen["beats"]) or self.now - min(self.seen["beats"].values()) <= timeout:
            return None
        lifeless = [rank for rank, time_ in self.seen["pulse"].items() if self.now - time_ > timeout / 2]
        return min(lifeless or self.last, key=lambda rank: (self.last[rank]["beats"], self.last[rank].get("place", 0)))


def _place(thread: int) -> int:
    """How far a thread is between its own work (0) and waiting for the other processes (2). See PLACES."""
    frame, place = sys._current_frames().get(thread), 0
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        place = max([place, *(value for name, value in PLACES if module.startswith(name))])
        frame = frame.f_back
    return place


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
