"""Tiny random models, tokenizers and rollouts for tests, and the full-logits autograd reference of the loss."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from strategies import Credit
from tropd_cli.batching import TokenBatch
from tropd_cli.models import LanguageModel, Vocabulary
from tropd_cli.rollout import Rollout

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS = ("llama", "qwen", "gemma", "cohere")


def tiny_model(
    kind: str = "llama", *, vocabulary: int = 61, seed: int = 0, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """Llama (untied), Qwen2 (tied), Gemma2 (tied, soft-capped) or Cohere (tied, logit scale)."""
    torch.manual_seed(seed)
    common = dict(
        vocab_size=vocabulary, eos_token_id=1, pad_token_id=0, bos_token_id=2, max_position_embeddings=256, **SHAPE
    )
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **common))
    elif kind == "qwen":
        model = Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **common))
    elif kind == "gemma":
        config = Gemma2Config(head_dim=8, final_logit_softcapping=2.0, sliding_window=64, **common)
        model = Gemma2ForCausalLM(config)
    else:
        model = CohereForCausalLM(CohereConfig(logit_scale=0.3, **common))
    for parameter in model.parameters():  # spread the logits, so that the models disagree
        parameter.data.mul_(1.0 if parameter.dim() == 1 else 4.0)
    model.to(dtype).train()
    return LanguageModel(model, f"tiny-{kind}-{seed}", vocabulary, GenerationConfig(eos_token_id=1, pad_token_id=0))


def tiny_vocabulary(size: int = 61) -> Vocabulary:
    allowed = torch.ones(size, dtype=torch.bool)
    allowed[0] = False
    return Vocabulary(allowed, stop_ids=(1,), pad_id=0)


def tiny_tokenizer(size: int = 61) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<bos>", *(f"w{i}" for i in range(size - 3))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


def random_rollout(
    lengths: list[int], *, prefix: int = 0, vocabulary: int = 61, seed: int = 0, step: int = 3
) -> Rollout:
    """Random response ids of the given lengths behind random prompts of 3 to 6 tokens."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    wrote = torch.zeros_like(mask)
    prompts = []
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(1, vocabulary, (length,), generator=generator)
        mask[row, :length] = True
        wrote[row, : min(prefix, length)] = True
        prompts.append(torch.randint(3, vocabulary, (3 + row % 4,), generator=generator).tolist())
    rows = torch.arange(len(lengths))
    return Rollout(
        step, ids, mask, wrote, rows // 2, rows % 2, torch.ones(len(lengths), dtype=torch.bool), prompts, prompts, []
    )


def full_logits(model: LanguageModel, batch: TokenBatch, *, temperature: float = 1.0) -> Tensor:
    """[N, V] logits from the model's own forward, with autograd."""
    logits = model.model(input_ids=batch.inputs, use_cache=False).logits
    return logits.reshape(-1, logits.shape[-1])[batch.predicts] / temperature


def reference_loss(
    logits: Tensor, token_ids: Tensor, top_ids: Tensor | None, credit: Credit, num_tokens: int
) -> Tensor:
    """-(sum of credit x log q) / num_tokens by plain autograd on full logits."""
    logprobs = logits.log_softmax(-1)
    total = (credit.sampled * logprobs.gather(1, token_ids[:, None])[:, 0]).sum()
    if credit.top_k is not None:
        total = total + (credit.top_k * logprobs.gather(1, top_ids)).sum()
    if credit.full is not None:
        total = total + (credit.full * logprobs).sum()
    return -total / num_tokens
