"""What an `accelerate config` may ask for. What sharding does is compared in tests/sharded_update.py, by two processes."""

from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from strategies import Credit, Needs
from tropd_cli import sharding
from tropd_cli.batching import token_batch
from tropd_cli.config import build_config
from tropd_cli.credit_loss import CreditLoss, CreditRequest
from tropd_cli.crediting import fixed_credit
from tropd_cli.dry_run import estimated_cost
from tropd_cli.errors import UserError
from tropd_cli.scoring import Scores
from tropd_cli.sharding import layers_of, with_launcher_options

from .tiny import random_rollout, tiny_model

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}


def resolved(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> tuple[str, bool]:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = with_launcher_options(build_config({}))
    return config.shard, config.gradient_checkpointing


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("none", False)),
        (FSDP2, ("full", False)),
        (FSDP2 | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, ("grad_op", False)),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, ("full", True)),
    ],
)
def test_an_fsdp2_config_of_accelerate_is_followed(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: tuple[str, bool]
) -> None:
    assert resolved(monkeypatch, environment) == expected
    assert "ACCELERATE_USE_FSDP" not in os.environ  # or transformers would load weights on the first process only


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed, which tropd does not run under.*--shard full"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        (FSDP2 | {"FSDP_VERSION": "1"}, "FSDP version 1.*fsdp_version: 2"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
    ],
)
def test_what_the_loop_cannot_run_under_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        resolved(monkeypatch, environment)


def test_a_dry_run_counts_the_pieces_of_one_process() -> None:
    pair: Any = SimpleNamespace(student=tiny_model("llama"), teacher=tiny_model("llama"), device=torch.device("cpu"))
    whole, piece = (
        estimated_cost(build_config({"shard": shard, "num_processes": 4}), pair) for shard in ("none", "full")
    )
    for name in ("student_bytes", "training_bytes", "teacher_bytes"):
        assert piece[name] == whole[name] // 4 > 0


def test_an_unknown_way_to_shard_is_refused() -> None:
    with pytest.raises(UserError, match=r"'shard' is 'ful'.*none.*full.*grad_op"):
        build_config({"shard": "ful"})


def test_a_model_without_named_layers_is_refused() -> None:
    model = tiny_model("llama")
    assert len(layers_of(model)) == 2
    model.model._no_split_modules = None
    with pytest.raises(UserError, match=r"does not say what its layers are.*--shard none"):
        layers_of(model)


def test_processes_of_a_machine_load_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads for processes: three of them, of which the last comes first."""
    count, inside, seen = 3, [], []
    barrier = threading.Barrier(count, timeout=10)
    monkeypatch.setattr(sharding, "gather_object", lambda _: list(range(count)))

    def enter(rank: int) -> None:
        accelerator: Any = SimpleNamespace(local_process_index=rank, wait_for_everyone=barrier.wait)
        time.sleep(0.02 * (count - rank))
        with sharding.one_at_a_time(accelerator):
            inside.append(rank)
            time.sleep(0.02)
            seen.append(list(inside))
            inside.remove(rank)

    threads = [threading.Thread(target=enter, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert seen == [[0], [1], [2]]


def test_a_half_precision_head_has_its_gradient_summed_in_float32() -> None:
    """As under a sharding policy, which gathers weights in bfloat16: many chunks must lose no more than one."""
    gradients = []
    for chunk_tokens in (1, 10_000):
        model = tiny_model("llama")
        model.model.to(torch.bfloat16)
        batch = token_batch(random_rollout([200] * 8), range(8), pad_id=0)
        credit = Credit(sampled=torch.ones(len(batch)))
        request = CreditRequest(needs=Needs(), credit_of=fixed_credit(credit), num_tokens=len(batch))
        module = CreditLoss(model, chunk_tokens=chunk_tokens)
        module(batch, Scores(teacher_logprob=torch.zeros(len(batch))), request)[0].backward()
        gradients.append(model.head.projection.weight.grad.float())
    scale = gradients[1].abs().max()
    assert (gradients[0] - gradients[1]).abs().max() < 0.01 * scale
