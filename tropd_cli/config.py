"""What a run is made of: defaults < preset < YAML < flags < --set, validated, and printable as the YAML that repeats it."""

from __future__ import annotations

import contextlib
import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import UserError

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Unknown keys are errors; values are not coerced from text."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Guidance(Section):
    """Teacher-written prefixes. auto: on for trust-region and its composition with AOPD."""

    enabled: Literal["auto"] | bool = "auto"
    length: Literal["uniform", "min"] = "uniform"
    weight: Annotated[float, Field(ge=0)] = 0.001


class Optimizer(Section):
    """AdamW. The paper states only the learning rate and that it is constant; the rest is our choice."""

    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: CountOrZero = 0


class Recording(Section):
    """Which sequences a run keeps for inspection. every: 0 keeps none."""

    every: CountOrZero = 10
    sequences: Count = 8
    top_k: Count = 5


class Config(Section):
    """Everything `tropd distill` can be told. The paper's published setting is the default."""

    student: str | None = None
    teacher: str | None = None
    reference: str | None = None
    student_revision: str | None = None
    teacher_revision: str | None = None
    reference_revision: str | None = None
    data: str | None = None
    eval_data: str | None = None
    output: str | None = None
    plugin: list[str] = []

    strategy: dict[str, Any] = {"name": "trust-region"}
    guidance: Guidance = Guidance()

    steps: Count = 200
    prompts_per_step: Count = 128
    rollouts_per_prompt: Count = 4
    updates_per_rollout: Count = 1
    max_prompt_length: Count = 2048
    max_response_length: Count = 8096
    temperature: Annotated[float, Field(gt=0)] = 1.0
    learning_rate: Annotated[float, Field(gt=0)] = 5e-6
    optimizer: Optimizer = Optimizer()
    seed: CountOrZero = 0

    lora_rank: CountOrZero = 0
    lora_alpha: Count | None = None
    lora_targets: str | list[str] = "all-linear"
    merge: bool = False

    teacher_chat_template: str | None = None
    chat_template_arguments: dict[str, Any] = {}
    skip_bad_rows: bool = False

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    teacher_device: str = "auto"
    teacher_offload: bool = False
    gradient_checkpointing: bool = False
    padding_free: bool = True
    micro_batch_tokens: Count | None = None
    rollout_batch_tokens: Count | None = None
    chunk_tokens: Count | None = None
    num_processes: Count = 1
    shard: Literal["none", "full", "grad_op"] = "none"
    threads: CountOrZero = 0

    checkpoint_every: CountOrZero = 50
    keep_checkpoints: Count = 2
    eval_every: CountOrZero = 0
    eval_samples: Count = 1
    eval_prompts: Count | None = None
    keep_best: bool = False
    verifier: str = "auto"
    probe_rollouts: CountOrZero = 64
    record: Recording = Recording()
    log_with: list[str] = []
    stop_when_unhealthy: bool = False
    hang_timeout: Annotated[float, Field(gt=0)] = 1800.0


#: The only keys that may change when a run is resumed.
RESUMABLE = frozenset(
    "steps num_processes shard padding_free micro_batch_tokens rollout_batch_tokens chunk_tokens teacher_offload log_with "
    "threads hang_timeout plugin output".split()
)


# ── layers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, nested mappings key by key. A strategy or outlier of another name replaces the old one."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if key in ("strategy", "outlier"):
            old = {"name": old} if isinstance(old, str) else old
            value = {"name": value} if isinstance(value, str) else value
            if (
                isinstance(old, dict)
                and isinstance(value, dict)
                and value.get("name", old.get("name")) != old.get("name")
            ):
                old = None
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML mapping. Raises UserError: missing, unreadable or no mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"config '{path}' cannot be read: {error.strerror}. Make one with: tropd distill --print-config"
        ) from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"config '{path}' is not YAML: {' '.join(str(error).split())}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(
            f"config '{path}' is a {type(data).__name__}; it must be a mapping of options. See: tropd distill --print-config"
        )
    return data


def parse_set(assignment: str) -> dict[str, Any]:
    """`a.b=c` -> {"a": {"b": c}}, c read as YAML; 1e-5 counts as a number. Raises UserError."""
    path, equals, text = assignment.partition("=")
    if not equals or not path or not all(path.split(".")):
        raise UserError(f"--set {assignment!r} is no assignment. Write it as --set optimizer.eps=1e-8")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {assignment!r}: the value is not YAML") from error
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    nested: Any = value
    for key in reversed(path.split(".")):
        nested = {key: nested}
    return dict(nested)


def build_config(*layers: dict[str, Any]) -> Config:
    """Validates the merged layers. Raises UserError naming the key, the value, what is allowed and what is near."""
    merged: dict[str, Any] = {"strategy": Config().strategy}
    for layer in layers:
        merged = merge(merged, _numbers(layer))
    if isinstance(merged["strategy"], str):
        merged["strategy"] = {"name": merged["strategy"]}
    try:
        return Config(**merged)
    except ValidationError as error:
        raise UserError("\n".join(_explain(problem) for problem in error.errors())) from error


def _numbers(layer: dict[str, Any]) -> dict[str, Any]:
    """YAML 1.1 reads 5e-6 as text: turn such text into numbers, at any depth."""
    result: dict[str, Any] = {}
    for key, value in layer.items():
        if isinstance(value, dict):
            value = _numbers(value)
        elif isinstance(value, str) and value[:1] in "+-.0123456789" and "e" in value.lower():
            with contextlib.suppress(ValueError):
                value = float(value)
        result[key] = value
    return result


def known_keys() -> list[str]:
    """Every option as a dotted path."""
    keys = []
    for name, info in Config.model_fields.items():
        keys.append(name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            keys += [f"{name}.{inner}" for inner in info.annotation.model_fields]
    return keys


def _explain(problem: Any) -> str:
    path = ".".join(
        str(part) for part in problem["loc"] if not str(part).startswith(("bool", "literal", "constrained"))
    )
    value = problem.get("input")
    if problem["type"] == "extra_forbidden":
        keys = known_keys()
        close = difflib.get_close_matches(path, keys, n=1, cutoff=0.6)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        return f"unknown option '{path}'.{hint} See: tropd distill --print-config"
    return f"option '{path}' is {value!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}. See: tropd distill --print-config"


def to_yaml(config: Config) -> str:
    """The YAML that `--config` turns back into this configuration."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


# ── strategy ────────────────────────────────────────────────────────────────────────────────────────────────────────


def build_strategy(config: Config) -> Any:
    """The configured strategy; plug-in files named in the configuration are loaded first.

    Raises:
        UserError: unknown name, option or value, or an estimator for a strategy that has none.
    """
    import dataclasses

    from strategies import STRATEGIES
    from strategies.registry import RegistryError

    load_plugins(config.plugin)
    spec = config.strategy
    try:
        cls = STRATEGIES.get(str(spec.get("name")))
        if "outlier" in spec and "outlier" not in {f.name for f in dataclasses.fields(cls)}:  # type: ignore[arg-type]
            having = [
                e.name
                for e in STRATEGIES.entries()
                if e.built_in and "outlier" in {f.name for f in dataclasses.fields(STRATEGIES.get(e.name))}  # type: ignore[arg-type]
            ]
            raise UserError(
                f"strategy '{spec['name']}' has no outlier estimator, so --outlier does not apply. "
                f"Strategies that have one: {', '.join(having)}"
            )
        return STRATEGIES.build(spec)
    except RegistryError as error:
        raise UserError(str(error)) from error


def load_plugins(paths: list[str]) -> None:
    """Runs plug-in files, which register strategies and estimators. Raises UserError."""
    from strategies import STRATEGIES
    from strategies.registry import RegistryError

    for path in paths:
        try:
            STRATEGIES.load_file(Path(path))
        except RegistryError as error:
            raise UserError(str(error)) from error
