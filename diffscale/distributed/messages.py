"""Small messages between the command and its workers, through the cluster's own key-value store: progress one way, the
wish to stop the other. It needs no process, port or file of its own and works across nodes."""

from __future__ import annotations

import json
import logging
from typing import Any

import ray
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list, _internal_kv_put

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

    def notices(self) -> dict[str, list[str]]:
        """Every writer's warnings, oldest first."""
        if not ray.is_initialized():
            return {}
        keys = sorted(_internal_kv_list(self._key(NOTICES)))
        topics = [key.decode().removeprefix(self._key("").decode()) for key in keys]
        return {topic: (self.get(topic) or {"texts": []})["texts"] for topic in topics}

    def close(self) -> None:
        if ray.is_initialized():
            _internal_kv_del(self._key(""), del_by_prefix=True)

    def _key(self, topic: str) -> bytes:
        return f"{PREFIX}{self.launch}/{topic}".encode()


class Notices(logging.Handler):
    """Carries warnings to the command, which shows them: what was passed over, retried or is not exact.

    writer: the process that warns, by what it does; one that is started again goes on with the list of the one before.
    """

    def __init__(self, channel: Channel, writer: str) -> None:
        super().__init__(logging.WARNING)
        self.channel, self.topic = channel, f"{NOTICES}/{writer}"
        self.texts: list[str] = (channel.get(self.topic) or {"texts": []})["texts"]

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
        self.channel.put(self.topic, {"texts": self.texts})
