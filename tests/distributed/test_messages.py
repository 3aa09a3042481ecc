"""What the workers of one launch send to its command, through a real cluster's store."""

from __future__ import annotations

import logging
import uuid

import pytest

from diffscale.distributed.messages import Messages, Notices


@pytest.fixture(scope="module")
def cluster():
    from diffscale.distributed.connect import connect

    connect(num_cpus=1)
    import ray

    yield
    ray.shutdown()


def test_many_ranks_send_one_warning_of_each_kind(cluster):
    """Each of 1,024 ranks sent its own, and the command read every list twice a second."""
    messages = Messages(uuid.uuid4().hex)
    ranks = [Notices(messages, f"rank {rank}", among_many=rank > 0) for rank in range(8)]

    def warn(rank: int, text: str, *args: object) -> None:
        ranks[rank].emit(logging.LogRecord("diffscale", logging.WARNING, "", 0, text, args, None))

    for rank in range(1, 8):
        warn(rank, "rank %d is slow", rank)
        warn(rank, "the cache of %s is full", "node")
    for _ in range(2):
        warn(0, "rank %d is slow", 0)  # rank 0 says all that it has to say
    texts = sorted(text for found in messages.notices().values() for text in found)
    assert texts == ["rank 0 is slow", "rank 0 is slow", "rank 1 is slow", "the cache of node is full"]
    messages.close()
    assert messages.notices() == {}
