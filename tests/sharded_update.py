"""What two processes run to compare a student under torch's fully_shard with a whole one: updates, and sampling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from strategies import STRATEGIES, Needs
from tropd_cli.batching import token_batch
from tropd_cli.credit_loss import CreditLoss, CreditRequest
from tropd_cli.crediting import region_uniforms, token_credit
from tropd_cli.rollout import Request, Rollout, TransformersGenerator
from tropd_cli.scoring import ScoringOptions, score_teacher

from .split_update import share
from .tiny import random_rollout, tiny_model, tiny_vocabulary

STEPS = 3


def gradient_step(
    module: CreditLoss, optimizer: torch.optim.Optimizer, rollout: Rollout, mine: Rollout, count: int
) -> None:
    """An update of trust-region on this process's rows."""
    strategy = STRATEGIES.build({"name": "trust-region", "outlier": {"name": "forward-kl", "top_k": 5}})
    teacher = tiny_model("llama", seed=5, dtype=torch.float64)
    needs = strategy.needs | Needs(teacher_logprob=True, student_entropy=True)
    batch = token_batch(mine, range(len(mine)), pad_id=0)
    scores = score_teacher(teacher, batch, needs, ScoringOptions(1.0, tiny_vocabulary().allowed))
    request = CreditRequest(needs=needs, num_tokens=int(rollout.mask.sum()), uniforms=region_uniforms(0, batch))
    loss, _ = module(batch, scores, replace(request, credit_of=token_credit(strategy, 0.001)))
    (loss * count).backward()
    optimizer.step()
    optimizer.zero_grad()


def sampled(module: CreditLoss, student: Any) -> list[list[int]]:
    generator = TransformersGenerator(
        student, tiny_vocabulary(), seed=0, stream="student", temperature=1.0, token_budget=99
    )
    return generator([Request([3 + i, 5, 7], [], 10, (0, i, 0)) for i in range(4)])


def compare() -> None:
    """The same updates on a whole student and on a sharded one."""
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    whole, student = (tiny_model("llama", seed=0, dtype=torch.float64) for _ in range(2))
    module, sharded = CreditLoss(whole), CreditLoss(student)
    mesh = init_device_mesh("cpu", (count,))
    for layer in student.backbone.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (module, sharded)]
    for number in range(STEPS):
        rollout = random_rollout([5, 9, 3, 7, 12, 4], prefix=2, seed=number)
        gradient_step(module, optimizers[0], rollout, rollout, 1)
        gradient_step(sharded, optimizers[1], rollout, share(rollout, rank, count), count)
    expected = sampled(module, whole)
    sharded.unshard()  # embedding and head; the layers gather themselves
    tokens = sampled(sharded, student)
    sharded.reshard()
    assert tokens == expected, (tokens, expected)
    for (name, value), parameter in zip(module.named_parameters(), sharded.parameters(), strict=True):
        assert parameter.to_local().numel() < value.numel(), name
        torch.testing.assert_close(
            parameter.full_tensor(), value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )
