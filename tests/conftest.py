"""One thread and passive waiting for every test, set before torch is imported; tiny models on disk, made once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tiny random student and teacher with one tokenizer, and a file of prompts with answers."""
    import json

    from .tiny import tiny_model, tiny_tokenizer

    root = tmp_path_factory.mktemp("tiny")
    for role, kind, seed in (("student", "llama", 0), ("teacher", "llama", 5)):
        tiny_model(kind, seed=seed).model.save_pretrained(root / role)
        tiny_tokenizer().save_pretrained(root / role)
    rows = [{"prompt": " ".join(f"w{(7 * i + j) % 58}" for j in range(3 + i % 3)), "answer": str(i)} for i in range(12)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"student": root / "student", "teacher": root / "teacher", "data": root / "prompts.jsonl"}


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its first precision and device for the process: forget them between tests."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def registries_as_they_were() -> Iterator[None]:
    """Plug-in files that a test runs register for the process: forget them afterwards."""
    from strategies import OUTLIERS, STRATEGIES
    from strategies.registry import Registry

    before = [(registry, dict(registry._classes)) for registry in (STRATEGIES, OUTLIERS)]
    files = dict(Registry._files)
    yield
    for registry, classes in before:
        registry._classes = classes
    Registry._files.clear()
    Registry._files.update(files)
