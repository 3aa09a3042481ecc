"""What share of a peer's compute our backbones needed for what it reached."""

from __future__ import annotations

import pytest

from benchmarks.suites.against_peers import against_peers
from diffscale.records.schema import Record

from .records import make_record


def test_the_compute_to_reach_a_peer_is_read_from_its_best_width() -> None:
    def peer(width: int, value: float) -> Record:
        settings = {"peer.peer": "diffusers", "peer.width": width}
        return make_record(model="diffusers", settings=settings, images_seen=10**6, value=value)

    ours = [make_record(images_seen=n, value=v) for n, v in ((10**5, 200.0), (2 * 10**5, 100.0), (4 * 10**5, 50.0))]
    table = against_peers([*ours, peer(16, 100.0), peer(32, 150.0)])
    (row,) = table.to_dict("records")
    assert (row["width"], row["backbone"]) == (16, "unet")
    assert row["peer_value"] == pytest.approx(100)
    assert row["flops_to_reach"] == pytest.approx(ours[1].train_flops)
    assert row["share_of_peer_flops"] == pytest.approx(ours[1].train_flops / peer(16, 1).train_flops)
