"""Small messages between the command and rank 0 of its workers, through the cluster's own key-value store: progress one
way, the wish to stop the other. It needs no process, port or file of its own and works across nodes."""

from __future__ import annotations

import json
import logging
from typing import Any

import ray
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from diffscale.training.monitor import EVALUATED, PHASE, PROGRESS

PREFIX = "diffscale/"
STOP, OUTCOME, NOTICES = "stop", "outcome", "notices"


class Channel:
    """launch: a string that only this launch of the command has."""

    def __init__(self, launch: str) -> None:
        self.launch = launch

    def put(self, topic: str, message: dict[str, Any]) -> None:
        _internal_kv_put(self._key(topic), json.dumps(message).encode(), overwrite=True)

    def get(self, topic: str) -> dict[str, Any] | None:
        """The last message, or None."""
        if not ray.is_initialized():
            return None
        data = _internal_kv_get(self._key(topic))
        return None if data is None else json.loads(data)

    def close(self) -> None:
        if ray.is_initialized():
            for topic in (PROGRESS, PHASE, EVALUATED, STOP, OUTCOME, NOTICES):
                _internal_kv_del(self._key(topic))

    def _key(self, topic: str) -> bytes:
        return f"{PREFIX}{self.launch}/{topic}".encode()


class Notices(logging.Handler):
    """Carries a worker's warnings to the command, which shows them: what was passed over, retried or is not exact."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(logging.WARNING)
        self.channel = channel
        self.texts: list[str] = (channel.get(NOTICES) or {"texts": []})["texts"]

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
        self.channel.put(NOTICES, {"texts": self.texts})
