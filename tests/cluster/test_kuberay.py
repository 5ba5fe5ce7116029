"""The Kubernetes manifests: valid for KubeRay, of one Ray version, without keys, with commands that exist."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer.main

from lesa_ray.cli import app
from lesa_ray.config import ExpandConfig, load_settings
from lesa_ray.scratch import SCRATCH_VARIABLE
from lesa_ray.training.train_settings import TrainConfig
from tests.cluster.manifests import CLUSTER, MANIFESTS, documents, gibibytes, of_kind, validate

SETTINGS = {"expand": ExpandConfig, "pretrain": TrainConfig}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_every_manifest_is_valid_for_kuberay(path: Path) -> None:
    for document in documents(path):
        assert document["metadata"].get("name") or document["metadata"]["generateName"]
        if document["apiVersion"].startswith("ray.io/"):
            validate(document)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("spec", "workerGroupSpecs", 0, "minReplicas"), "none"),
        (("spec", "workerGroupSpecs", 0, "minReplica"), 0),
        (("spec", "authOptions", "mode"), "password"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "name"), None),
    ],
)
def test_a_manifest_that_is_wrong_is_found(place: tuple[Any, ...], value: object) -> None:
    (cluster,) = copy.deepcopy(of_kind("RayCluster"))
    inner: Any = cluster
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(cluster)


def test_a_job_with_a_cluster_of_its_own_is_valid() -> None:
    """What expand.yaml says of it."""
    (cluster,) = of_kind("RayCluster")
    for job in copy.deepcopy(of_kind("RayJob")):
        del job["spec"]["clusterSelector"]
        validate(job | {"spec": job["spec"] | {
            "rayClusterSpec": cluster["spec"], "shutdownAfterJobFinishes": True, "backoffLimit": 2,
        }})  # fmt: skip


def jobs() -> list[dict[str, Any]]:
    return [job["spec"] for job in of_kind("RayJob")] + [job["spec"]["jobTemplate"] for job in of_kind("RayCronJob")]


def test_jobs_select_the_cluster_that_is_described() -> None:
    (cluster,) = of_kind("RayCluster")
    assert [job["clusterSelector"] for job in jobs()] == [{"ray.io/cluster": cluster["metadata"]["name"]}] * 3
    for job in jobs():  # what KubeRay refuses beside clusterSelector; no schema says so
        assert not {"rayClusterSpec", "backoffLimit", "suspend", "ttlSecondsAfterFinished"} & job.keys()


def test_the_cluster_grows_from_nothing_and_its_pods_have_the_role() -> None:
    account, cluster = documents(CLUSTER / "kuberay" / "raycluster.yaml")
    spec = cluster["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert {name: (group["minReplicas"], group["replicas"]) for name, group in groups.items()} == {
        "cpu": (0, 0),
        "large": (0, 0),
        "gpu": (0, 0),
    }
    pods = [group["template"]["spec"] for group in (spec["headGroupSpec"], *groups.values())]
    assert {pod["serviceAccountName"] for pod in pods} == {account["metadata"]["name"]}
    assert "eks.amazonaws.com/role-arn" in account["metadata"]["annotations"]
    assert [pod.get("automountServiceAccountToken", True) for pod in pods] == [True, False, False, False]
    limits = {name: group["template"]["spec"]["containers"][0]["resources"]["limits"] for name, group in groups.items()}
    assert {name: "nvidia.com/gpu" in limit for name, limit in limits.items()} == {
        "cpu": False, "large": False, "gpu": True,
    }  # fmt: skip


def test_what_fits_in_no_memory_goes_to_a_volume_of_the_worker() -> None:
    (cluster,) = of_kind("RayCluster")
    for group in cluster["spec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        (place,) = [variable["value"] for variable in container["env"] if variable["name"] == SCRATCH_VARIABLE]
        (name,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == place]
        assert {"name": name, "emptyDir": {}} in pod["volumes"]


def test_a_token_for_models_behind_a_licence_comes_from_a_secret_if_there_is_one() -> None:
    (cluster,) = of_kind("RayCluster")
    for group in (cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        (token,) = [variable for variable in container["env"] if variable["name"] == "HF_TOKEN"]
        assert token["valueFrom"]["secretKeyRef"]["optional"] is True
        assert "value" not in token


MACHINE = {"cpu": 192, "memory": 2048, "nvidia.com/gpu": 8}
"""p5.48xlarge, memory in GiB, of EC2's page of instance types."""


def test_a_pod_with_gpus_has_a_machine_to_itself() -> None:
    """NCCL speaks over the network between pods, wherever they are."""
    (cluster,) = of_kind("RayCluster")
    (group,) = [group for group in cluster["spec"]["workerGroupSpecs"] if group["groupName"] == "gpu"]
    (container,) = group["template"]["spec"]["containers"]
    has = container["resources"]["limits"]
    assert has == container["resources"]["requests"]
    assert int(has["nvidia.com/gpu"]) == MACHINE["nvidia.com/gpu"]
    # kubelet keeps 0.55 CPUs and 3 GiB there, daemons a few more; Karpenter reckons with 7.5 % less memory
    assert 0.9 * MACHINE["cpu"] < int(has["cpu"]) < MACHINE["cpu"] - 4
    assert 0.8 * MACHINE["memory"] < gibibytes(has["memory"]) < 0.925 * MACHINE["memory"] - 16
    (name,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
    (volume,) = [volume["emptyDir"] for volume in group["template"]["spec"]["volumes"] if volume["name"] == name]
    assert volume["medium"] == "Memory"
    assert 200e9 / 2**30 < gibibytes(volume["sizeLimit"]) < gibibytes(has["memory"]) / 2
    training = [shlex.split(job["entrypoint"]) for job in jobs() if ".pretrain " in job["entrypoint"]]
    for words in training:
        workers = int(words[words.index("--workers") + 1])
        assert workers % MACHINE["nvidia.com/gpu"] == 0
        assert workers <= group["maxReplicas"] * MACHINE["nvidia.com/gpu"]


def test_the_plain_cron_job_submits_to_that_cluster_with_its_token() -> None:
    (cluster,), (cron,) = of_kind("RayCluster"), of_kind("CronJob")
    assert cron["apiVersion"] == "batch/v1"
    (scheduled,) = of_kind("RayCronJob")
    assert cron["spec"]["schedule"] == scheduled["spec"]["schedule"]
    assert cron["spec"]["timeZone"] == scheduled["spec"]["timeZone"]
    (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    name = cluster["metadata"]["name"]
    command = container["command"]
    separator = command.index("--")
    assert command[:separator] == ["lesa-ray", "submit", f"--address=http://{name}-head-svc:8265"]
    assert shlex.join(command[separator + 1 :]) == scheduled["spec"]["jobTemplate"]["entrypoint"].strip()
    environment = {variable["name"]: variable for variable in container["env"]}
    assert environment["RAY_AUTH_MODE"]["value"] == cluster["spec"]["authOptions"]["mode"]
    assert environment["RAY_AUTH_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": name, "key": "auth_token"}}


def entrypoints() -> list[str]:
    return [job["entrypoint"] for job in jobs()]


@pytest.mark.parametrize("entrypoint", entrypoints())
def test_commands_are_jobs_with_settings_that_exist(entrypoint: str) -> None:
    python, module, name, *arguments = shlex.split(entrypoint)
    assert (python, module) == ("python", "-m")
    package, _, job = name.partition(".")
    assert (CLUSTER.parent / package / f"{job}.py").is_file()
    command = typer.main.get_command(app).commands[job]  # type: ignore[attr-defined]
    given = command.make_context(job, arguments).params
    # On a cluster without a GPU, as this one begins, the default is none.
    assert float(given[{"expand": "gpus_per_task", "pretrain": "gpus_per_worker"}[job]]) == 1
    if given["config"] is None:
        known = {name: value for name, value in given.items() if name in SETTINGS[job].model_fields}
        load_settings(SETTINGS[job], None, **known)


def test_one_version_of_ray_and_python_everywhere() -> None:
    pin = re.search(r"^ray==(\S+)$", (CLUSTER.parent / "constraints.txt").read_text(), re.M)
    assert pin
    (cluster,) = of_kind("RayCluster")
    assert cluster["spec"]["rayVersion"] == pin[1]
    images = re.findall(
        r"rayproject/ray:(\S+)", (CLUSTER / "Dockerfile").read_text() + (CLUSTER / "aws.yaml").read_text()
    )
    assert images
    assert set(images) == {f"{pin[1]}-py311-gpu"}
    ours = {
        container["image"]
        for group in (cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"])
        for container in group["template"]["spec"]["containers"]
    }
    (cron,) = of_kind("CronJob")
    assert ours == {cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["image"]}


def test_no_file_of_the_folder_holds_a_key() -> None:
    shaped = re.compile(r"AKIA[0-9A-Z]{16}|(?i:secret_?access_?key|aws_access_key_id)\s*[:=]|BEGIN [A-Z ]*PRIVATE KEY")
    for path in CLUSTER.rglob("*"):
        if path.is_file():
            assert not shaped.search(path.read_text()), path
