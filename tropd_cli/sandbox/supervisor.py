"""The process that builds boxes, watches them and takes them down. Started by the program as a script of its own.

    supervisor -> keeper (leaves the namespaces) -> first process of the box (makes its root) -> the untrusted code

Reads one job as JSON from stdin, writes one report as JSON to stdout. Standard library only; no plug-in, no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn

import isolation
import roles

FIRST_LOOK_SECONDS, LOOK_SECONDS = 0.2, 0.1  # the sum of a box's memory is checked this often
STDERR_BYTES = 64 << 10


@dataclass
class Box:
    """One box from outside: its pipes and what came out of them."""

    role: str
    keeper: int
    user: int
    output: bytearray = field(default_factory=bytearray)
    errors: bytearray = field(default_factory=bytearray)
    status: bytearray = field(default_factory=bytearray)
    verdict: bytearray = field(default_factory=bytearray)


class Violation(Exception):
    """A limit was reached; `kind` is the status of the report."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def start(job: dict[str, Any], mode: str, limits: dict[str, Any], channels: list[int | None], watch: Any) -> Box:
    """Forks a box that plays `job` over the first of `channels` and registers its pipes with the selector `watch`."""
    pipes = {name: os.pipe() for name in ("output", "errors", "status", "verdict")}
    user = isolation.NOBODY if mode == "user-namespace" else isolation.unused_user_id()
    root = tempfile.mkdtemp(prefix="tropd-box-")
    limits["roots"].append(root)
    keeper = os.fork()
    if keeper == 0:
        ends = {name: pipe[1] for name, pipe in pipes.items()}
        try:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            isolation.prctl(isolation.PR_SET_PDEATHSIG, signal.SIGKILL)
            close_all(*channels[1:])
            keep(job, mode, limits, user, root, channels[0], ends)
        except BaseException as error:
            report(ends["status"], {"failed": f"{type(error).__name__}: {error}"})
        finally:
            os._exit(1)
    box = Box(job["role"], keeper, user)
    for name, (reader, writer) in pipes.items():
        os.close(writer)
        os.set_blocking(reader, False)
        watch.register(reader, selectors.EVENT_READ, (box, name))
    return box


def keep(
    job: dict[str, Any], mode: str, limits: dict[str, Any], user: int, root: str, channel: int | None, ends: Any
) -> None:
    """The keeper: builds the walls, starts the code behind them and reports how it ended."""
    if mode == "other-user":
        os.chown(root, user, user)
        os.chdir(root)
        run_and_report(job, mode, limits, user, channel, ends)
    isolation.enter_namespaces(mode)
    first = os.fork()
    if first == 0:
        try:
            isolation.prctl(isolation.PR_SET_PDEATHSIG, signal.SIGKILL)
            isolation.enter_private_root(root, user, limits["tmp_bytes"])
            run_and_report(job, mode, limits, user, channel, ends)
        except BaseException as error:
            report(ends["status"], {"failed": f"{type(error).__name__}: {error}"})
        finally:
            os._exit(1)
    close_all(channel, *ends.values())
    os.waitpid(first, 0)
    os._exit(0)


def run_and_report(
    job: dict[str, Any], mode: str, limits: dict[str, Any], user: int, channel: int | None, ends: Any
) -> NoReturn:
    """Forks the untrusted code, collects every process of the box, reports how the first one ended, and ends."""
    code = os.fork()
    if code == 0:
        try:
            os.setsid()
            enter_role(job, channel, ends)
            isolation.limit_resources(limits)
            isolation.drop_privileges(mode, user)
        except BaseException as error:
            report(ends["status"], {"failed": f"{type(error).__name__}: {error}"})
            os._exit(1)
        os.close(ends["status"])
        roles.play(job)
    close_all(channel, ends["output"], ends["errors"], ends["verdict"])
    while True:
        process, status = os.wait()
        if process == code:
            break
    report(ends["status"], {"exit": os.waitstatus_to_exitcode(status)})
    os._exit(0)


def enter_role(job: dict[str, Any], channel: int | None, ends: Any) -> None:
    """Gives the code its stdin, stdout and stderr, and nothing else that is open in this process."""
    stdin = os.memfd_create("stdin")
    os.write(stdin, b"") if not job.get("stdin") else write_all(stdin, job["stdin"].encode())
    os.lseek(stdin, 0, os.SEEK_SET)
    os.dup2(stdin, 0)
    os.dup2(ends["output"], 1)
    os.dup2(ends["errors"], 2)
    wanted = {ends["status"]}
    if channel is not None:
        job["channel"] = channel
        wanted.add(channel)
    if job["role"] == "judge":
        job["verdict"] = ends["verdict"]
        wanted.add(ends["verdict"])
    kept = sorted(wanted)
    for below, above in zip([2, *kept], [*kept, 1 << 20], strict=True):
        os.closerange(below + 1, above)
    sys.stdin = os.fdopen(0, encoding="utf-8", errors="replace", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="replace", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="replace", closefd=False)


def close_all(*descriptors: int | None) -> None:
    """Closes what this process holds, so that the other side of a pipe notices the end of the one that uses it."""
    for descriptor in descriptors:
        if descriptor is not None:
            os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def report(descriptor: int, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        write_all(descriptor, json.dumps(message).encode() + b"\n")


def watch_boxes(boxes: list[Box], watch: Any, limits: dict[str, Any]) -> None:
    """Reads the pipes until the box that decides has ended. Raises Violation when a limit is reached."""
    deadline = time.monotonic() + limits["wall_seconds"]
    look = time.monotonic() + FIRST_LOOK_SECONDS
    deciding = boxes[-1]
    while True:
        now = time.monotonic()
        if now > deadline:
            raise Violation("timeout", f"ran longer than {limits['wall_seconds']:g} s")
        if now > look:
            used = memory_below({box.keeper for box in boxes})
            if used > limits["memory_bytes"]:
                raise Violation("memory", f"its processes used more than {limits['memory_bytes'] >> 20} MB together")
            look = time.monotonic() + LOOK_SECONDS
        for key, _ in watch.select(max(0.0, min(deadline, look) - now)):
            box, name = key.data
            if not drain(box, name, key.fd, limits):
                watch.unregister(key.fd)
                os.close(key.fd)
        if deciding.status and (b'"gone"' not in deciding.verdict or boxes[0].status):
            return


def drain(box: Box, name: str, descriptor: int, limits: dict[str, Any]) -> bool:
    """Takes what a pipe has to give; False at its end."""
    data = os.read(descriptor, 1 << 16)
    kept: bytearray = getattr(box, name)
    if name == "errors":
        kept += data
        del kept[:-STDERR_BYTES]
    else:
        kept += data
        if len(kept) > limits["output_bytes"]:
            raise Violation("output", f"wrote more than {limits['output_bytes'] >> 10} KB")
    return bool(data)


def memory_below(roots: set[int]) -> int:
    """Resident bytes of all descendants of these processes, shared pages counted once per process."""
    parent, resident = {}, {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{entry}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
                parent[int(entry)], resident[int(entry)] = int(fields[1]), int(fields[21])
    family, size = set(roots), 0
    while len(family) != size:
        size = len(family)
        family.update(process for process, above in parent.items() if above in family)
    return sum(resident.get(process, 0) for process in family - roots) * os.sysconf("SC_PAGE_SIZE")


def take_down(boxes: list[Box], mode: str) -> None:
    """Kills everything in the boxes and returns when no process of theirs is left."""
    while True:
        for box in boxes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(box.keeper, signal.SIGKILL)
            if mode == "other-user":
                kill_all_of(box.user)
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.002)
        except ChildProcessError:
            return


def kill_all_of(user: int) -> None:
    """Kills every process of a user id that only one box has."""
    killer = os.fork()
    if killer == 0:
        try:
            os.setresuid(user, user, user)
            os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    os.waitpid(killer, 0)


def run_case(case: list[dict[str, Any]], mode: str, limits: dict[str, Any]) -> dict[str, Any]:
    """Plays the roles of one case together; the last one decides when it is over."""
    boxes: list[Box] = []
    result: dict[str, Any] = {"kind": "ended", "reason": ""}
    channels: list[int | None] = [None]
    if len(case) == 2:
        channels = [end.detach() for end in socket.socketpair()]
    watch = selectors.DefaultSelector()
    try:
        for job in case:
            boxes.append(start(job, mode, limits, channels, watch))
            close_all(channels.pop(0))
        watch_boxes(boxes, watch, limits)
    except Violation as violation:
        result = {"kind": violation.kind, "reason": str(violation)}
    finally:
        take_down(boxes, mode)
        for key in list(watch.get_map().values()):
            with contextlib.suppress(BlockingIOError, Violation):
                while drain(*key.data, key.fd, limits):
                    pass
            os.close(key.fd)
        watch.close()
    return result | {"boxes": [summary(box) for box in boxes]}


def summary(box: Box) -> dict[str, Any]:
    lines = [json.loads(line) for line in bytes(box.status).splitlines()]
    return {
        "role": box.role,
        "output": box.output.decode("utf-8", "replace"),
        "errors": box.errors.decode("utf-8", "replace"),
        "status": lines[0] if lines else {},
        "verdict": bytes(box.verdict[4:]).decode("utf-8", "replace"),
    }


def same_output(actual: str, expected: str) -> bool:
    """Line by line without outer blanks; numbers by value, so that `1.0` is `1`."""
    left, right = (text.strip().splitlines() for text in (actual, expected))
    if len(left) != len(right):
        return False
    for one, other in zip(left, right, strict=True):
        words, wanted = one.split(), other.split()
        if len(words) != len(wanted) or not all(map(same_word, words, wanted)):
            return False
    return True


def same_word(actual: str, expected: str) -> bool:
    if actual == expected:
        return True
    try:
        return Decimal(actual) == Decimal(expected)
    except InvalidOperation:
        return False


def main() -> None:
    job = json.load(sys.stdin)
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != os.path.dirname(os.path.realpath(__file__))]
    limits = job["limits"] | {"roots": []}
    isolation.prctl(isolation.PR_SET_PDEATHSIG, signal.SIGTERM)
    isolation.prctl(isolation.PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    results = []
    try:
        for case in job["cases"]:
            results.append(run_case(case["roles"], job["mode"], limits))
            result = results[-1]
            ended_well = result["kind"] == "ended" and result["boxes"][-1]["status"].get("exit") == 0
            if "expected" in case:
                result["same"] = ended_well and same_output(result["boxes"][-1]["output"], case["expected"])
                if not result["same"]:
                    break
    finally:
        for root in limits["roots"]:
            shutil.rmtree(root, ignore_errors=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
