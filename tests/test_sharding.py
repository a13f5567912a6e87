"""What an `accelerate config` may ask for. What sharding does is compared in tests/sharded_update.py, by two processes."""

from __future__ import annotations

import os

import pytest

from tropd_cli.config import build_config
from tropd_cli.errors import UserError
from tropd_cli.sharding import layers_of, with_launcher_options

from .tiny import tiny_model

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


def test_an_unknown_way_to_shard_is_refused() -> None:
    with pytest.raises(UserError, match=r"'shard' is 'ful'.*none.*full.*grad_op"):
        build_config({"shard": "ful"})


def test_a_model_without_named_layers_is_refused() -> None:
    model = tiny_model("llama")
    assert len(layers_of(model)) == 2
    model.model._no_split_modules = None
    with pytest.raises(UserError, match=r"does not say what its layers are.*--shard none"):
        layers_of(model)
