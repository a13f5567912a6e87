"""A whole training step (rollout, score and update) against a peer's, each in a process of its own.

    python -m tests.benchmarks.step                                   # ours alone
    python -m tests.benchmarks.step --peer-python PATH                # PATH: a Python that has trl==1.16.0

The peer is TRL's DistillationTrainer with beta 1 (reverse KL over the whole vocabulary, formed chunk by chunk): the one of
its trainers that needs least time and memory. Both sides load the same two models and the same prompts from one folder,
sample at temperature 1 from the whole vocabulary but the padding and end tokens, which are forbidden on both sides so that
every response has its full length, and take one AdamW step in float32 with as many threads. Runs alternate: ours, peer,
ours, peer. Both sides mark their stages with the same code (tests/benchmarks/process.py):

    rollout           sampling
    score_update      teacher and student forward, loss, backward; up to, not with, the optimizer's step
    step              all of it, optimizer included
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .process import QUIET_THREADS, RESULTS, Stages, hook, write_results

STAGES = ("rollout", "score_update", "step")


def run_ours(folder: Path, responses: int, length: int, threads: int, strategy: str) -> dict[str, Any]:
    """One step through the program's own loop."""
    import torch

    from tropd_cli import train
    from tropd_cli.commands import quiet_libraries
    from tropd_cli.config import build_config
    from tropd_cli.display import Display
    from tropd_cli.launch import make_accelerator
    from tropd_cli.run_directory import RunDirectory
    from tropd_cli.session import Training

    from .shapes import END, PAD

    torch.set_num_threads(threads)
    quiet_libraries()
    config = build_config(
        {
            "student": str(folder / "student"), "teacher": str(folder / "teacher"),
            "data": str(folder / "prompts.jsonl"), "strategy": strategy, "guidance": {"enabled": False}, "steps": 1,
            "prompts_per_step": responses, "rollouts_per_prompt": 1, "max_response_length": length,
            "learning_rate": 1e-5, "device": "cpu", "dtype": "float32", "record": {"every": 0},
        }
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        run = RunDirectory(Path(out))
        t = Training(config, run, Display(active=False), make_accelerator(config, out))
        t.pair.vocabulary.allowed[[PAD, END]] = False
        stages = Stages()
        hook(t.optimizer, "step", before=lambda: stages.end("score_update"))
        stages.start()
        stages.begin("rollout")
        rollout, prefix_limit, seconds = train.roll_out(t)
        stages.end("rollout")
        stages.begin("score_update")
        _, metrics = train.score_and_update(t, rollout, prefix_limit, seconds)
        return stages.report() | {"tokens": int(rollout.lengths.sum()), "loss": metrics["loss"]}


def run_in_process(command: list[str], threads: int) -> dict[str, Any]:
    """Runs one side; its last line is the result. Raises SystemExit with what it said if it failed."""
    environment = {**os.environ, **QUIET_THREADS, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One case: every run of both sides, and the medians' ratios if there is a peer."""
    from .shapes import qwen2, save_case

    with tempfile.TemporaryDirectory() as folder:
        config = qwen2(args.vocabulary, hidden=args.hidden, layers=args.layers)
        save_case(Path(folder), config, prompts=args.responses, prompt_length=args.prompt, seed=args.seed)
        job = ["--folder", folder, "--responses", str(args.responses), "--length", str(args.length)]
        job += ["--threads", str(args.threads)]
        commands = {"ours": [sys.executable, "-m", "tests.benchmarks.step", *job, "--strategy", args.strategy]}
        if args.peer_python:
            commands["peer"] = [args.peer_python, "-m", "tests.benchmarks.peer", *job]
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in commands}
        for _ in range(args.repeats):
            for side, command in commands.items():
                runs[side].append(run_in_process(command, args.threads))
                print(side, json.dumps(runs[side][-1]), file=sys.stderr, flush=True)
    expected = args.responses * args.length
    early = [side for side, results in runs.items() for r in results if r["tokens"] != expected]
    if early:
        raise SystemExit(f"a response ended early ({', '.join(early)}): the two sides did not do the same work")
    names = ("vocabulary", "hidden", "layers", "responses", "prompt", "length", "threads", "strategy", "repeats")
    medians = {side: median_stages(results) for side, results in runs.items()}
    case = {name: getattr(args, name) for name in names} | {"runs": runs, "medians": medians}
    yield case | ({"ratios": ratios(medians["ours"], medians["peer"])} if "peer" in medians else {})


def median_stages(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Stage -> quantity -> median over the runs of one side."""
    first = results[0]
    return {
        stage: {quantity: statistics.median(r[stage][quantity] for r in results) for quantity in first[stage]}
        for stage in STAGES
    }


def ratios(ours: dict[str, dict[str, float]], peer: dict[str, dict[str, float]]) -> dict[str, float]:
    """Ours divided by the peer's: below 1 is less."""
    found = {f"{stage}_cpu_seconds": ours[stage]["cpu_seconds"] / peer[stage]["cpu_seconds"] for stage in STAGES}
    return found | {"score_update_growth": ours["score_update"]["growth"] / peer["score_update"]["growth"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--responses", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--strategy", default="trust-region")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer-python", help="Python of an environment with trl==1.16.0")
    parser.add_argument("--folder", type=Path, help="one step of ours on the models in this folder, in this process")
    parser.add_argument("--out", type=Path, default=RESULTS / "step.json")
    args = parser.parse_args()
    if args.folder:
        print(json.dumps(run_ours(args.folder, args.responses, args.length, args.threads, args.strategy)))
    else:
        write_results(args.out, "step", measure(args))


if __name__ == "__main__":
    main()
