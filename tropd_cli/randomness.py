"""Random numbers that are a pure function of a key: no generator state to save, nothing changes when work is split.

A key is (seed, stream, integers...), for instance (seed, "sample", step, prompt, sample, position). The mixing function
is SplitMix64's finaliser, applied once per key part.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def stream_key(seed: int, stream: str) -> int:
    """The 64-bit starting state of one named stream of one seed."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def uniform(seed: int, stream: str, *parts: Tensor | int) -> Tensor:
    """U(0, 1), float64, strictly inside the interval, one per element of the broadcast int64 `parts`."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    state = torch.tensor(_signed(stream_key(seed, stream)), dtype=torch.int64, device=device)
    for part in parts:
        state = _mix(state + _signed(_GOLDEN) + torch.as_tensor(part, dtype=torch.int64, device=device))
    bits = (state >> 11) & ((1 << 53) - 1)
    return (bits.to(torch.float64) + 0.5) * 2.0**-53


def permutation(seed: int, stream: str, epoch: int, count: int) -> list[int]:
    """A keyed shuffle of range(count)."""
    return torch.argsort(uniform(seed, stream, epoch, torch.arange(count)), stable=True).tolist()


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * _signed(_MIX_1)
    value = (value ^ _shift(value, 27)) * _signed(_MIX_2)
    return value ^ _shift(value, 31)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits with -inf outside the smallest set of most probable tokens whose mass reaches `top_p`; equals stay together.

    Only as many of the largest probabilities are sorted as the mass asks for: a full sort of a large vocabulary takes
    longer than the forward pass of a small model.

    Args:
        logits: [rows, V], -inf where a token is not allowed.

    Holtzman et al. (2020), The Curious Case of Neural Text Degeneration, section 3.1, arXiv 1904.09751.
    """
    vocabulary = logits.shape[-1]
    probabilities = logits.softmax(-1)
    count = min(128, vocabulary)
    while True:
        largest = probabilities.topk(count, dim=-1).values
        mass = largest.cumsum(-1, dtype=torch.float64)
        if count == vocabulary or bool((mass[:, -1] >= top_p).all()):
            break
        count = min(8 * count, vocabulary)
    last = (mass < top_p).sum(-1, keepdim=True).clamp_max(count - 1)
    return logits.masked_fill(probabilities < largest.gather(1, last), -torch.inf)


def inverse_cdf(logits: Tensor, uniforms: Tensor) -> Tensor:
    """The token of softmax(logits) that each uniform number falls on: an exact draw, one number per row.

    Searched in two levels (blocks, then inside one block, cumulative sums in float64), so that the error does not grow
    with the vocabulary and no second [rows, V] tensor beside the probabilities is made.

    Args:
        logits: [rows, V] float32, -inf where a token is not allowed.
        uniforms: [rows] float64 in (0, 1).

    Returns:
        [rows] int64.
    """
    rows, vocabulary = logits.shape
    block = max(1, int(vocabulary**0.5))
    blocks = -(-vocabulary // block)
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()
    weights = torch.nn.functional.pad(weights, (0, blocks * block - vocabulary)).view(rows, blocks, block)
    block_mass = weights.sum(-1, dtype=torch.float64)
    ends = block_mass.cumsum(-1)
    target = uniforms.to(torch.float64).unsqueeze(-1) * ends[:, -1:]
    which = torch.searchsorted(ends, target, right=True).clamp_max(blocks - 1)
    start = (ends - block_mass).gather(1, which)
    inside = weights.gather(1, which.unsqueeze(-1).expand(-1, -1, block)).squeeze(1).to(torch.float64)
    inside_ends = inside.cumsum(-1)
    offset = torch.searchsorted(inside_ends, (target - start).clamp_min(0.0), right=True).clamp_max(block - 1)
    # Rounding at a block's end may point past its last token with any mass: step back to it.
    last = (inside > 0).to(torch.int64).mul(torch.arange(1, block + 1, device=inside.device)).amax(-1, keepdim=True) - 1
    return (which * block + torch.minimum(offset, last.clamp_min(0))).squeeze(-1)
