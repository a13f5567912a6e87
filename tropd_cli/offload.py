"""Frozen models that lie in the host's memory and come to their device only while they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from strategies import Needs

from .config import Config
from .errors import UserError
from .models import LanguageModel
from .pair import HOST

T = TypeVar("T")


class Offload:
    """Where teacher and reference are. Uses may be nested; between them the device's memory is free."""

    def __init__(self, models: list[LanguageModel]) -> None:
        self.homes = [(model, model.device) for model in models]
        self._uses = 0
        for model in models:
            model.run = self.run
        self._send_away()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """All of them on their devices."""
        self._uses += 1
        try:
            if self._uses == 1:
                for model, device in self.homes:
                    model.model.to(device)
            yield
        finally:
            self._uses -= 1
            if self._uses == 0:
                self._send_away()

    def run(self, action: Callable[[], T]) -> T:
        """`action` while they are there."""
        with self.at_work():
            return action()

    def _send_away(self) -> None:
        for model, _ in self.homes:
            model.model.to(HOST)


def check_offload(config: Config, needs: Needs) -> None:
    """Raises UserError where the frozen models are read at times when they would be away."""
    if needs.full_distribution:
        raise UserError(
            f"teacher_offload does not go with strategy '{config.strategy['name']}', which reads the teacher's whole "
            "distribution during the update. Leave it out, or put the teacher elsewhere: --teacher-device cpu"
        )
    if config.shard != "none":
        raise UserError(
            f"teacher_offload does not go with --shard {config.shard}, which cuts the teacher over the processes. "
            "Leave one of them out"
        )
