"""One process or many: the Accelerator of this process, and starting the others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import torch
from accelerate import Accelerator

from .config import Config
from .errors import UserError
from .models import resolve_device


def make_accelerator(config: Config, project_folder: str) -> Accelerator:
    """The Accelerator of this process. Raises UserError for an unknown tracker."""
    device = resolve_device(config.device)
    if device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    bf16 = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    try:
        return Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="bf16" if bf16 else "no",
            log_with=config.log_with or None,
            project_dir=project_folder,
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"log_with {config.log_with}: {error}. Install the extra: pip install 'tropd[log]'") from error


def is_worker() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch(num_processes: int, arguments: list[str], *, cpu: bool) -> int:
    """Runs this command again as `num_processes` workers through torchrun; returns the exit code."""
    script = shutil.which("tropd") or sys.argv[0]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_processes))}
    if cpu:
        environment["ACCELERATE_USE_CPU"] = "true"
    elif torch.cuda.device_count() < num_processes:
        raise UserError(
            f"--num-processes {num_processes}, but {torch.cuda.device_count()} CUDA devices are here. Lower it, or pass --device cpu"
        )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={num_processes}",
        script,
    ]
    return subprocess.run([*command, *arguments], env=environment, check=False).returncode
