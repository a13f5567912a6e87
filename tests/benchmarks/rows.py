"""What is benchmarked: the rows (a configuration each), the tasks, and how often each row is repeated."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tropd_cli.commands import DEMO_PRESET
from tropd_cli.config import merge
from tropd_cli.presets import PRESETS

LEARNING_RATES = (2e-4, 5e-4, 1e-3)  #: every row gets its own best of these
TUNING_SEED = 100  #: the learning rate is chosen on this seed, which no reported number uses
FEW, MANY = 3, 5  #: seeds per row


@dataclass(frozen=True)
class Row:
    """One method: a layer of configuration, and on how many seeds it is run; 0 is in a study of its own."""

    name: str
    config: dict[str, Any]
    seeds: int = FEW


@dataclass(frozen=True)
class Task:
    """Models and prompts, as a layer of configuration.

    made: what lies below the folder of made models, by the option that takes it; all else is the demo's.
    own: other options in which the task departs from the demo.
    """

    name: str
    title: str
    made: dict[str, str] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)

    def config(self, models: Path) -> dict[str, Any]:
        """The demo's setting without what only costs time here, and the task's own."""
        quiet = {"checkpoint_every": 0, "record": {"every": 0}, "probe_rollouts": 64}
        made = {option: str(models / path) for option, path in self.made.items()}
        return {**DEMO_PRESET, **quiet, **made, **self.own}


#: What `python -m tests.benchmarks.gap MODELS/gap` writes.
GAP_FILES = {
    "student": "gap/student",
    "teacher": "gap/teacher",
    "data": "gap/train.jsonl",
    "eval_data": "gap/heldout.jsonl",
}

TASKS = {
    task.name: task
    for task in (
        Task("demo", "Arithmetic chains; the teacher is right after any prefix"),
        Task(
            "astray",
            "The same chains; the teacher goes astray on text in the student's words",
            made={"teacher": "teacher"},
        ),
        Task(
            "gap",
            "Chains twice as long; a student of an eighth of the teacher's size, in the teacher's words but for one habit, "
            "after which the teacher goes astray",
            made=GAP_FILES,
            own={"verifier": "demo", "max_response_length": 96, "prompts_per_step": 12},
        ),
    )
}


def _layer(strategy: dict[str, Any], *, guidance: bool = False) -> dict[str, Any]:
    return {"strategy": strategy, "guidance": {"enabled": guidance}}


def _trust_region(outlier: str, rule: str = "acceptance") -> dict[str, Any]:
    return {"name": "trust-region", "region_rule": rule, "outlier": {"name": outlier}}


OFTEN = ("opd", "reopold", "fkl-outlier", "tropd", "tropd-mask", "tropd-clip")  #: presets repeated on many seeds

#: Presets by their names; `acceptance` and `soft` rows are `trust-region` without guidance, `tropd-` ones with it.
ROWS = {
    row.name: row
    for row in (
        *(Row(name, preset.config, MANY if name in OFTEN else FEW) for name, preset in PRESETS.items()),
        Row("mask-acceptance", _layer(_trust_region("mask")), MANY),
        Row("clip-acceptance", _layer(_trust_region("clip")), MANY),
        Row("tropd-min-prefix", merge(PRESETS["tropd"].config, {"guidance": {"length": "min"}})),
        Row("tropd-soft", _layer(_trust_region("forward-kl", "soft"), guidance=True)),
        Row("soft", _layer(_trust_region("forward-kl", "soft"))),
        Row("fkl-as-reward", _layer({"name": "fkl", "as_reward": True}), 0),
        Row("gkd", _layer({"name": "gkd"}), MANY),
        Row("opd-plus", _layer({"name": "opd-plus"})),
        Row("top-d", _layer({"name": "top-d"})),
        Row("iw-opd", _layer({"name": "iw-opd"})),
        Row("exopd", _layer({"name": "exopd"})),
    )
}
