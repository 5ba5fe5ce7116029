"""The launcher's file for AWS passes Ray's own checks, and the roles that it names are those that the stack makes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws

from tests.cluster.manifests import CLUSTER, documents

LAUNCHER = CLUSTER / "aws.yaml"


def launcher() -> dict[str, Any]:
    return yaml.safe_load(LAUNCHER.read_text())  # type: ignore[no-any-return]


def test_the_launcher_s_file_passes_ray_s_validation() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(launcher())
    validate_config(prepared)
    wrong = prepared | {"min_worker": 1}
    with pytest.raises(Exception, match="min_worker"):
        validate_config(wrong)


def test_machines_come_and_go_and_only_workers_can_be_taken_away() -> None:
    config = launcher()
    types = config["available_node_types"]
    spot = {name: "InstanceMarketOptions" in kind["node_config"] for name, kind in types.items()}
    assert spot == {"head": False, "cpu": True, "large": True, "gpu": True}
    workers = [kind for name, kind in types.items() if name != "head"]
    assert all(kind["min_workers"] == 0 for kind in workers)
    assert sum(kind["max_workers"] for kind in workers) >= config["max_workers"] > 0
    profiles = {name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in types.items()}
    assert profiles == {"head": "lesa-ray-head"} | dict.fromkeys(("cpu", "large", "gpu"), "lesa-ray-worker")


def test_nodes_install_the_newest_wheel_with_what_the_image_has(tmp_path: Path) -> None:
    """As the shell runs it, with a pip that says what it was given."""
    for version in ("0.9.0", "0.10.0"):
        (tmp_path / f"lesa_ray-{version}-py3-none-any.whl").touch()
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    pip.chmod(0o755)
    command = launcher()["setup_commands"][0].replace("/home/ray/dist", str(tmp_path))
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=20, check=True
    )
    (extras,) = re.findall(r"'\.(\[.*\])'", (CLUSTER / "Dockerfile").read_text())
    assert done.stdout.splitlines()[-2:] == [f"{tmp_path}/lesa_ray-0.10.0-py3-none-any.whl{extras}", "boto3"]


def test_the_wheel_is_made_from_what_is_there_now() -> None:
    (line,) = [line[1:].strip() for line in LAUNCHER.read_text().splitlines() if " pip wheel " in line]
    assert line.startswith("rm -rf build dist && ")
    assert f"    {line}\n" in (CLUSTER.parent / "README.md").read_text()


def test_jobs_own_processes_are_on_the_head() -> None:
    """Every other machine can be taken away, and a job ends with its driver."""
    readme = (CLUSTER.parent / "README.md").read_text()
    listed = readme[readme.index("#### From an empty AWS account") :]
    for text in (LAUNCHER.read_text(), listed):
        assert re.findall(r"lesa-ray submit (.*?)--(?: |$)", text) == ["--cpus 0 "]


BOOTSTRAP = """
import json, sys
import yaml
from moto import mock_aws

with mock_aws():
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(open(sys.argv[1])))
    config["auth"].pop("ssh_private_key", None)
    config = bootstrap_aws(config)
    config.pop("head_node")
    validate_config(config)
    nodes = {name: kind["node_config"] for name, kind in config["available_node_types"].items()}
    assert all(node["SubnetIds"] and node["SecurityGroupIds"] and node["KeyName"] for node in nodes.values())
    print("READY", json.dumps({name: node["ImageId"] for name, node in nodes.items()}))
"""


def test_ray_s_aws_provider_takes_it(tmp_path: Path) -> None:
    """All that `ray up` does before it starts a machine, against an emulated EC2: network, security group, key pair."""
    script = tmp_path / "bootstrap.py"
    script.write_text(textwrap.dedent(BOOTSTRAP))
    environment = {
        **os.environ, "HOME": str(tmp_path), "AWS_DEFAULT_REGION": "us-west-2",
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
    }  # fmt: skip
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, str(script), str(LAUNCHER)], capture_output=True, text=True, timeout=300, check=False,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "READY" in done.stdout
    assert done.stdout.count("resolve:ssm:/aws/service/deeplearning/ami/") == 4


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An emulated AWS account; makes a stack and gives its IAM."""
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)  # undone after the emulator has put its own variables back
    region = launcher()["provider"]["region"]

    def stack(**parameters: str) -> Any:
        boto3.client("cloudformation", region_name=region).create_stack(
            StackName="lesa-ray",
            TemplateBody=(CLUSTER / "aws-iam.yaml").read_text(),
            Parameters=[{"ParameterKey": name, "ParameterValue": value} for name, value in parameters.items()],
            Capabilities=["CAPABILITY_NAMED_IAM"],
        )
        return boto3.client("iam", region_name=region)

    with mock_aws():
        yield stack


def test_the_stack_makes_the_roles_that_nodes_carry(account: Any) -> None:
    iam = account(Bucket="models")
    made = {p["InstanceProfileName"]: p["Roles"] for p in iam.list_instance_profiles()["InstanceProfiles"]}
    used = {k["node_config"]["IamInstanceProfile"]["Name"] for k in launcher()["available_node_types"].values()}
    assert made.keys() == used
    for name, roles in made.items():
        assert [role["RoleName"] for role in roles] == [name]
        assert attached(iam, name) == ["lesa-ray-store"]
    assert {role["RoleName"] for role in iam.list_roles()["Roles"]} == used
    (store,) = [p for p in iam.list_policies(Scope="Local")["Policies"] if p["PolicyName"] == "lesa-ray-store"]
    document = iam.get_policy_version(PolicyArn=store["Arn"], VersionId=store["DefaultVersionId"])
    reached = {statement["Resource"] for statement in statements(document["PolicyVersion"]["Document"])}
    assert reached == {"arn:aws:s3:::models", "arn:aws:s3:::models/*"}
    autoscaler = statements(iam.get_role_policy(RoleName="lesa-ray-head", PolicyName="autoscaler")["PolicyDocument"])
    passed = [statement for statement in autoscaler if statement["Action"] == "iam:PassRole"]
    assert [s["Resource"].rpartition("/")[2] for s in passed] == ["lesa-ray-worker"]
    assert passed[0]["Condition"] == {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}
    tagged = [s["Condition"]["StringEquals"] for s in autoscaler if "ec2:CreateTags" in s["Action"]]
    assert tagged == [
        {"ec2:CreateAction": "RunInstances"},
        {"aws:ResourceTag/ray-cluster-name": launcher()["cluster_name"]},
    ]
    ended = [s for s in autoscaler if "ec2:TerminateInstances" in s["Action"]]
    tag = ended[0]["Condition"]["StringEquals"]["aws:ResourceTag/ray-cluster-name"]
    assert tag == launcher()["cluster_name"]


def test_pods_on_eks_get_a_role_that_only_their_service_account_can_take(account: Any) -> None:
    issuer = "oidc.eks.us-west-2.amazonaws.com/id/ABC"
    iam = account(Bucket="models", OidcProvider=issuer)
    service_account, _ = documents(CLUSTER / "kuberay" / "raycluster.yaml")
    (arn,) = [v for k, v in service_account["metadata"]["annotations"].items() if k.endswith("/role-arn")]
    role = iam.get_role(RoleName=arn.rpartition("/")[2])["Role"]
    assert attached(iam, role["RoleName"]) == ["lesa-ray-store"]
    (trust,) = statements(role["AssumeRolePolicyDocument"])
    assert trust["Principal"]["Federated"].endswith(f":oidc-provider/{issuer}")
    assert trust["Condition"]["StringEquals"] == {
        f"{issuer}:aud": "sts.amazonaws.com",
        f"{issuer}:sub": f"system:serviceaccount:lesa-ray:{service_account['metadata']['name']}",
    }


def attached(iam: Any, role: str) -> list[str]:
    """The names of the managed policies of a role."""
    return [policy["PolicyName"] for policy in iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"]]


def statements(document: Any) -> list[dict[str, Any]]:
    """Of a policy, which the emulator hands back as JSON where AWS's client makes a mapping of it."""
    return (yaml.safe_load(document) if isinstance(document, str) else document)["Statement"]  # type: ignore[no-any-return]
