"""Fleets on a cluster of two nodes and an S3 server: nothing is made twice, whoever is killed, and only what changed.

Processes that import torch make the tests' pace: so few stages run at a time, one chain goes through several stages,
and the families and methods through one. What a change touches further on is tried in test_graph."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lesa_ray import ExpandConfig, expand
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.expansion.runner import InlineRunner
from lesa_ray.store.catalog import Store
from lesa_ray.store.record import walk
from lesa_ray.training.run import claim, prepare
from lesa_ray.training.train_settings import TrainConfig
from lesa_ray.training.worker import train
from tests import families
from tests.fleet.commands import Put, RayCluster, ended
from tests.moody import Moody
from tests.training.metric_rows import read_metrics
from tests.training.workers import run_workers

NOWHERE = {"RAY_ADDRESS": "127.0.0.1:1"}
METHODS = ("solar", "avg-deus")


def content(store: str, models: Path, names: tuple[str, ...], **changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "store": store,
        "families": [
            {"name": name, "checkpoint": str(models / name), "data": str(models / "text.txt")} for name in names
        ],
        "methods": list(METHODS),
        "factor": 1.4,
        "stages": {"expand": {"shard_size": "1GB"}},
        "lease": 8,
        "at_once": 1,
        **changes,
    }


def made(outcomes: list[dict[str, Any]]) -> set[str]:
    return {one["id"] for one in outcomes if one["how"] == "made"}


def hows(outcomes: list[dict[str, Any]]) -> set[str]:
    return {one["how"] for one in outcomes}


@pytest.mark.timeout(840)
def test_nothing_is_made_twice_and_only_what_changed_is_made_again(
    ray_cluster: RayCluster, s3: str, models: Path, put: Put, tmp_path: Path
) -> None:
    """A fleet is killed; it and another, with one setting of one family changed, take up the work together; then again:
    each stage was made once, but those that the setting changes, which are two."""
    store, names = Store(f"{s3}/store"), ("llama", "qwen2")
    file = put("tiny", content(store.url, models, names, lease=600))  # what a killed one had is free all the same
    everything = {f"expand/{name}-{method}-x1.4" for name in names for method in METHODS}

    killed = ray_cluster.start("fleet", file)
    assert killed.stderr is not None
    log = ""
    for line in killed.stderr:
        log += line
        if "made in" in log and "begins" in line:
            break
    killed.send_signal(signal.SIGKILL)
    ended(killed)
    before = {f"{record['identity']['kind']}/{record['label']}": record for _, record in store.finished()}
    assert before

    changed = content(store.url, models, names, name="changed", lease=600)
    changed["families"][1]["stages"] = {"expand": {"shard_size": "300KB"}}
    files = [file, put("changed", changed)]
    two = [ray_cluster.start("fleet", one, "--json") for one in files]
    ends = [ended(one) for one in two]
    assert [code for code, _, _ in ends] == [0, 0], ends[0][2] + ends[1][2]
    first, second = (made(outcomes) for _, outcomes, _ in ends)
    different = {f"expand/qwen2-{method}-x1.4" for method in METHODS}
    assert first & second == different
    assert first | second == everything - before.keys()
    found = store.finished()
    assert len(found) == len(everything) + len(different)
    assert all(record in [one for _, one in found] for record in before.values())  # as they were
    log = ends[0][2] + ends[1][2]
    assert "was interrupted, goes on" in log
    assert {line.split()[1] for line in log.splitlines() if ": begins" in line} == {"tiny", "changed"}

    for file in files:  # again: a cluster would be an error
        code, outcomes, _ = ray_cluster.run("fleet", file, "--json", **NOWHERE)
        assert (code, hows(outcomes)) == (0, {"complete"})
    code, standings, _ = ray_cluster.run("fleet", "status", file, "--json", **NOWHERE)
    assert {one["stage"]: one["state"] for one in standings} == dict.fromkeys(everything, "complete")
    changed["families"][1]["stages"] = {"expand": {"shard_size": "400KB"}}
    file = put("changed", changed)
    why = {one["stage"]: one["why"] for one in ray_cluster.run("fleet", file, "--dry-run", "--json", **NOWHERE)[1]}
    assert {name for name, text in why.items() if text != "complete"} == different
    assert all(why[name].startswith("settings changed: expand.shard_size (") for name in different)

    place = next(one["place"] for one in outcomes if one["id"] == "expand/llama-avg-deus-x1.4")
    assert ray_cluster.run("verify", f"{store.url}/{place}", "--json")[0] == 0
    config = ExpandConfig(base=str(models / "llama"), out=str(tmp_path / "o"), method="avg-deus", factor=1.4)
    expand(config.model_copy(update={"shard_size": "1GB"}), runner=InlineRunner())
    for path in (tmp_path / "o").glob("model*"):
        assert store.folder(place).read(path.name) == path.read_bytes()
    no_secrets(store.storage, log)


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_a_node_is_lost_while_lesa_works(
    ray_cluster: RayCluster, s3: str, models: Path, put: Put, tmp_path: Path
) -> None:
    """Weight types are being learnt on both nodes when the raylet of one is killed: the same bytes as without."""
    store = Store(f"{s3}/lost-node")
    stages = {"expand": {"lesa": {"epochs": 800}, "shard_size": "1GB"}}  # seconds a weight type
    settings = content(store.url, models, ("llama",), methods=["lesa"], stages=stages, name="lost-node")
    fleet = ray_cluster.start("fleet", put("lost-node", settings), "--json")
    while not (learnt := [name for name in walk(store.storage) if "/.lesa-ray/units/" in name]):
        assert fleet.poll() is None, fleet.communicate()[1]
        time.sleep(0.2)
    ray_cluster.kill_a_node()
    assert len(learnt) < 7  # weight types
    assert "config.json" not in " ".join(walk(store.storage))
    code, outcomes, log = ended(fleet, timeout=450)
    assert code == 0, log
    assert hows(outcomes) == {"made"}
    config = ExpandConfig.model_validate(
        {"base": str(models / "llama"), "out": str(tmp_path / "o"), "factor": 1.4, **stages["expand"]}
    )
    expand(config, runner=InlineRunner())
    for path in (tmp_path / "o").glob("model*"):
        assert store.folder(outcomes[0]["place"]).read(path.name) == path.read_bytes()


@pytest.mark.thorough
@pytest.mark.timeout(1500)
def test_three_families_by_two_methods_through_all_stages(
    ray_cluster: RayCluster, s3: str, models: Path, put: Put
) -> None:
    """Then at once again: nothing is made twice; then with one setting changed: only what depends on it."""
    names = ("llama", "qwen2", "mistral")
    common = {"steps": 2, "batch": 2, "precision": "fp32", "cpus_per_worker": 1, "eval_rows": 2}
    stages: dict[str, Any] = {
        "tokenize": {"seq_len": 32, "holdout": 0.1},
        "expand": None,
        "pretrain": common,
        "finetune": {**common, "data": str(models / "chat.jsonl"), "seq_len": 32},
        "evaluate": {"cpus_per_task": 1, "limit": 2},
    }
    settings = content(f"{s3}/all", models, names, stages=stages, methods=["lesa", "solar"], at_once=4, name="all")
    file = put("all", settings)
    code, outcomes, log = ended(ray_cluster.start("fleet", file, "--json"), timeout=1200)
    assert code == 0, log
    labels = [f"{name}-{method}-x1.4" for name in names for method in ("lesa", "solar")]
    chain = {f"{kind}/{label}" for kind in ("expand", "pretrain", "finetune", "evaluate") for label in labels}
    assert made(outcomes) == chain | {f"tokenize/{name}" for name in names}

    code, outcomes, _ = ray_cluster.run("fleet", file, "--json", **NOWHERE)
    assert (code, hows(outcomes)) == (0, {"complete"})

    stages["finetune"]["learning_rate"] = 1e-3
    settings["families"] = settings["families"][:1]
    file = put("all", settings)
    code, outcomes, log = ended(ray_cluster.start("fleet", file, "--json"), timeout=600)
    assert code == 0, log
    assert made(outcomes) == {f"{kind}/{label}" for kind in ("finetune", "evaluate") for label in labels[:2]}


def no_secrets(storage: Storage, *logs: str) -> None:
    """Neither of the keys that the tests use is in what the store holds or a fleet says."""
    texts = [storage.read(name) for name in walk(storage) if not name.endswith((".safetensors", ".parquet"))]
    assert len(texts) > 10
    for text in [*texts, *(log.encode() for log in logs)]:
        assert b"secret" not in text.replace(b"secretary", b"")


@pytest.fixture
def moody(s3: str) -> Iterator[Moody]:
    """A proxy before the S3 server."""
    proxy = Moody(os.environ["AWS_ENDPOINT_URL"])
    yield proxy
    proxy.stop()


Losses = list[tuple[int, float | None, float | None]]


def losses(out: str) -> Losses:
    return [(row["step"], row.get("loss"), row.get("heldout_loss")) for row in read_metrics(out)]


def losses_undisturbed(out: str, given: dict[str, Any]) -> Losses:
    """The same training in this process, without Ray."""
    run = prepare(TrainConfig.model_validate({**given, "out": out}), gpus=False)
    claim(run)
    train(run, torch.device("cpu"), lambda progress: None)
    return losses(out)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("more", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_a_chain_of_stages_while_the_store_fails_now_and_then(
    more: bool, ray_cluster: RayCluster, s3: str, models: Path, put: Put, tmp_path: Path, moody: Moody
) -> None:
    """Every tenth request is refused: the same losses as without. more: finetuning too, and a node is killed during
    pretraining."""
    common = {"steps": 2, "batch": 2, "precision": "fp32", "cpus_per_worker": 1, "eval_rows": 2}
    stages: dict[str, Any] = {
        "tokenize": {"seq_len": 32, "holdout": 0.1},
        "expand": None,
        "evaluate": {"cpus_per_task": 1, "limit": 2},
        "pretrain": common,
    }
    if more:
        stages["finetune"] = {**common, "data": str(models / "chat.jsonl"), "seq_len": 32}
    families_ = content("", models, ("llama",))["families"]
    families_.append({"name": "gone", "checkpoint": str(models / "nothing"), "data": str(models / "text.txt")})
    name = f"chain{'-of-more' * more}"
    store = Store(f"{s3}/{name}")
    settings = content(store.url, models, (), families=families_, methods=["solar"], stages=stages, name=name)
    file = put(name, settings)
    moody.refuses = lambda number: number % 10 == 0
    fleet = ray_cluster.start("fleet", file, "--json", AWS_ENDPOINT_URL=moody.url)
    assert fleet.stderr is not None
    log = ""
    for line in fleet.stderr:
        log += line
        if more and "pretrain/llama-solar-x1.4: starting 1 worker" in line:
            ray_cluster.kill_a_node()
            break
    code, outcomes, rest = ended(fleet, timeout=1080)
    log += rest
    assert code == 1, log  # of the family that has no checkpoint, and of no other
    assert {one["how"] for one in outcomes if "gone" in one["id"]} == {"failed"}
    assert made(outcomes) == {one["id"] for one in outcomes if "llama" in one["id"]}, log
    assert {one.split("/")[0] for one in made(outcomes)} == stages.keys()
    assert moody.refused > 20
    places = {one["id"]: one["place"] for one in outcomes}
    trained = store.folder(places["pretrain/llama-solar-x1.4"])
    for file_name in trained.list():
        (tmp_path / file_name).write_bytes(trained.read(file_name))
    assert families.load_strict(tmp_path, "llama").config.num_hidden_layers == 7
    record = store.record(places["evaluate/llama-solar-x1.4"])
    assert record is not None
    assert len(record["metrics"]["checkpoints"]) == 3 + more
    assert record["packages"]["ray"]
    record = store.record(places["pretrain/llama-solar-x1.4"])
    assert record is not None
    assert run_workers(losses_undisturbed, 1, f"{s3}/{name}-undisturbed", record["given"]) == [losses(trained.url)]
    stages["pretrain"] = {**common, "learning_rate": 1e-3}
    file = put(name, {**settings, "stages": stages, "families": families_[:1]})
    code, standings, _ = ray_cluster.run("fleet", file, "--dry-run", "--json", **NOWHERE)
    why = {
        "tokenize": "complete",
        "expand": "complete",
        "pretrain": "settings changed: pretrain.learning_rate (0.0002 → 0.001)",
        "finetune": "input changed: checkpoint",
        "evaluate": "input changed: checkpoints",
    }
    assert {one["stage"].split("/")[0]: one["why"] for one in standings} == {kind: why[kind] for kind in stages}
    no_secrets(store.storage, log)
