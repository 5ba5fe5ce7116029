"""What `pipelines/fleet.yaml` asks for can come: on each of the two clusters that README brings up from nothing."""

from __future__ import annotations

import pytest
import yaml

from lesa_ray.config import ExpandConfig, load_settings
from lesa_ray.evaluation.settings import EvaluateConfig
from lesa_ray.fleet.settings import FleetConfig
from lesa_ray.fleet.stages import merged
from lesa_ray.machines import Machines
from lesa_ray.training.train_settings import TrainConfig
from tests.cluster.manifests import CLUSTER, gibibytes, of_kind

INSTANCES = {"m7i.xlarge": (4, 0), "m7i.4xlarge": (16, 0), "r7i.12xlarge": (48, 0), "g6e.12xlarge": (48, 4)}
"""CPUs and GPUs, of EC2's page of instance types."""


def kuberay() -> Machines:
    (cluster,) = of_kind("RayCluster")
    nodes = []
    for group in cluster["spec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        has = container["resources"]["requests"]
        node = {"CPU": float(has["cpu"]), "GPU": float(has.get("nvidia.com/gpu", 0))}
        nodes.extend(group["maxReplicas"] * [node])
    return Machines.of(nodes)


def aws() -> Machines:
    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    nodes = []
    for name, kind in config["available_node_types"].items():
        cpus, gpus = INSTANCES[kind["node_config"]["InstanceType"]]
        nodes.extend((1 if name == "head" else kind["max_workers"]) * [{"CPU": float(cpus), "GPU": float(gpus)}])
    assert len(nodes) <= 1 + config["max_workers"]
    return Machines.of(nodes)


@pytest.mark.parametrize("machines", [kuberay(), aws()], ids=["kuberay", "aws"])
def test_every_stage_of_the_fleet_has_room(machines: Machines) -> None:
    fleet = load_settings(FleetConfig, str(CLUSTER.parent / "pipelines" / "fleet.yaml"))
    assert fleet.budget is not None
    assert fleet.budget.gpus <= machines.total("GPU")
    assert fleet.budget.cpus <= machines.total("CPU")
    for family in fleet.families:
        given = {name: merged(fleet.stages[name], family.stages.get(name, {})) for name in fleet.stages}
        unit = ExpandConfig.model_validate({"base": "b", "out": "o", **given["expand"]})
        run = TrainConfig.model_validate({"checkpoint": "c", "data": "d", "out": "o", **given["pretrain"]})
        measured = EvaluateConfig.model_validate({"checkpoints": ["c"], "data": ["d"], **given["evaluate"]})
        for one in (unit, measured):
            assert one.gpus_per_task is not None, "on a cluster without a GPU, as these begin, the default is none"
            assert one.cpus_per_task is not None
            assert machines.room({"GPU": one.gpus_per_task, "CPU": one.cpus_per_task}), (
                family.name,
                one,
            )
        assert run.gpus_per_worker is not None
        bundle = {"GPU": run.gpus_per_worker, "CPU": run.cpus_per_worker or 1.0}
        assert machines.room(bundle) >= run.worker_range[0], (family.name, bundle)


def test_the_largest_checkpoint_that_is_measured_has_room_on_the_disk() -> None:
    """One on S3 is copied there first: the grown 70B, 210 GB; where two tasks fit its base's 141 GB beside it."""
    (cluster,) = of_kind("RayCluster")
    (large,) = (group for group in cluster["spec"]["workerGroupSpecs"] if group["groupName"] == "large")
    asked = large["template"]["spec"]["containers"][0]["resources"]["requests"]["ephemeral-storage"]
    assert gibibytes(asked) * 2**30 > 250e9
    kind = yaml.safe_load((CLUSTER / "aws.yaml").read_text())["available_node_types"]["large"]
    (disk,) = kind["node_config"]["BlockDeviceMappings"]
    assert disk["Ebs"]["VolumeSize"] * 2**30 > 210e9 + 141e9 + 100e9  # the image and Docker's take some 100
