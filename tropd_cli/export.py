"""student/: the trained model as transformers loads it, with a card that says how it was made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from . import __version__
from .config import Config, to_yaml
from .models import load_model
from .pair import HOST, Pair, model_path
from .sharding import gathered


def student_weights(pair: Pair, *, keep: bool) -> dict[str, Tensor] | None:
    """A sharded student's weights, whole, on a process that keeps them; None for a student that is whole anyway. All
    processes take part."""
    return gathered(pair.student.model.state_dict(keep_vars=True), keep=keep) if pair.sharded else None


def save_student(
    pair: Pair, config: Config, folder: Path, metrics: dict[str, Any], weights: dict[str, Tensor] | None = None
) -> None:
    """Writes weights (LoRA: the adapter, and with `merge` the merged model beside it), tokenizer and card.

    Written aside and renamed, so that a folder of this name is always complete.
    """
    _write(pair, pair.student.model, folder, model_card(config, metrics), weights)
    if config.lora_rank and config.merge:
        from peft import PeftModel

        # Merging in place and back would round the frozen weights: a fresh copy is merged.
        name, dtype = model_path(config.student), pair.compute_dtype
        base = load_model(name, role="student", dtype=dtype, device=HOST, revision=config.student_revision)
        merged = PeftModel.from_pretrained(base.model, folder).merge_and_unload()
        _write(pair, merged, folder.with_name(f"{folder.name}-merged"), model_card(config, metrics))


def _write(pair: Pair, model: Any, folder: Path, card: str, weights: dict[str, Tensor] | None = None) -> None:
    """Aside, then renamed."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    _save(pair, model, temporary, weights)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _save(pair: Pair, model: Any, folder: Path, weights: dict[str, Tensor] | None) -> None:
    model.save_pretrained(folder, state_dict=weights)
    # The checkpoint's own recommendation, as it was: transformers refuses to save some that it loads.
    pair.student.generation_config.to_json_file(folder / "generation_config.json", use_diff=True)
    pair.tokenizer.save_pretrained(folder)


def model_card(config: Config, metrics: dict[str, Any]) -> str:
    """README.md of a student: base, teacher, method, last numbers and the whole configuration."""
    numbers = {k: v for k, v in metrics.items() if k.startswith("eval_") and v is not None}
    lines = "\n".join(f"| {name.removeprefix('eval_')} | {value:.4g} |" for name, value in numbers.items())
    table = f"\n## Held-out numbers\n\n| metric | value |\n|---|---|\n{lines}\n" if lines else ""
    base = (
        f"base_model: {config.student}\n"
        if "/" in str(config.student) and not Path(str(config.student)).exists()
        else ""
    )
    return f"""---
library_name: {"peft" if config.lora_rank else "transformers"}
{base}tags: [on-policy-distillation, tropd]
---

# {Path(str(config.student)).name}, distilled by {Path(str(config.teacher)).name}

Strategy `{config.strategy["name"]}`, {metrics.get("step")} updates, made with tropd {__version__}.
{table}
## Configuration

```yaml
{to_yaml(config)}```
"""
