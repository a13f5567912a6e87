"""One process or many: the Accelerator of this process, and starting the others through torchrun's library."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import os
import shutil
import signal
import sys
import tempfile
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import typer
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from .config import Config
from .errors import UserError
from .models import resolve_device
from .processes import JOB, READER_GONE, is_worker

#: Seconds between two looks at the workers.
MONITOR_INTERVAL = 0.1


def make_accelerator(config: Config, project_folder: str) -> Accelerator:
    """The Accelerator of this process. Raises UserError for an unknown tracker."""
    device = resolve_device(config.device)
    if device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    bf16 = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    # The watch over the processes names the one that hangs; torch's own timeout, which cannot, comes later.
    # Accelerate knows only the old name of the option below.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.* is deprecated", category=FutureWarning)
    patience = datetime.timedelta(seconds=max(1800.0, 2 * config.hang_timeout))
    try:
        return Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="bf16" if bf16 else "no",
            log_with=config.log_with or None,
            project_dir=project_folder,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=patience),
                # Buffers are the same everywhere. Exchanging them would make forward passes wait for each other, also
                # for one that ran out of memory.
                DistributedDataParallelKwargs(broadcast_buffers=False),
            ],
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"log_with {config.log_with}: {error}. Install the extra: pip install 'tropd[log]'") from error


# ── starting the others ─────────────────────────────────────────────────────────────────────────────────────────────


def start_workers(config: Config, *, reads_input: bool, run: Path | None = None, more: Sequence[str] = ()) -> None:
    """Where several processes are asked for and this is none of them: runs the command in them, and ends with them.

    Args:
        reads_input: whether the command would read standard input.
        run: the run directory, which a failed job can be continued from.
        more: arguments beyond those typed.

    Raises:
        UserError: workers and standard input, or more workers than GPUs.
        Exit: with the exit code, where workers were started.
    """
    if reads_input and (is_worker() or config.num_processes > 1):
        raise UserError("standard input with several processes: they share none. Write the rows to a file first")
    if config.num_processes > 1 and not is_worker():
        cpu = resolve_device(config.device).type == "cpu"
        raise typer.Exit(launch(config.num_processes, [*sys.argv[1:], *more], cpu=cpu, run=run))


def launch(num_processes: int, arguments: list[str], *, cpu: bool, run: Path | None) -> int:
    """Runs this command again as `num_processes` workers of this machine; returns the exit code.

    The workers print for themselves; this process passes signals on and speaks only of a worker that cannot.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    if not cpu and torch.cuda.device_count() < num_processes:
        raise UserError(
            f"--num-processes {num_processes}, but {torch.cuda.device_count()} CUDA devices are here. Lower it, or pass --device cpu"
        )
    if os.environ.get("TROPD_DEBUG") != "1":
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    if cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    with (
        tempfile.TemporaryDirectory(prefix="tropd-job-") as job,
        forwarded_signals(Path(job), num_processes) as received,
    ):
        os.environ[JOB] = job
        try:
            elastic_launch(launch_config(num_processes), sys.executable)(*worker_command(), *arguments)
        except ChildFailedError as error:
            return exit_code(error.failures, Path(job), run, interrupted=bool(received))
        except (SignalException, KeyboardInterrupt):
            return 130
    return 0


def launch_config(num_processes: int) -> Any:
    """torchrun --standalone --nproc_per_node=N, with SIGINT and SIGTERM left to us: torchrun would kill after 30 s."""
    from torch.distributed.launcher.api import LaunchConfig

    ours = {"signals_to_handle": "SIGHUP,SIGQUIT"}
    known = {f.name for f in dataclasses.fields(LaunchConfig)}
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=MONITOR_INTERVAL,
        **{name: value for name, value in ours.items() if name in known},
    )


def worker_command() -> list[str]:
    """What Python runs in a worker: the script that runs here, wherever it is installed."""
    here = sys.argv[0] if Path(sys.argv[0]).name == "tropd" and Path(sys.argv[0]).is_file() else None
    script = here or shutil.which("tropd")
    return [script] if script else ["-m", "tropd_cli.main"]


@contextmanager
def forwarded_signals(job: Path, num_processes: int) -> Iterator[list[int]]:
    """Passes SIGINT and SIGTERM on to the workers, which finish their step, save and end."""
    received: list[int] = []

    def forward(number: int, _: Any) -> None:
        received.append(number)
        registered = list(job.glob("pid-*"))
        if len(registered) < num_processes:
            raise KeyboardInterrupt  # still starting: there is nothing to save
        for path in registered:
            with suppress(OSError, ValueError):
                os.kill(int(path.read_text(encoding="utf-8")), number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(failures: dict[int, Any], job: Path, run: Path | None, *, interrupted: bool) -> int:
    """The job's exit code, and a message about a worker that was killed before it could say anything itself."""
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    killed = {rank: -code for rank, code in codes.items() if code < 0}
    if 130 in codes.values() or (interrupted and len(killed) == len(codes)):
        return 130
    if (job / READER_GONE).exists():
        return 0
    if (job / "message").exists():
        return 1
    resumable = run is not None and (run / "config.yaml").is_file()
    advice = f" Continue with: tropd distill --resume {run}" if resumable else ""
    if killed:
        # SIGTERM is how the others were ended: it comes last among the reasons.
        rank, number = min(killed.items(), key=lambda item: (item[1] == signal.SIGTERM, item[0]))
        reason = " (often by the system, out of memory)" if number == signal.SIGKILL else ""
        sys.stderr.write(
            f"error: process {rank} (pid {failures[rank].pid}) was killed by {signal.Signals(number).name}{reason}; "
            f"the others were ended.{advice}\n"
        )
    else:
        sys.stderr.write(f"error: the processes lost contact with each other.{advice}\n")
    return 1
