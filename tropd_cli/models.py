"""Load student, teacher and tokenizer; find the head; refuse pairs that do not fit."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from .errors import UserError

#: What transformers, safetensors and the hub raise for names and files that do not load.
LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Head(nn.Module):
    """What a model does between hidden state and logits: projection, then logit scale, then soft-cap.

    Holds the projection without registering it, so that its parameters keep belonging to the model alone.
    """

    def __init__(self, projection: nn.Module, *, scale: float = 1.0, softcap: float | None = None) -> None:
        super().__init__()
        self._projection = (projection,)
        self.scale, self.softcap = scale, softcap

    @property
    def projection(self) -> nn.Module:
        return self._projection[0]

    @property
    def is_plain(self) -> bool:
        """A bare linear layer without scale or soft-cap: takes the matmul path without autograd."""
        return type(self.projection) is nn.Linear and self.scale == 1.0 and self.softcap is None

    @torch.no_grad()
    def logits(self, hidden: Tensor, buffer: Tensor | None) -> Tensor:
        """`forward` without gradient, into the rows of `buffer` ([at least N, V] in float32 at least, or None) where the
        head is plain. The caller may overwrite the result."""
        projection = self.projection
        if not self.is_plain or buffer is None:
            return self(hidden)
        assert isinstance(projection, nn.Linear)
        rows = buffer[: hidden.shape[0]]
        if hidden.dtype != buffer.dtype:
            return rows.copy_(projection(hidden))
        logits = torch.mm(hidden, projection.weight.detach().t(), out=rows)
        return logits if projection.bias is None else logits.add_(projection.bias.detach())

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [N, V] logits at temperature 1, in float32 at least."""
        logits = self.projection(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


@dataclass
class LanguageModel:
    """A causal LM with its parts named: `backbone` makes hidden states, `head` turns them into logits.

    run: calls what uses the model outside of a loss, with everything in place that a sharded model needs.
    """

    model: nn.Module
    name: str
    vocabulary: int
    generation_config: GenerationConfig
    run: Callable[[Callable[[], Any]], Any] = lambda action: action()

    @property
    def base(self) -> nn.Module:
        """The transformers model itself, adapters inside but no PEFT wrapper around it."""
        get_base = getattr(self.model, "get_base_model", None)
        return get_base() if get_base else self.model

    @property
    def backbone(self) -> nn.Module:
        return backbone_of(self.base)

    @property
    def head(self) -> Head:
        return head_of(self.base)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def context_length(self) -> int | None:
        return getattr(self.base.config.get_text_config(), "max_position_embeddings", None)


def backbone_of(model: nn.Module) -> nn.Module:
    """The module from ids to last hidden state.

    Raises:
        UserError: no such module beside an output embedding.
    """
    backbone = model.get_decoder()
    if backbone is model or model.get_output_embeddings() is None:
        raise UserError(
            f"{type(model).__name__} has no separate backbone and output head, which the chunked loss needs. "
            "Use a decoder-only model that AutoModelForCausalLM knows"
        )
    return backbone


def head_of(model: nn.Module) -> Head:
    """The projection with the logit scale and soft-cap that the configuration declares."""
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None):
        scale *= float(config.logit_scale)
    if getattr(config, "logits_scaling", None):
        scale /= float(config.logits_scaling)
    if getattr(config, "lm_head_multiplier", None):
        scale *= float(config.lm_head_multiplier)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(model.get_output_embeddings(), scale=scale, softcap=float(softcap) if softcap else None)


def resolve_device(device: str) -> torch.device:
    """ "auto" -> the process's CUDA device or the CPU. Raises UserError: no such device here."""
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            here = ", ".join(["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
            raise UserError(f"--device '{device}' is not to be had on this machine. Allowed: {here}") from error
        return torch.device(device)
    if torch.cuda.is_available() and not os.environ.get("ACCELERATE_USE_CPU"):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def load_model(
    name: str, *, role: str, dtype: torch.dtype, device: torch.device, revision: str | None = None
) -> LanguageModel:
    """A causal LM from a hub name or folder: safetensors only, no remote code, dropout off.

    Args:
        name: hub name or folder.
        role: "student", "teacher" or "reference", for messages.
        revision: hub commit, branch or tag.

    Raises:
        UserError: not found, offline, no safetensors, or needs remote code.
    """
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        disable_dropout(config)
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except LOAD_ERRORS as error:
        raise UserError(load_failure(name, role, error)) from error
    absent = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if absent:
        raise UserError(
            f"{role} '{name}' is no whole causal language model: {len(absent)} weights are missing or of another shape, "
            f"first '{absent[0]}'. They would be random numbers. Use a checkpoint with its output head"
        )
    if model.get_output_embeddings() is None:
        raise UserError(f"{role} '{name}' ({type(model).__name__}) has no output head to score tokens with")
    model.to(device)
    generation_config = model.generation_config or GenerationConfig()
    # Sampling must follow the model's own distribution, whatever the checkpoint recommends: see rollout.py.
    model.generation_config = GenerationConfig(
        eos_token_id=generation_config.eos_token_id, pad_token_id=generation_config.pad_token_id
    )
    return LanguageModel(model, name, model.get_output_embeddings().weight.shape[0], generation_config)


def load_failure(name: str, role: str, error: Exception) -> str:
    """One message for everything that can go wrong between a name and weights."""
    first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "trust_remote_code" in str(error):
        return f"{role} '{name}' needs code from its repository, which tropd does not run. Use a model that transformers knows"
    if os.path.isfile(os.path.join(name, "adapter_config.json")):
        return f"{role} folder '{name}' holds a LoRA adapter, not a whole model. Merge it first: tropd distill --merge saves both"
    if os.path.isdir(name):
        return f"{role} folder '{name}' does not load: {first_line}"
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_like_path and not os.path.exists(name):
        return f"{role} '{name}' is neither a folder nor a hub name (owner/name). Check the path, or pass --{role} owner/name"
    return (
        f"{role} '{name}' could not be loaded: no such folder, and the hub gave nothing "
        f"(mistyped name, private model or no network): {first_line}"
    )


def disable_dropout(config: Any) -> None:
    """Sets every dropout probability of a configuration to 0: q at rollout time must be the q that is trained."""
    for holder in {id(c): c for c in (config, config.get_text_config())}.values():
        for key, value in holder.to_dict().items():
            if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, float) and value > 0.0:
                setattr(holder, key, 0.0)


def add_lora(
    student: LanguageModel, *, rank: int, alpha: int, targets: str | list[str], seed: int = 0
) -> LanguageModel:
    """The student with LoRA adapters in float32, everything else frozen.

    Raises:
        UserError: target modules that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = get_peft_model(student.model, lora, autocast_adapter_dtype=True)
    except ValueError as error:
        raise UserError(f"lora_targets {targets!r} do not fit {student.name}: {error}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return LanguageModel(model, student.name, student.vocabulary, student.generation_config)


# ── tokenizers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def load_tokenizer(name: str, *, role: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        UserError: not found or not loadable.
    """
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise UserError(load_failure(name, f"{role} tokenizer", error)) from error


@dataclass(frozen=True)
class Vocabulary:
    """What both models may say. `allowed[i]` is True for ids that may be sampled; `stop_ids` end a response."""

    allowed: Tensor  # [V of the student] bool
    stop_ids: tuple[int, ...]
    pad_id: int


def shared_vocabulary(
    student: LanguageModel,
    teacher: LanguageModel,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> Vocabulary:
    """The vocabulary both models share.

    The same token string must have the same id on both sides. Different padding behind the vocabulary, and added tokens
    that only one side has, are fine: those ids are never sampled.

    Raises:
        UserError: the tokenizers differ; names the first differing tokens.
    """
    mine, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    added = set(student_tokenizer.get_added_vocab()) | set(teacher_tokenizer.get_added_vocab())
    moved = [token for token in mine.keys() & theirs.keys() if mine[token] != theirs[token]]
    lonely = [token for token in mine.keys() ^ theirs.keys() if token not in added]
    if moved or lonely:
        order = sorted(moved + lonely, key=lambda token: (mine.get(token, theirs.get(token, 0)), token))
        shown = ", ".join(f"{t!r} (student {mine.get(t, 'none')}, teacher {theirs.get(t, 'none')})" for t in order[:5])
        raise UserError(
            f"'{student.name}' and '{teacher.name}' have different tokenizers: {len(moved)} tokens with "
            f"other ids, {len(lonely)} on one side only. First: {shown}. "
            "On-policy distillation scores the student's token ids: choose a teacher of the same family"
        )
    ids = torch.tensor(sorted(mine[token] for token in mine.keys() & theirs.keys()))
    ids = ids[ids < min(student.vocabulary, teacher.vocabulary)]
    allowed = torch.zeros(student.vocabulary, dtype=torch.bool)
    allowed[ids] = True
    stop_ids = set()
    for source in (student.generation_config, teacher.generation_config, student_tokenizer, teacher_tokenizer):
        value = source.eos_token_id
        stop_ids.update([] if value is None else [value] if isinstance(value, int) else value)
    stop = tuple(sorted(i for i in stop_ids if i < len(allowed) and allowed[i]))
    if not stop:
        raise UserError(
            f"neither '{student.name}' nor '{teacher.name}' declares an end-of-sequence token, so no response could end. "
            "Set eos_token in the tokenizer"
        )
    pad = student_tokenizer.pad_token_id
    has_embedding = pad is not None and pad < min(student.vocabulary, teacher.vocabulary)
    return Vocabulary(allowed, stop, int(pad) if has_embedding else stop[0])


@torch.no_grad()
def check_head(language_model: LanguageModel, ids: list[int], *, tolerance: float) -> None:
    """Compares backbone -> head with the model's own logits on real tokens.

    Raises:
        UserError: the model does something to its logits that the head does not know of.
    """
    inputs = torch.tensor([ids], device=language_model.device)
    own = language_model.model(input_ids=inputs, use_cache=False).logits[0].float().log_softmax(-1)
    hidden = language_model.backbone(input_ids=inputs, use_cache=False).last_hidden_state[0]
    ours = language_model.head(hidden).log_softmax(-1)
    if not bool(torch.isfinite(own).all()):
        raise UserError(
            f"'{language_model.name}' gives log-probabilities that are not finite on plain text: its weights are damaged, "
            "or its dtype is too narrow (try --set teacher_dtype=float32)"
        )
    gap = (own - ours).abs().max().item()
    if not gap <= tolerance:
        raise UserError(
            f"'{language_model.name}' ({type(language_model.base).__name__}) changes its logits in a way tropd does not "
            f"know: log-probabilities differ by up to {gap:.3g} nats. Distilling it would be wrong in silence"
        )
