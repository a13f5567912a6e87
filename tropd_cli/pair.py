"""Student, teacher, reference and tokenizer of a run, loaded and checked against each other."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from strategies import Needs

from . import demo
from .config import Config
from .data import PromptFormat
from .errors import UserError
from .models import (
    DTYPES,
    LanguageModel,
    Vocabulary,
    add_lora,
    check_head,
    load_model,
    load_tokenizer,
    resolve_device,
    shared_vocabulary,
)

DEMO_MODELS = {"demo:student": demo.STUDENT, "demo:teacher": demo.TEACHER}
#: A line any tokenizer can read: what the start-up checks run on.
CHECK_TEXT = "The answer to 12 + 34 is 46, so we are done."


@dataclass
class Pair:
    """The models of a run. `autocast` is the context in which the student computes."""

    student: LanguageModel
    teacher: LanguageModel
    reference: LanguageModel | None
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    prompt_format: PromptFormat
    device: torch.device
    compute_dtype: torch.dtype

    @property
    def autocast(self) -> Callable[[], contextlib.AbstractContextManager[object]]:
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext
        return functools.partial(torch.autocast, self.device.type, dtype=self.compute_dtype)


def load_pair(config: Config, needs: Needs) -> Pair:
    """Loads and checks everything.

    Raises:
        UserError: not found, different tokenizers, unknown head, impossible lengths.
    """
    student_name, teacher_name = model_path(config.student), model_path(config.teacher)
    tokenizer = load_tokenizer(student_name, role="student", revision=config.student_revision)
    teacher_tokenizer = load_tokenizer(teacher_name, role="teacher", revision=config.teacher_revision)
    device = resolve_device(config.device)
    compute = (
        DTYPES["bfloat16" if device.type == "cuda" else "float32"] if config.dtype == "auto" else DTYPES[config.dtype]
    )
    frozen_base = config.lora_rank > 0
    student = load_model(
        student_name,
        role="student",
        dtype=compute if frozen_base else torch.float32,
        device=device,
        revision=config.student_revision,
    )
    teacher = frozen(config, teacher_name, "teacher", config.teacher_revision)
    vocabulary = shared_vocabulary(student, teacher, tokenizer, teacher_tokenizer)
    check_lengths(config, student, teacher)
    ids = tokenizer(CHECK_TEXT)["input_ids"]
    ids = [i for i in ids if vocabulary.allowed[i]] or [vocabulary.stop_ids[0]]
    for model in (student, teacher):
        single = next(model.model.parameters()).dtype == torch.float32
        check_head(model, ids, tolerance=1e-3 if single else 0.25)
    if config.gradient_checkpointing:
        student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora_rank:
        alpha = config.lora_alpha or 2 * config.lora_rank
        if config.gradient_checkpointing:
            student.model.enable_input_require_grads()
        student = add_lora(student, rank=config.lora_rank, alpha=alpha, targets=config.lora_targets, seed=config.seed)
    student.model.train()
    reference = None
    if needs.reference_logprob:
        name = model_path(config.reference or config.student)
        revision = config.reference_revision if config.reference else config.student_revision
        reference = frozen(config, name, "reference", revision)
    template = config.teacher_chat_template
    if template not in (None, "own"):
        template = read_template(str(template))
    prompt_format = PromptFormat(
        tokenizer=tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        max_prompt_length=config.max_prompt_length,
        teacher_template=template,
        template_arguments=config.chat_template_arguments,
    )
    return Pair(student, teacher, reference, tokenizer, vocabulary, prompt_format, device, compute)


def frozen(config: Config, name: str, role: str, revision: str | None) -> LanguageModel:
    """A teacher or reference: its own dtype, evaluation mode, no gradients."""
    wanted = config.teacher_device if config.teacher_device != "auto" else config.device
    device = resolve_device(wanted)
    default = "bfloat16" if device.type == "cuda" else "float32"
    dtype = DTYPES[default if config.teacher_dtype == "auto" else config.teacher_dtype]
    model = load_model(name, role=role, dtype=dtype, device=device, revision=revision)
    model.model.eval().requires_grad_(False)
    return model


def model_path(name: str | None) -> str:
    """A hub name or folder; `demo:teacher` and `demo:student` are the models in the package."""
    assert name is not None
    return str(DEMO_MODELS.get(name, name))


def check_lengths(config: Config, *models: LanguageModel) -> None:
    """Raises UserError when prompt plus response cannot fit a model's context."""
    wanted = config.max_prompt_length + config.max_response_length
    for model in models:
        limit = model.context_length
        if limit is not None and wanted > limit:
            raise UserError(
                f"--max-prompt-length {config.max_prompt_length} and --max-response-length {config.max_response_length} "
                f"make {wanted} tokens, but '{model.name}' has a context of {limit}. Lower one of them"
            )


def read_template(path: str) -> str:
    """The text of a chat template file. Raises UserError."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--teacher-chat-template '{path}': {error.strerror}. It is `own` (the teacher's) or a template file"
        ) from error


def commit_of(name: str, revision: str | None) -> str | None:
    """The hub commit behind a name, or None for folders and when the hub does not say."""
    if name in DEMO_MODELS or Path(name).exists():
        return revision
    try:
        return getattr(AutoConfig.from_pretrained(name, revision=revision), "_commit_hash", None) or revision
    except (OSError, ValueError):
        return revision
