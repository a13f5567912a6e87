"""A script: runs that are hit at random moments, resumed, and compared with a run that nobody disturbed.

Usage: python -m tests.chaos FOLDER MOMENTS SEED -- options of a small `tropd distill`. One JSON line per moment; exit 1
when one of them differs.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import peft  # noqa: F401  imported before the processes are forked
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from safetensors.torch import load_file

from tropd_cli import checkpoint, train  # noqa: F401

from .forked import Job, start, tropd

PROCESSES = 2
STEPS = 8
VOLATILE = {"seconds_rollout", "seconds_teacher", "seconds_update", "tokens_per_second", "peak_memory_bytes"}
#: What can happen, and the exit codes it may lead to.
EVENTS = ("kill one", "kill all", "kill in a checkpoint", "SIGTERM", "SIGINT", "full disk", "corrupted file")


def state(run: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor], dict[str, bytes]]:
    """(metrics without the machine's numbers, weights of the student, recorded rollouts)."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if k not in VOLATILE} for row in rows]
    rollouts = {path.name: path.read_bytes() for path in (run / "rollouts").iterdir()}
    return kept, load_file(run / "student" / "model.safetensors"), rollouts


def same(first: Path, second: Path, *, rollouts_may_lack: bool = False) -> bool:
    """Bit for bit. On a full disk recorded rollouts may be left out, with a warning; those that are there are equal."""
    (rows, weights, rollouts), (others, other_weights, other_rollouts) = state(first), state(second)
    equal = weights.keys() == other_weights.keys() and all(torch.equal(weights[k], other_weights[k]) for k in weights)
    if rollouts_may_lack:
        rollouts = {name: rollouts[name] for name in other_rollouts}
    return equal and rows == others and rollouts == other_rollouts


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def wait_for(job: Job, run: Path, count: int, extra: float) -> None:
    """Until `count` lines of metrics are there, then `extra` seconds more."""
    while lines(run) < count and not job.ended():
        time.sleep(0.005)
    time.sleep(extra)


def dying_in_a_checkpoint(draw: random.Random, arguments: list[str]) -> Any:
    """The command line, killed by itself inside the first or second checkpoint, at one of its writes or syncs."""
    name, moment = draw.choice(["save_file", "checksum", "sync", "rename"]), draw.randrange(1, 6)
    owner, attribute = (os, "replace") if name == "rename" else (checkpoint, name)
    genuine, calls = getattr(owner, attribute), [0]

    def deadly(*args: Any, **options: Any) -> Any:
        inside = name != "rename" or "checkpoints" in str(args[0])
        calls[0] += inside
        if inside and calls[0] == min(moment, 2 if name in ("save_file", "rename") else moment):
            if name == "save_file":
                Path(args[1]).write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        return genuine(*args, **options)

    def run() -> int | None:
        setattr(owner, attribute, deadly)
        return tropd(*arguments)()

    return run


def on_a_small_disk(limit: int, arguments: list[str]) -> Any:
    """The command line under a quota: writing more than `limit` bytes into any file fails, as on a full disk."""

    def run() -> int | None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return tropd(*arguments)()

    return run


def corrupt(draw: random.Random, run: Path) -> str:
    """Damages a random file of the newest checkpoint. Returns its name, or "" without a checkpoint."""
    found = checkpoint.checkpoints(run / "checkpoints")
    if not found:
        return ""
    path = draw.choice(sorted(found[0].iterdir()))
    content = bytearray(path.read_bytes())
    if draw.random() < 0.5:
        content = content[: draw.randrange(len(content))]
    else:
        content[draw.randrange(len(content))] ^= 0xFF
    path.write_bytes(bytes(content))
    return f"{found[0].name}/{path.name}"


def disturb(draw: random.Random, event: str, run: Path, arguments: list[str], log: Path) -> str:
    """Runs the job until it is hit and has ended. Returns what happened."""
    function = tropd(*arguments)
    if event == "kill in a checkpoint":
        function = dying_in_a_checkpoint(draw, arguments)
    if event == "full disk":
        function = on_a_small_disk(draw.choice([1500, 6000, 30_000, 100_000]), arguments)
    job = start(PROCESSES, function, log)
    moment, extra = draw.randrange(STEPS), 0.3 * draw.random()
    if event in ("kill one", "kill all", "SIGTERM", "SIGINT", "corrupted file"):
        wait_for(job, run, moment, extra)
        number = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}.get(event, signal.SIGKILL)
        job.send(number, only=draw.randrange(PROCESSES) if event == "kill one" else None)
    codes = job.wait(60.0)
    assert None not in codes, f"{event}: a process lived on for a minute after it, codes {codes}\n{log.read_text()}"
    damaged = corrupt(draw, run) if event == "corrupted file" else ""
    return f"{event} after {lines(run)} lines, codes {codes} {damaged}".strip()


def moment(folder: Path, number: int, draw: random.Random, event: str, options: list[str]) -> dict[str, Any]:
    """One disturbed run and its resumption."""
    run, log = folder / f"moment-{number}", folder / f"moment-{number}.log"
    whole = ["distill", *options, "--output", str(run)]
    happened = disturb(draw, event, run, whole, log)
    again = ["distill", "--resume", str(run)] if (run / "config.yaml").is_file() else whole
    codes = start(PROCESSES, tropd(*again), log).wait(120.0)
    good = codes == [0] * PROCESSES and same(folder / "whole", run, rollouts_may_lack=event == "full disk")
    if not good:
        print(log.read_text(), file=sys.stderr)
    return {"moment": number, "happened": happened, "resumed": codes, "same": good}


def main(folder: Path, moments: int, seed: int, options: list[str]) -> int:
    options = [*options, "--steps", str(STEPS)]
    codes = start(PROCESSES, tropd("distill", *options, "--output", str(folder / "whole")), folder / "whole.log").wait(
        120.0
    )
    if any(codes):
        sys.exit(f"the undisturbed run ended with {codes}:\n{(folder / 'whole.log').read_text()}")
    draw, results = random.Random(seed), []
    for number in range(moments):
        results.append(moment(folder, number, draw, EVENTS[number % len(EVENTS)], options))
        print(json.dumps(results[-1]), flush=True)
    return 0 if all(result["same"] for result in results) else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    cut = sys.argv.index("--")
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[cut + 1 :]))
