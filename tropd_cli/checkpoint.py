"""Checkpoints: written aside, fsynced, renamed; verified when read; a torn one is passed over for the one before."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from .errors import UserError
from .sharding import cut_like, gathered

WEIGHTS, OPTIMIZER, STATE, MANIFEST = "student.safetensors", "optimizer.pt", "state.json", "manifest.json"


def trained_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes, by name: all weights, or the adapter's."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: bool
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(trained weights by name, state of the optimizer), whole, on a process that keeps them. All processes take part."""
    weights = gathered(trained_parameters(model), keep=keep)
    moments = optimizer.state_dict()
    moments["state"] = {number: gathered(values, keep=keep) for number, values in moments["state"].items()}
    return weights, moments


def save_checkpoint(
    folder: Path, step: int, weights: dict[str, torch.Tensor], moments: dict[str, Any], state: dict[str, Any]
) -> Path:
    """Writes folder/step-NNNNNN from a snapshot.

    Raises:
        OSError: the disk is full or not writable; nothing half-written stays.
    """
    final = folder / f"step-{step:06d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        try:
            save_file({name: p.detach().contiguous().cpu() for name, p in weights.items()}, temporary / WEIGHTS)
            torch.save(moments, temporary / OPTIMIZER)
        except OSError:
            raise
        except Exception as error:  # both libraries raise their own kinds when the disk is full
            raise OSError(f"{type(error).__name__}: {error}") from error
        (temporary / STATE).write_text(json.dumps({"step": step, **state}), encoding="utf-8")
        sums = {name: checksum(temporary / name) for name in (WEIGHTS, OPTIMIZER, STATE)}
        (temporary / MANIFEST).write_text(json.dumps(sums, indent=2), encoding="utf-8")
        for path in temporary.iterdir():
            sync(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def prune(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints."""
    for path in checkpoints(folder)[keep:]:
        shutil.rmtree(path, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)


def latest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """(newest checkpoint whose checksums hold, or None; what was wrong with newer ones)."""
    problems = []
    for path in checkpoints(folder):
        problem = damage(path)
        if problem is None:
            return path, problems
        problems.append(f"{path}: {problem}")
    return None, problems


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        sums = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name in (WEIGHTS, OPTIMIZER, STATE):
            if sums.get(name) != checksum(path / name):
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError) as error:
        return f"unreadable ({error})"
    return None


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restores weights and optimizer in place, cut as they are here, and returns the state. All processes take part.

    Raises:
        UserError: the checkpoint belongs to another model.
    """
    mine = trained_parameters(model)
    with safe_open(path / WEIGHTS, framework="pt") as weights, torch.no_grad():
        odd = sorted(set(weights.keys()) ^ mine.keys())
        if odd:
            raise UserError(f"checkpoint {path} belongs to another student: parameter '{odd[0]}' is on one side only")
        for name, parameter in mine.items():
            parameter.copy_(cut_like(weights.get_tensor(name), parameter))
    # Mapped, not read: of a sharded optimizer one whole tensor at a time is enough.
    moments = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in moments["state"].items():
        for name, value in values.items():
            if value.dim():
                values[name] = cut_like(value, parameters[number])
    optimizer.load_state_dict(moments)
    return dict(json.loads((path / STATE).read_text(encoding="utf-8")))


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    """hashlib.file_digest for Python 3.10."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
