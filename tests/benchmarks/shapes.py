"""Randomly initialised models of real shapes, in memory or as a folder that any program can load."""

from __future__ import annotations

import copy
import json
import random
import string
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from tropd_cli.models import LanguageModel, Vocabulary

PAD, END = 0, 1  #: ids of the padding and the end-of-sequence token


def qwen2(
    vocabulary: int, *, hidden: int, layers: int, ffn: int | None = None, heads: int | None = None,
    key_value_heads: int | None = None, tied: bool = True,
) -> Qwen2Config:  # fmt: skip
    """Qwen2; what is not given follows from the hidden size."""
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn or 4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads or max(1, hidden // 64),
        num_key_value_heads=key_value_heads or max(1, hidden // 128),
        max_position_embeddings=65536,
        tie_word_embeddings=tied,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=None,
    )


def llama_135m(*, layers: int = 30) -> LlamaConfig:
    """The shape of a 135M model of the Llama family."""
    return LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, pad_token_id=PAD,
        eos_token_id=END, bos_token_id=None,
    )  # fmt: skip


def random_model(
    config: PretrainedConfig, *, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Made on the device and in the dtype it is used in: a copy of a large model may not fit beside it."""
    kind = Qwen2ForCausalLM if isinstance(config, Qwen2Config) else LlamaForCausalLM
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind(copy.deepcopy(config))  # models write into theirs
    finally:
        torch.set_default_dtype(before)


def language_model(model: PreTrainedModel, name: str = "random") -> LanguageModel:
    return LanguageModel(model, name, model.config.vocab_size, GenerationConfig(eos_token_id=END, pad_token_id=PAD))


def random_pair(
    student: PretrainedConfig, teacher: PretrainedConfig | None = None, *, device: str = "cpu",
    teacher_dtype: torch.dtype = torch.float32,
) -> tuple[LanguageModel, LanguageModel]:  # fmt: skip
    """(student in float32 and in training mode, frozen teacher; of the student's shape unless given)."""
    trained = random_model(student, seed=0, device=device).train()
    frozen = random_model(teacher or student, seed=1, device=device, dtype=teacher_dtype).eval().requires_grad_(False)
    return language_model(trained, "student"), language_model(frozen, "teacher")


def endless(vocabulary: int) -> Vocabulary:
    """A vocabulary whose end token is never sampled: every response runs to its limit."""
    allowed = torch.ones(vocabulary, dtype=torch.bool)
    allowed[[PAD, END]] = False
    return Vocabulary(allowed, stop_ids=(END,), pad_id=PAD)


def save_case(folder: Path, config: Qwen2Config, *, prompts: int, prompt_length: int, seed: int) -> None:
    """student/, teacher/ (same shape, other weights) and prompts.jsonl, each prompt of exactly so many tokens."""
    tokenizer = _byte_tokenizer(config.vocab_size)
    for offset, role in enumerate(("student", "teacher")):
        random_model(config, seed=seed + offset).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    draw = random.Random(seed)
    rows = [{"prompt": "".join(draw.choices(string.ascii_lowercase, k=prompt_length))} for _ in range(prompts)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "prompts.jsonl").write_text(text, encoding="utf-8")


def _byte_tokenizer(vocabulary: int) -> Qwen2Tokenizer:
    """Qwen2's own kind of tokenizer without merges: a token per byte, and as many more as the vocabulary asks for."""
    known = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = {word: i for i, word in enumerate([*known, *(f"<{i}>" for i in range(len(known), vocabulary))])}
    return Qwen2Tokenizer(vocab=words, merges=[], unk_token=None, pad_token="<pad>", eos_token="<eos>")
