"""Passes progress and stop requests through the cluster's key-value store, which works across nodes.

It needs no extra process, port or file. The store is Ray's internal one: `ray.experimental.internal_kv` saves an actor
and the seconds in which the actor would start. Replace it when Ray has a public key-value store.

Importing this module must not import Ray, which reads its variables on import: `connect` has to set them before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from typing import Any

PREFIX = "diffscale/"

# Topics from the command to the workers
STOP = "stop"  # {}: save a checkpoint and stop
# Topics from rank 0 to the command
PHASE = "phase"  # {"phase": loading, training, evaluating or saving; "work": what is done of it, for a person}
PROGRESS = "progress"  # {"images_seen", "end", "loss", "images_per_second", "mfu"}
EVALUATED = "evaluated"  # {"images_seen", METRIC: value, ...} of the last evaluation
OUTCOME = "outcome"  # how the launch ended
# Topics from any process to the command
NOTICES = "notices"  # notices/WRITER: {"texts": warnings, oldest first}


class Messages:
    """The messages of one launch: the last message of each topic."""

    def __init__(self, launch: str) -> None:
        """launch: an identifier that only this launch of the command has."""
        self.launch = launch

    def put(self, topic: str, message: dict[str, Any]) -> None:
        """Replace the message of a topic."""
        from ray.experimental.internal_kv import _internal_kv_put  # import cost

        _internal_kv_put(self._key(topic), json.dumps(message).encode(), overwrite=True)

    def put_first(self, topic: str, message: dict[str, Any]) -> bool:
        """Set the message of a topic unless it has one; return whether it had none."""
        from ray.experimental.internal_kv import _internal_kv_put  # import cost

        return not _internal_kv_put(self._key(topic), json.dumps(message).encode(), overwrite=False)

    def get(self, topic: str) -> dict[str, Any] | None:
        """Return the last message of a topic, or None."""
        if not _connected():
            return None
        from ray.experimental.internal_kv import _internal_kv_get  # import cost

        data = _internal_kv_get(self._key(topic))
        return None if data is None else json.loads(data)

    def notices(self) -> dict[str, list[str]]:
        """Return every writer's warnings, oldest first."""
        if not _connected():
            return {}
        from ray.experimental.internal_kv import _internal_kv_list  # import cost

        keys = sorted(_internal_kv_list(self._key(NOTICES)))
        topics = [key.decode().removeprefix(self._key("").decode()) for key in keys]
        return {topic: (self.get(topic) or {"texts": []})["texts"] for topic in topics}

    def close(self) -> None:
        """Delete the messages of the launch."""
        if _connected():
            from ray.experimental.internal_kv import _internal_kv_del  # import cost

            _internal_kv_del(self._key(""), del_by_prefix=True)

    def _key(self, topic: str) -> bytes:
        return f"{PREFIX}{self.launch}/{topic}".encode()


def _connected() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


class Notices(logging.Handler):
    """A log handler that sends warnings to the command, which shows them.

    A process among many equal ones sends a warning only if no other has sent one of its kind: the same text before its
    arguments are filled in. The command reads every list twice a second, and each rank would have its own.
    """

    def __init__(self, messages: Messages, writer: str, among_many: bool = False) -> None:
        """writer: name of the process by its role; a restarted process continues the list of the previous one."""
        super().__init__(logging.WARNING)
        self.messages, self.topic, self.among_many = messages, f"{NOTICES}/{writer}", among_many
        if among_many:
            return
        self.texts: list[str] = (messages.get(self.topic) or {"texts": []})["texts"]

    def emit(self, record: logging.LogRecord) -> None:
        """Send one warning."""
        kind = hashlib.sha256(f"{record.name} {record.msg}".encode()).hexdigest()[:16]
        first = self.messages.put_first(f"{NOTICES}/kind-{kind}", {"texts": [record.getMessage()]})
        if self.among_many or first:
            return
        self.texts.append(record.getMessage())
        self.messages.put(self.topic, {"texts": self.texts})
