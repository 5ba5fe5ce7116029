"""Fleets on a cluster of two nodes and an S3 server: nothing is made twice, whoever is killed, and only what changed.

Processes that import torch make the tests' pace: so few stages run at a time, one chain goes through several stages,
and the families and methods through one. What a change touches further on is tried in test_graph."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from lesa_ray import ExpandConfig, expand
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.expansion.runner import InlineRunner
from lesa_ray.store.catalog import Store
from lesa_ray.store.record import walk
from tests import families
from tests.fleet.commands import Put, RayCluster, ended

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


@pytest.mark.timeout(280)
def test_nothing_is_made_twice_and_only_what_changed_is_made_again(
    ray_cluster: RayCluster, s3: str, models: Path, put: Put, tmp_path: Path
) -> None:
    """A fleet is killed; it and another, with one setting of one family changed, take up the work together; then again:
    each stage was made once, but those that the setting changes, which are two."""
    store, names = Store(f"{s3}/store"), ("llama", "qwen2", "mistral")
    file = put("tiny", content(store.url, models, names))
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

    changed = content(store.url, models, names, name="changed")
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


def no_secrets(storage: Storage, *logs: str) -> None:
    """Neither of the keys that the tests use is in what the store holds or a fleet says."""
    texts = [storage.read(name) for name in walk(storage) if not name.endswith((".safetensors", ".parquet"))]
    assert len(texts) > 10
    for text in [*texts, *(log.encode() for log in logs)]:
        assert b"secret" not in text.replace(b"secretary", b"")


@pytest.mark.timeout(280)
def test_a_chain_of_stages_while_a_node_is_lost(
    ray_cluster: RayCluster, s3: str, models: Path, put: Put, tmp_path: Path
) -> None:
    train = {"steps": 2, "batch": 2, "precision": "fp32", "cpus_per_worker": 1, "eval_rows": 2}
    stages = {
        "tokenize": {"seq_len": 32, "holdout": 0.1},
        "expand": None,
        "evaluate": {"cpus_per_task": 1, "limit": 2},
        "pretrain": train,
    }
    families_ = content("", models, ("llama",))["families"]
    families_.append({"name": "gone", "checkpoint": str(models / "nothing"), "data": str(models / "text.txt")})
    store = Store(f"{s3}/chain")
    settings = content(store.url, models, (), families=families_, methods=["solar"], stages=stages, name="chain")
    file = put("chain", settings)
    fleet = ray_cluster.start("fleet", file, "--json")
    assert fleet.stderr is not None
    log = ""
    for line in fleet.stderr:
        log += line
        if "pretrain/llama-solar-x1.4: starting 1 worker" in line:
            ray_cluster.kill_a_node()
            break
    code, outcomes, rest = ended(fleet)
    log += rest
    assert code == 1, log  # of the family that has no checkpoint, and of no other
    assert {one["how"] for one in outcomes if "gone" in one["id"]} == {"failed"}
    assert made(outcomes) == {one["id"] for one in outcomes if "llama" in one["id"]}, log
    assert len(made(outcomes)) == 4
    places = {one["id"]: one["place"] for one in outcomes}
    trained = store.folder(places["pretrain/llama-solar-x1.4"])
    for name in trained.list():
        (tmp_path / name).write_bytes(trained.read(name))
    assert families.load_strict(tmp_path, "llama").config.num_hidden_layers == 7
    record = store.record(places["evaluate/llama-solar-x1.4"])
    assert record is not None
    assert len(record["metrics"]["checkpoints"]) == 3
    assert record["packages"]["ray"]
    stages["pretrain"] = {**train, "learning_rate": 1e-3}
    file = put("chain", {**settings, "stages": stages, "families": families_[:1]})
    code, standings, _ = ray_cluster.run("fleet", file, "--dry-run", "--json", **NOWHERE)
    assert {one["stage"].split("/")[0]: one["why"] for one in standings} == {
        "tokenize": "complete",
        "expand": "complete",
        "pretrain": "settings changed: pretrain.learning_rate (0.0002 → 0.001)",
        "evaluate": "input changed: checkpoints",
    }
    no_secrets(store.storage, log)
