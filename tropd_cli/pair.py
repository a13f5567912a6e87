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
from .packing import enable_packing
from .sharding import Shards, shard_frozen

DEMO_MODELS = {"demo:student": demo.STUDENT, "demo:teacher": demo.TEACHER}
HOST = torch.device("cpu")
#: A line any tokenizer can read: what the start-up checks run on.
CHECK_TEXT = "The answer to 12 + 34 is 46, so we are done."


@dataclass
class Pair:
    """The models of a run. `autocast` is the context in which the student computes; `packs`: whether all of them take
    sequences end to end instead of padded; `sharded`: whether every forward takes all processes."""

    student: LanguageModel
    teacher: LanguageModel
    reference: LanguageModel | None
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    prompt_format: PromptFormat
    device: torch.device
    compute_dtype: torch.dtype
    packs: bool = False
    sharded: bool = False

    @property
    def autocast(self) -> Callable[[], contextlib.AbstractContextManager[object]]:
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext
        return functools.partial(torch.autocast, self.device.type, dtype=self.compute_dtype)


def load_pair(config: Config, needs: Needs, shards: Shards | None = None) -> Pair:
    """Loads and checks everything.

    Args:
        shards: how to cut the frozen models; the student is left whole in the host's memory, to be cut with its loss.

    Raises:
        UserError: not found, different tokenizers, unknown head, impossible lengths.
    """
    student_name, teacher_name = model_path(config.student), model_path(config.teacher)
    tokenizer = load_tokenizer(student_name, role="student", revision=config.student_revision)
    teacher_tokenizer = load_tokenizer(teacher_name, role="teacher", revision=config.teacher_revision)
    device = resolve_device(config.device)
    automatic = "bfloat16" if device.type == "cuda" else "float32"
    compute = DTYPES[automatic if config.dtype == "auto" else config.dtype]
    student = load_model(
        student_name,
        role="student",
        dtype=compute if config.lora_rank else torch.float32,  # what is trained is a float32 master
        device=HOST if shards else device,
        revision=config.student_revision,
    )
    cut = shards is not None and config.teacher_device == "auto"
    teacher = frozen(config, teacher_name, "teacher", config.teacher_revision, to_be_cut=cut)
    vocabulary = shared_vocabulary(student, teacher, tokenizer, teacher_tokenizer)
    check_lengths(config, student, teacher)
    ids = [i for i in tokenizer(CHECK_TEXT)["input_ids"] if vocabulary.allowed[i]] or [vocabulary.stop_ids[0]]
    for model in (student, teacher):
        check_head(model, ids, tolerance=head_tolerance(model))
    reference = load_reference(config, student, tokenizer, ids, to_be_cut=cut) if needs.reference_logprob else None
    packs = config.padding_free and all(
        enable_packing(model.model, model.backbone, ids, tolerance=hidden_tolerance(model))
        for model in (student, teacher, reference)
        if model is not None
    )
    for model in (teacher, reference):
        if cut and model is not None:
            shard_frozen(model, shards, device)
    student = made_trainable(config, student)
    template = config.teacher_chat_template
    if template not in (None, "own"):
        template = read_template(str(template))
    prompt_format = PromptFormat(
        tokenizer=tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        max_prompt_length=config.max_prompt_length,
        teacher_template=template,
        template_arguments=config.chat_template_arguments,
        shared=vocabulary.allowed,
        teacher_vocabulary=teacher.vocabulary,
    )
    sharded = shards is not None
    return Pair(
        student, teacher, reference, tokenizer, vocabulary, prompt_format, device, compute, packs=packs, sharded=sharded
    )


def made_trainable(config: Config, student: LanguageModel) -> LanguageModel:
    """The student with its adapter, or with backbone and head unfrozen, in training mode. Raises UserError."""
    if config.gradient_checkpointing:
        student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not config.lora_rank:
        train_backbone_and_head_alone(student)
        student.model.train()
        return student
    if config.gradient_checkpointing:
        student.model.enable_input_require_grads()
    alpha = config.lora_alpha or 2 * config.lora_rank
    student = add_lora(student, rank=config.lora_rank, alpha=alpha, targets=config.lora_targets, seed=config.seed)
    tied = student.base.config.get_text_config().tie_word_embeddings
    if config.merge and tied and has_adapter(student.head.projection):
        raise UserError(
            "--merge with an adapter on an output head that is tied to the input embedding would change both. "
            "Leave the head out of lora_targets, or train without --merge"
        )
    student.model.train()
    return student


def load_reference(
    config: Config, student: LanguageModel, tokenizer: PreTrainedTokenizerBase, ids: list[int], *, to_be_cut: bool
) -> LanguageModel:
    """The reference model: the one named, checked like a teacher, or the student as it starts. Raises UserError."""
    if not config.reference:
        return frozen(config, model_path(config.student), "reference", config.student_revision, to_be_cut=to_be_cut)
    name = model_path(config.reference)
    reference = frozen(config, name, "reference", config.reference_revision, to_be_cut=to_be_cut)
    own_tokenizer = load_tokenizer(name, role="reference", revision=config.reference_revision)
    shared_vocabulary(student, reference, tokenizer, own_tokenizer)
    check_head(reference, ids, tolerance=head_tolerance(reference))
    return reference


def frozen(config: Config, name: str, role: str, revision: str | None, *, to_be_cut: bool = False) -> LanguageModel:
    """A teacher or reference: its own dtype, evaluation mode, no gradients; in the host's memory if it is to be cut."""
    wanted = config.teacher_device if config.teacher_device != "auto" else config.device
    device = resolve_device(wanted)
    default = "bfloat16" if device.type == "cuda" else "float32"
    dtype = DTYPES[default if config.teacher_dtype == "auto" else config.teacher_dtype]
    model = load_model(name, role=role, dtype=dtype, device=HOST if to_be_cut else device, revision=revision)
    model.model.eval().requires_grad_(False)
    return model


def hidden_tolerance(model: LanguageModel) -> float:
    """By which part of the largest hidden state two ways to the same one may differ in the model's dtype."""
    return 1e-4 if next(model.model.parameters()).dtype == torch.float32 else 0.05


def head_tolerance(model: LanguageModel) -> float:
    """Nats by which two ways to the same log-probability may differ in the model's dtype."""
    return 1e-3 if next(model.model.parameters()).dtype == torch.float32 else 0.25


def has_adapter(projection: torch.nn.Module) -> bool:
    """Whether LoRA sits on a layer."""
    return any("lora_" in name for name, _ in projection.named_parameters())


def train_backbone_and_head_alone(student: LanguageModel) -> None:
    """Freezes what text never reaches, such as a vision tower: it would get no gradient."""
    used = {id(p) for part in (student.backbone, student.head.projection) for p in part.parameters()}
    for parameter in student.model.parameters():
        parameter.requires_grad_(id(parameter) in used)


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
        return (
            getattr(AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False), "_commit_hash", None)
            or revision
        )
    except (OSError, ValueError):
        return revision
