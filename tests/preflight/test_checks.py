"""Every fault that doctor looks for is found and named, with a fix; a healthy cluster passes."""

from __future__ import annotations

from diffscale.preflight import checks
from diffscale.preflight.memory import Estimate
from diffscale.preflight.node_facts import NodeFacts

VERSIONS = {"python": "3.11.9", "ray": "2.60.0", "torch": "2.15.0", "diffscale": "0.1.0"}


def node(name: str = "a", **changes) -> NodeFacts:
    facts = NodeFacts(
        node_id=name,
        host=name,
        versions=dict(VERSIONS),
        cpus=8,
        memory=32_000_000_000,
        shared_memory=(8_000_000_000, 8_000_000_000),
        temporary_free=100_000_000_000,
        data_hash="1234567890abcdef",
    )
    for key, value in changes.items():
        setattr(facts, key, value)
    return facts


def needing(total: int) -> Estimate:
    return Estimate(state=total // 2, activations=total // 2, images=8, total=total)


def failures(findings) -> list[checks.Finding]:
    for finding in findings:
        assert finding.level == "ok" or finding.fix, f"no fix for: {finding.found}"
    return [f for f in findings if f.level == "failure"]


def test_a_healthy_cluster_has_no_failures():
    nodes = [node("a"), node("b")]
    findings = [
        *checks.versions(nodes, VERSIONS),
        *checks.authentication("token", False, None),
        *checks.gpus(nodes, 0),
        *checks.storage(nodes, "s3://bucket", ["a", "b", "driver"]),
        *checks.dataset(nodes, "s3://bucket/data", "1234567890abcdef"),
        *checks.clocks({"a": (0.01, 0.001), "b": (-0.02, 0.001)}),
        *checks.disks(nodes),
        *checks.memory(needing(1_000_000_000), nodes, gpu=False),
    ]
    assert {f.level for f in findings} == {"ok"}


def test_another_ray_on_one_node_and_an_old_torch_are_failures():
    (other,) = failures(checks.versions([node("a"), node("b", versions=VERSIONS | {"ray": "2.59.0"})], VERSIONS))
    assert "b: 2.59.0" in other.found
    old = VERSIONS | {"torch": "2.9.1"}
    (older,) = failures(checks.versions([node(versions=old)], old))
    assert "torch 2.9.1" in older.found


def test_an_open_cluster_is_a_failure_and_a_private_one_is_not(tmp_path):
    assert failures(checks.authentication("disabled", False, None))
    assert not failures(checks.authentication("disabled", True, None))


def test_a_token_that_others_can_read_is_a_failure(tmp_path):
    token = tmp_path / "auth_token"
    token.write_text("secret")
    token.chmod(0o644)
    (found,) = failures(checks.authentication("token", False, token))
    assert found.fix == f"chmod 600 {token}"
    assert "secret" not in found.found
    token.chmod(0o600)
    assert not failures(checks.authentication("token", False, token))


def test_too_few_gpus_and_a_broken_driver_are_failures():
    h200 = ("NVIDIA H200", 139_000_000_000)
    assert not failures(checks.gpus([node(gpus=[h200])], 1))
    assert failures(checks.gpus([node(gpus=[h200])], 2))
    assert failures(checks.gpus([node(gpus=[h200], cuda_error="RuntimeError: no kernel image")], 1))
    assert [f.level for f in checks.gpus([node(gpus=[h200, ("NVIDIA L4", 24_000_000_000)])], 2)] == ["warning"]


def test_storage_that_is_not_one_place_for_all_nodes_is_a_failure():
    unseen = node("b", storage_readable="FileNotFoundError: /data/.doctor/driver")
    assert failures(checks.storage([node("a"), unseen], "/data", ["a"]))
    assert failures(checks.storage([node("a"), node("b")], "/data", ["a"])), "b's own file is not seen by the driver"
    assert failures(checks.storage([node("a", storage_writable="PermissionError: /data")], "/data", ["a"]))


def test_a_node_with_another_dataset_or_none_is_a_failure():
    assert failures(checks.dataset([node("a"), node("b", data_hash="ffff")], "/data", "1234567890abcdef"))
    assert failures(checks.dataset([node("a", data_error="FileNotFoundError: manifest")], "/data", "1234567890abcdef"))


def test_clock_skew_counts_only_beyond_what_the_round_trip_explains():
    assert [f.level for f in checks.clocks({"a": (3.0, 2.5)})] == ["ok"]
    assert [f.level for f in checks.clocks({"a": (3.0, 0.1)})] == ["warning"]
    assert failures(checks.clocks({"a": (-3600.0, 0.1)}))


def test_full_disks_and_dockers_default_shared_memory_are_failures():
    assert failures(checks.disks([node(temporary_free=1_000_000_000)]))
    (small,) = failures(checks.disks([node(shared_memory=(64_000_000, 64_000_000))]))
    assert "--shm-size" in small.fix


def test_missing_metric_weights_and_a_preset_too_large_are_failures():
    assert failures(checks.metrics([node(metric_errors={"fid": "UserError: no weights"})]))
    assert not failures(checks.metrics([node(metric_errors={"fid": ""})]))
    assert failures(checks.memory(needing(40_000_000_000), [node(gpus=[("L4", 24_000_000_000)])], gpu=True))
    assert [
        f.level for f in checks.memory(needing(23_000_000_000), [node(gpus=[("L4", 24_000_000_000)])], gpu=True)
    ] == ["warning"]


def test_workers_share_a_node_as_far_as_its_gpus_or_cpus_go():
    nodes = [node("head"), *(node(name, gpus=[("H200", 141_000_000_000)] * 8) for name in "ab")]
    assert checks.workers_of_a_node(nodes, True, 16, 1) == 8
    assert checks.workers_of_a_node(nodes, True, 4, 1) == 4
    assert checks.workers_of_a_node([node()], False, 16, 2) == 4
    assert checks.workers_of_a_node([node()], True, 16, 1) == 16  # without a GPU there is nothing to share
