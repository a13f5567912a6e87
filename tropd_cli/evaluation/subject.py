"""The model that is evaluated, with or without a teacher, as a `Pair`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tropd_cli.config import Config
from tropd_cli.data import PromptFormat
from tropd_cli.errors import UserError
from tropd_cli.models import (
    DTYPES,
    LanguageModel,
    check_head,
    load_model,
    load_tokenizer,
    resolve_device,
    shared_vocabulary,
)
from tropd_cli.pair import CHECK_TEXT, Pair, frozen, model_path, read_template

#: Longest prompt of a model that does not say how long its context is.
NO_LIMIT = 2**31


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Args:
        config: student, teacher (or None), seed, device, dtype, temperature and budgets.
        label: the model's name in results.
        adapter: folder of a LoRA adapter on top of the student, or None.
    """

    config: Config
    label: str
    adapter: str | None = None


def find_adapter(folder: str) -> tuple[str, str | None]:
    """(model to load, adapter folder or None) of a hub name or folder; an adapter names the model below it.

    Raises:
        UserError: an adapter that does not say what it belongs to.
    """
    path = Path(folder, "adapter_config.json")
    if not path.is_file():
        return folder, None
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not base:
        raise UserError(f"{path} names no base model, so the adapter cannot be loaded")
    return str(base), folder


def load_subject(subject: Subject) -> Pair:
    """Loads and checks the model, its adapter and the teacher. Without a teacher the model stands in for it.

    Raises:
        UserError: not found, a damaged adapter, different tokenizers, an unknown head.
    """
    config = subject.config
    name = model_path(config.student)
    device = resolve_device(config.device)
    default = "bfloat16" if device.type == "cuda" else "float32"
    compute = DTYPES[default if config.dtype == "auto" else config.dtype]
    student = load_model(name, role="model", dtype=compute, device=device, revision=config.student_revision)
    tokenizer = load_tokenizer(name, role="model", revision=config.student_revision)
    if subject.adapter is not None:
        student = with_adapter(student, subject.adapter)
    student.model.eval().requires_grad_(False)
    teacher, teacher_tokenizer = student, tokenizer
    if config.teacher is not None:
        teacher = frozen(config, model_path(config.teacher), "teacher", config.teacher_revision)
        teacher_tokenizer = load_tokenizer(model_path(config.teacher), role="teacher", revision=config.teacher_revision)
    vocabulary = shared_vocabulary(student, teacher, tokenizer, teacher_tokenizer)
    ids = [i for i in tokenizer(CHECK_TEXT)["input_ids"] if vocabulary.allowed[i]] or [vocabulary.stop_ids[0]]
    for model in {id(m): m for m in (student, teacher)}.values():
        single = next(model.model.parameters()).dtype == DTYPES["float32"]
        check_head(model, ids, tolerance=1e-3 if single else 0.25)
    template = config.teacher_chat_template
    limits = [m.context_length for m in (student, teacher) if m.context_length is not None]
    prompt_format = PromptFormat(
        tokenizer=tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        max_prompt_length=min(limits, default=NO_LIMIT),
        teacher_template=template if template in (None, "own") else read_template(str(template)),
        template_arguments=config.chat_template_arguments,
    )
    return Pair(student, teacher, None, tokenizer, vocabulary, prompt_format, device, compute)


def with_adapter(model: LanguageModel, folder: str) -> LanguageModel:
    """The model with a LoRA adapter from a folder. Raises UserError when it does not fit."""
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(model.model, folder)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"the adapter '{folder}' does not fit its base model '{model.name}': {first_line}") from error
    return LanguageModel(adapted, folder, model.vocabulary, model.generation_config)
