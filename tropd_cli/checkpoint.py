"""Checkpoints: written aside, fsynced, renamed; verified when read; a torn one is passed over for the one before."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .errors import UserError

WEIGHTS, OPTIMIZER, STATE, MANIFEST = "student.safetensors", "optimizer.pt", "state.json", "manifest.json"


def trained_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes, by name: all weights, or the adapter's."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Writes folder/step-NNNNNN.

    Raises:
        OSError: the disk is full or not writable; nothing half-written stays.
    """
    final = folder / f"step-{step:06d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        weights = {name: p.detach().contiguous().cpu() for name, p in trained_parameters(model).items()}
        try:
            save_file(weights, temporary / WEIGHTS)
            torch.save(optimizer.state_dict(), temporary / OPTIMIZER)
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
    """Restores weights and optimizer in place, and returns the state.

    Raises:
        UserError: the checkpoint belongs to another model.
    """
    weights = load_file(path / WEIGHTS)
    mine = trained_parameters(model)
    if weights.keys() != mine.keys():
        odd = sorted(weights.keys() ^ mine.keys())
        raise UserError(f"checkpoint {path} belongs to another student: parameter '{odd[0]}' is on one side only")
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(weights[name])
    optimizer.load_state_dict(torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True))
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
