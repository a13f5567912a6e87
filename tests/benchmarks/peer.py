"""The peer's side of tests/benchmarks/step.py: one step of TRL's DistillationTrainer, run by a Python that has trl.

    PATH_TO_PYTHON -m tests.benchmarks.peer --folder FOLDER --responses 4 --length 512 --threads 2

Needs nothing of this project but tests/benchmarks/process.py. The last line on stdout is the result as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from .process import Stages, hook


def run_peer(folder: Path, responses: int, length: int, threads: int) -> dict[str, Any]:
    """One step, its stages marked from outside."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    torch.set_num_threads(threads)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / role, dtype=torch.float32) for role in ("student", "teacher")
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "student", padding_side="left")
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    stages, trained, report = Stages(), [], {}

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            stages.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            report.update(stages.report())

    with tempfile.TemporaryDirectory() as out:
        config = DistillationConfig(
            output_dir=out,
            per_device_train_batch_size=responses,
            gradient_accumulation_steps=1,
            max_steps=1,
            learning_rate=1e-5,
            beta=1.0,
            temperature=1.0,
            max_completion_length=length,
            generation_kwargs={"suppress_tokens": [tokenizer.pad_token_id, tokenizer.eos_token_id]},
            gradient_checkpointing=False,  # as ours
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            dataloader_pin_memory=False,
        )
        trainer = DistillationTrainer(
            model=student, teacher_model=teacher, processing_class=tokenizer, args=config,
            train_dataset=Dataset.from_list(rows), callbacks=[Clock()],
        )  # fmt: skip
        hook(trainer.model, "generate", before=lambda: stages.begin("rollout"), after=lambda: stages.end("rollout"))
        hook(trainer, "compute_loss", before=lambda: stages.begin("score_update"))
        hook(trainer.accelerator, "backward", after=lambda: stages.end("score_update"))
        inner = trainer.compute_loss

        def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            trained.append(int(inputs["completion_mask"].sum()))
            return inner(model, inputs, *args, **kwargs)

        trainer.compute_loss = counted
        trainer.train()
    return report | {"tokens": sum(trained), "loss": trainer.state.log_history[0].get("loss")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--responses", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        result = run_peer(args.folder, args.responses, args.length, args.threads)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
