"""Weights in pieces: torch's `fully_shard` around student and frozen models, and whole tensors out of the pieces.

A sharded tensor is a DTensor cut along its first axis over all processes; every process holds 1/N of it. Every function
here that makes one whole, and every forward of a sharded model, is a collective: all processes have to call it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from .config import Config
from .errors import UserError
from .models import LanguageModel

if TYPE_CHECKING:
    from .credit_loss import CreditLoss

T = TypeVar("T")

#: Environment variables of `accelerate launch` for what the loop cannot run under, and what to say.
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


@dataclass(frozen=True)
class Shards:
    """How weights are cut.

    mesh: over which processes. policy: the dtype layers compute in. reshard: whether a layer's weights are let go after
    its forward (ZeRO-3), or stay for the pass (ZeRO-2).
    """

    mesh: DeviceMesh
    policy: MixedPrecisionPolicy
    reshard: bool


# ── what is asked for ───────────────────────────────────────────────────────────────────────────────────────────────


def with_launcher_options(config: Config) -> Config:
    """The configuration with what an `accelerate config` asks for.

    Accelerate and transformers are then told nothing of it: the one passes over FSDP on a CPU and shards a single model,
    the other would load weights on the first process only.

    Raises:
        UserError: DeepSpeed, Megatron-LM, FSDP 1, or offloading by FSDP.
    """
    for variable, name in REFUSED.items():
        if _is_set(variable):
            raise UserError(
                f"accelerate asks for {name}, which tropd does not run under: its loss forms gradients in the forward pass. "
                "Use a config without it, and --shard full (as ZeRO-3) or --shard grad_op (as ZeRO-2)"
            )
    if not _is_set("ACCELERATE_USE_FSDP"):
        return config
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(f"accelerate asks for FSDP version {version}; tropd shards with version 2. Set fsdp_version: 2")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise UserError(
            "accelerate asks for fsdp_offload_params, which tropd does not do. Set it to false; more processes, "
            "--lora-rank or gradient_checkpointing: true save memory too"
        )
    del os.environ["ACCELERATE_USE_FSDP"]
    return config.model_copy(
        update={
            "shard": "full" if plugin.reshard_after_forward else "grad_op",
            "gradient_checkpointing": config.gradient_checkpointing or plugin.activation_checkpointing,
        }
    )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def make_shards(config: Config, accelerator: Accelerator) -> Shards | None:
    """How this run's weights are cut, or None where each process holds them whole."""
    if config.shard == "none" or accelerator.num_processes == 1:
        return None
    policy = MixedPrecisionPolicy()
    if accelerator.mixed_precision == "bf16":
        # Layers compute in bfloat16; gradients are summed over processes in float32, as under data parallelism.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return Shards(
        mesh=init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        policy=policy,
        reshard=config.shard == "full",
    )


# ── cutting ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def shard_student(module: CreditLoss, student: LanguageModel, shards: Shards) -> None:
    """Cuts the student in place: each layer by itself, and embedding, last norm and head with the loss that reads them.

    Outside of the loss (sampling, measuring) it is then used through `student.run`, which gathers embedding and head.
    """
    for layer in layers_of(student):
        fully_shard(layer, mesh=shards.mesh, mp_policy=shards.policy, reshard_after_forward=shards.reshard)
    fully_shard(module, mesh=shards.mesh, mp_policy=shards.policy, reshard_after_forward=False)
    register_fsdp_forward_method(module, "around")

    def run(action: Callable[[], T]) -> T:
        try:
            return module.around(lambda: _in_company(student, action))
        finally:  # what stays whole takes memory, and stands in the place of the weights that are trained and saved
            for part in module.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()

    student.run = run


def shard_frozen(model: LanguageModel, shards: Shards, device: torch.device) -> None:
    """Cuts the backbone of a teacher or reference in place. The head stays whole, and with it the embedding where the two
    are one: scores and full distributions read it outside of any forward."""
    for layer in layers_of(model):
        fully_shard(layer, mesh=shards.mesh, reshard_after_forward=True)
    fully_shard(model.backbone, mesh=shards.mesh, reshard_after_forward=True)
    model.head.projection.to(device)
    model.run = lambda action: _in_company(model, action)


@torch.no_grad()
def _in_company(model: LanguageModel, action: Callable[[], T]) -> T:
    """`action`, which may make as many forwards as it likes: before each, the processes count who makes one, and those
    that have finished make one of a single token with the others, until nobody does."""
    idle = torch.zeros((1, 1), dtype=torch.int64, device=model.device)

    def somebody_works(mine: bool) -> bool:
        count = torch.tensor(int(mine), device=model.device)
        dist.all_reduce(count)
        return bool(count)

    def announce(*_: object) -> None:
        somebody_works(True)

    # Before the hook that gathers the backbone's own weights: idle processes count first, too.
    handle = model.backbone.register_forward_pre_hook(announce, prepend=True)
    try:
        result = action()
    finally:
        handle.remove()
    while somebody_works(False):
        model.backbone(input_ids=idle, use_cache=False)
    return result


def layers_of(model: LanguageModel) -> list[nn.Module]:
    """The backbone's layers, as transformers names the modules that are not to be split. Raises UserError."""
    names = set(getattr(model.base, "_no_split_modules", None) or ())
    layers = [module for module in model.backbone.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(
            f"'{model.name}' ({type(model.base).__name__}) does not say what its layers are, so it cannot be sharded. "
            "Use --shard none"
        )
    return layers


@contextmanager
def one_at_a_time(accelerator: Accelerator) -> Iterator[None]:
    """The processes of a machine enter one after another: its memory holds one whole copy of the weights at a time."""
    turns = max(gather_object([accelerator.local_process_index])) + 1
    for _ in range(accelerator.local_process_index):
        accelerator.wait_for_everyone()
    yield
    for _ in range(turns - accelerator.local_process_index):
        accelerator.wait_for_everyone()


def levelled(plan: list[list[int]]) -> list[list[int]]:
    """A plan of batches with empty ones at its end, as many as the longest plan of all processes has more."""
    return plan + [[] for _ in range(max(gather_object([len(plan)])) - len(plan))]


# ── whole tensors ───────────────────────────────────────────────────────────────────────────────────────────────────


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[Any, Any], *, keep: bool) -> dict[Any, Any]:
    """Sharded tensors made whole one at a time, kept in the host's memory where `keep` says so; the rest as it is.
    A tensor that comes twice stays one."""
    result: dict[Any, Any] = {}
    seen: dict[int, Tensor] = {}
    for name, value in tensors.items():
        if isinstance(value, DTensor):
            if id(value) not in seen:
                full = value.detach().full_tensor()
                seen[id(value)] = full.cpu() if keep else full.new_empty(0)
                del full
            value = seen[id(value)]
        result[name] = value
    return result if keep else {}


def cut_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor [as the parameter] cut as the parameter is; of a whole parameter a copy."""
    if not isinstance(parameter, DTensor):
        return tensor.clone()
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
