"""A run on disk: config.yaml, environment.json, metrics.jsonl, rollouts/, checkpoints/, student/."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .config import RESUMABLE, Config, build_config, read_yaml, to_yaml
from .errors import UserError
from .report.rows import TokenRow, dump_row

PACKAGES = ("tropd", "torch", "transformers", "accelerate", "peft", "tokenizers", "safetensors")

UNFINISHED_CONFIG = ".config.yaml.tmp"


class RunDirectory:
    """Paths of one run and the files that grow with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.rollouts = path / "rollouts"
        self.checkpoints = path / "checkpoints"
        self.student = path / "student"
        self.best = path / "best"
        self.teacher_responses = path / "teacher_responses"

    def refuse_existing(self, *, overwrite: bool) -> None:
        """Raises UserError when something is here already that must not be replaced."""
        if not self.path.exists():
            return
        if self.path.is_dir() and {p.name for p in self.path.iterdir()} <= {UNFINISHED_CONFIG}:
            return
        if not overwrite:
            raise UserError(
                f"'{self.path}' exists already. Continue it with: tropd distill --resume {self.path}, replace it with "
                "--overwrite, or choose another --output"
            )
        if not self.config.is_file():
            raise UserError(
                f"'{self.path}' is no run directory (no config.yaml), so --overwrite leaves it alone. Choose another --output"
            )

    def create(self, config: Config, *, overwrite: bool, prompts: str | None = None) -> None:
        """Makes a new run directory.

        Args:
            prompts: what came in on standard input, kept so that the run can be resumed.

        Raises:
            UserError: it exists already (and is not to be overwritten), or cannot be written.
        """
        self.refuse_existing(overwrite=overwrite)
        try:
            if self.config.is_file():
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            if prompts is not None:
                config = config.model_copy(update={"data": str(self.path / "prompts.jsonl")})
            # The configuration comes first and at once: with it, a run that dies here can be resumed or overwritten.
            self.write_config(config)
            if prompts is not None:
                (self.path / "prompts.jsonl").write_text(prompts, encoding="utf-8")
            for folder in (self.rollouts, self.checkpoints):
                folder.mkdir(exist_ok=True)
            (self.path / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")
            self.metrics.touch()
        except OSError as error:
            raise UserError(
                f"run directory '{self.path}' cannot be written: {error.strerror}. Choose another --output"
            ) from error

    def write_config(self, config: Config) -> None:
        """Writes config.yaml at once. Raises OSError."""
        unfinished = self.path / UNFINISHED_CONFIG
        unfinished.write_text(to_yaml(config), encoding="utf-8")
        os.replace(unfinished, self.config)

    def resumed_config(self, changes: dict[str, Any]) -> Config:
        """The run's configuration with what may change on resume changed.

        Raises:
            UserError: no run here, or an option that must stay as it was.
        """
        if not self.config.is_file():
            raise UserError(
                f"'{self.path}' is no run directory: it has no config.yaml. --resume takes the directory that tropd distill printed"
            )
        stored = read_yaml(str(self.config))
        old = build_config(stored)
        new = build_config(stored, changes)
        differing = [k for k in Config.model_fields if getattr(old, k) != getattr(new, k) and k not in RESUMABLE]
        if differing:
            key = differing[0]
            raise UserError(
                f"--resume keeps a run's options, but {key} is {getattr(old, key)!r} in {self.config} and {getattr(new, key)!r} now. "
                f"Only {', '.join(sorted(RESUMABLE - {'output', 'plugin'}))} may change; for anything else start a new run"
            )
        # A plug-in is code: it runs only if the user names it again.
        named = set(new.plugin if "plugin" in changes else [])
        missing = [p for p in old.plugin if p not in named]
        if missing:
            raise UserError(
                f"the run uses the plug-in file '{missing[0]}', which runs only if you name it again: --plugin {missing[0]}"
            )
        return new.model_copy(update={"output": str(self.path)})

    def append(self, row: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl and flushes it. Raises UserError when the disk is full."""
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
        except OSError as error:
            raise UserError(
                f"{self.metrics} cannot be written: {error.strerror}. The last checkpoint is untouched; make room, then: "
                f"tropd distill --resume {self.path}"
            ) from error

    def rows(self) -> list[dict[str, Any]]:
        """All complete lines of metrics.jsonl; a torn last line is left out."""
        return read_json_lines(self.metrics)

    def cut_back(self, step: int) -> None:
        """Drops metrics and recorded rollouts after `step`, as a resumed run writes them again.

        Raises:
            UserError: the disk is full.
        """
        kept = [row for row in self.rows() if row["step"] <= step]
        temporary = self.metrics.with_suffix(".tmp")
        try:
            self.rollouts.mkdir(exist_ok=True)
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            os.replace(temporary, self.metrics)
            for path in [*self.rollouts.glob("step-*.jsonl"), *self.rollouts.glob("*.tmp")]:
                if path.suffix == ".tmp" or int(path.stem.split("-")[1]) > step:
                    path.unlink()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}. Make room, then resume again") from error

    def record(self, step: int, rows: Iterable[TokenRow]) -> None:
        """Writes rollouts/step-NNNNNN.jsonl at once. Raises OSError when the disk is full."""
        path = self.rollouts / f"step-{step:06d}.jsonl"
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(dump_row(row) + "\n" for row in rows)
        os.replace(temporary, path)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON Lines file up to the first torn line; [] when there is no file."""
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def cut_torn_line(path: Path) -> None:
    """Cuts off what a process that died while writing left behind the last line end, so that lines can be added."""
    if path.is_file() and path.stat().st_size:
        with path.open("rb+") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)


def default_output(strategy: str) -> str:
    """runs/STRATEGY-UTCTIME."""
    return f"runs/{strategy}-{datetime.datetime.now(datetime.timezone.utc):%Y%m%d-%H%M%S}"


def environment() -> dict[str, Any]:
    """Versions and machine: what a rerun needs to know beside the configuration."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "packages": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": devices or [platform.processor() or platform.machine()],
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }
