"""Predictions for a cluster: scheduling by hand, what a described cluster changes, and what people are shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from lesa_ray import ExpandConfig, cli
from lesa_ray.errors import UserError
from lesa_ray.expansion.cluster_spec import ClusterSpec, read_cluster, this_machine
from lesa_ray.expansion.estimate import estimate
from lesa_ray.expansion.prepare import prepare
from lesa_ray.expansion.schedule import Placed, Work, peak_memory, schedule
from lesa_ray.report import terminal
from lesa_ray.report.estimate import show_estimate

Bases = Callable[[str], str]
SMALL = ClusterSpec(cpus_per_node=2, memory_per_node="4GB")
GPUS = ClusterSpec(cpus_per_node=16, memory_per_node="256GB", gpus_per_node=2, gpu="h100")


def work(*seconds: float, memory: int = 1) -> list[Work]:
    return [Work(str(i), s, memory, s) for i, s in enumerate(seconds)]


def test_the_largest_first_on_three_places() -> None:
    """Graham's example: 5 5 4 4 3 3 3 on 3 machines take 11 by LPT, where 9 is possible."""
    placed = schedule(work(5, 5, 4, 4, 3, 3, 3), nodes=1, slots=3, memory=100)
    assert max(at.end for at in placed.values()) == 11
    assert [placed[str(i)].start for i in range(7)] == [0, 0, 0, 4, 5, 5, 8]


def test_nodes_are_filled_evenly_and_memory_is_waited_for() -> None:
    placed = schedule(work(4, 3, 2, 1, memory=6), nodes=2, slots=2, memory=10)
    assert placed == {
        "0": Placed(0, 0, 4),
        "1": Placed(1, 0, 3),
        "2": Placed(1, 3, 5),
        "3": Placed(0, 4, 5),
    }
    assert peak_memory(work(4, 3, 2, 1, memory=6), placed) == 6
    together = schedule(work(4, 3, 2, 1, memory=5), nodes=2, slots=2, memory=10)
    assert {at.start for at in together.values()} == {0}
    assert peak_memory(work(4, 3, 2, 1, memory=5), together) == 10
    assert schedule(work(1, memory=99), nodes=1, slots=1, memory=10) == {"0": Placed(0, 0, 1)}


def test_a_unit_waits_for_those_it_reads_from() -> None:
    first, second = work(1, 9)
    placed = schedule([first, replace(second, after=("0", "made earlier"))], nodes=1, slots=2, memory=10)
    assert placed["1"] == Placed(0, 1, 10)


def test_more_machines_and_faster_storage_take_less_time(bases: Bases, tmp_path: Path) -> None:
    expansion = prepare(ExpandConfig(base=bases("llama"), out=str(tmp_path / "out")))
    one = estimate(expansion, SMALL.model_copy(update={"cpus_per_node": 1}))
    assert {unit.name for unit in one.units} == {unit.name for unit in expansion.units}
    assert one.unit_seconds == pytest.approx(sum(unit.total for unit in one.units))
    assert one.flops == pytest.approx(sum(unit.flops for unit in expansion.units))
    assert one.short_of is None
    quick = estimate(expansion, SMALL.model_copy(update={"storage_per_node": 10**12, "cpus_per_node": 1}))
    assert quick.seconds < one.seconds
    wide = estimate(expansion, SMALL.model_copy(update={"storage_per_node": 10**12, "nodes": 8, "cpus_per_node": 1}))
    assert wide.unit_seconds == pytest.approx(max(unit.total for unit in wide.units))
    assert wide.node_memory == wide.memory < quick.memory * 2
    tiny = estimate(expansion, SMALL.model_copy(update={"memory_per_node": 10**8}))
    assert tiny.short_of == "the largest process needs more memory than a node has"


@pytest.mark.parametrize(
    ("nodes", "cpus", "given", "better"),
    [(1, 64, 1, 9), (1, 64, 9, None), (1, 16, 1, None), (4, 16, 1, 8), (8, 16, 1, 16), (1, 2, 1, None)],
)
def test_cores_that_would_be_idle_are_told_of(
    nodes: int, cpus: int, given: int, better: int | None, bases: Bases, tmp_path: Path
) -> None:
    """Seven weight types: seven units."""
    config = ExpandConfig(base=bases("llama"), out=str(tmp_path / "out"), cpus_per_task=given)
    cluster = SMALL.model_copy(update={"nodes": nodes, "cpus_per_node": cpus})
    assert estimate(prepare(config), cluster).better_cpus_per_task == better
    assert estimate(prepare(config), GPUS).better_cpus_per_task is None


def test_old_layers_that_the_store_copies_do_not_pass_through(bases: Bases, tmp_path: Path) -> None:
    expansion = prepare(ExpandConfig(base=bases("llama"), out=str(tmp_path / "out")))
    through, beside = (
        estimate(expansion, SMALL.model_copy(update={"server_side_copies": copies})) for copies in (False, True)
    )
    assert through.assembly_written == expansion.nbytes
    assert beside.assembly_written == expansion.scratch_bytes < expansion.nbytes
    assert beside.assembly_seconds < through.assembly_seconds


def test_units_run_on_gpus_unless_that_is_declined(bases: Bases, tmp_path: Path) -> None:
    settings = {"base": bases("llama"), "out": str(tmp_path / "out")}
    on_gpu = estimate(prepare(ExpandConfig.model_validate(settings)), GPUS)
    assert on_gpu.device_memory > 0
    assert {unit.coefficients for unit in on_gpu.units} == {"device"}
    on_cpu = estimate(prepare(ExpandConfig.model_validate({**settings, "gpus_per_task": 0})), GPUS)
    assert on_cpu.device_memory == 0
    assert {unit.coefficients for unit in on_cpu.units} == {"memory"}


def test_a_unit_is_held_against_its_share_of_a_gpu(bases: Bases, tmp_path: Path) -> None:
    config = ExpandConfig(base=bases("llama"), out=str(tmp_path / "out"))
    whole = estimate(prepare(config), GPUS)
    assert whole.short_of is None
    share = whole.device_memory / 4 / whole.cluster.gpu_memory
    small = estimate(prepare(config.model_copy(update={"gpus_per_task": share})), GPUS)
    assert 0 < small.gpu_share < small.device_memory < small.cluster.gpu_memory
    assert small.short_of == "the largest unit needs more memory than its share of a GPU has"


@pytest.mark.parametrize("method", ["opt-deus", "avg-deus", "llama-pro", "solar"])
def test_methods_without_a_model_of_their_own_are_predicted_too(method: str, bases: Bases, tmp_path: Path) -> None:
    expansion = prepare(ExpandConfig(base=bases("llama"), out=str(tmp_path / "out"), method=method))
    need = estimate(expansion, SMALL)
    assert need.seconds > 0
    assert need.written_bytes >= expansion.nbytes
    assert len(need.units) == len(expansion.units)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("cpus_per_node: 4", "memory_per_node is missing"),
        ("{cpus_per_node: 4, memory_per_node: 8 GBs}", "memory_per_node: found '8 GBs'; give bytes or a size such as"),
        ("{cpus_per_node: 4, memory_per_node: 8GB, gpus: 2}", "gpus: Extra inputs are not permitted"),
        ("{cpus_per_node: 4, memory_per_node: 8GB, gpus_per_node: 2}", "gpus_per_node is 2 and gpu is None; give both"),
        ("{cpus_per_node: 0, memory_per_node: 8GB}", "cpus_per_node: Input should be greater than or equal to 1"),
        ("[4]", "expected a mapping"),
    ],
)
def test_a_cluster_that_is_described_wrongly_gets_one_line(text: str, line: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_cluster(str(file))
    assert str(file) in str(caught.value)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_this_machine_is_described() -> None:
    spec = this_machine()
    assert spec.nodes == 1
    assert spec.cpus_per_node >= 1
    assert spec.memory_per_node > 10**8


def test_people_are_shown_each_unit_and_all(bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/null", "w") as null:
        screen = Console(record=True, width=200, file=null)
        monkeypatch.setattr(terminal, "console", screen)
        expansion = prepare(ExpandConfig(base=bases("llama"), out=str(tmp_path / "out")))
        show_estimate(estimate(expansion, GPUS))
    text = screen.export_text()
    (row,) = [line for line in text.splitlines() if "mlp.gate_proj" in line]
    assert "gram" in row
    assert "GPU" in row
    for words in ("eigh", "yardsticks", "2 × h100", "largest process", "assembly", "fits", "yes"):
        assert words in text


Inspect = Callable[..., tuple[int, str, str]]


@pytest.fixture
def inspect(bases: Bases, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Inspect:
    """`lesa-ray inspect` of a family: exit code, standard output, standard error."""

    def run(family: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lesa-ray", "inspect", bases(family), *arguments])
        capsys.readouterr()  # making the base says something
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


def test_inspect_takes_a_cluster(inspect: Inspect, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump({"nodes": 3, "cpus_per_node": 4, "memory_per_node": "8GB"}))
    code, out, _ = inspect("llama", "--cluster", str(file), "--json")
    assert code == 0
    need: dict[str, Any] = json.loads(out)["estimate"]
    assert need["cluster"]["nodes"] == 3
    assert {unit["node"] for unit in need["units"]} == {0, 1, 2}
    assert need["seconds"] == pytest.approx(need["unit_seconds"] + need["assembly_seconds"])
    code, out, line = inspect("llama", "--cluster", str(tmp_path / "nowhere.yaml"))
    assert code == 2
    assert out == ""
    assert line.count("\n") == 1
    assert "nowhere.yaml" in line


def test_inspect_takes_the_settings_that_change_the_cost(inspect: Inspect, bases: Bases) -> None:
    def need(family: str, *arguments: str) -> dict[str, Any]:
        code, out, line = inspect(family, *arguments, "--json")
        assert (code, line) == (0, "")
        estimate: dict[str, Any] = json.loads(out)["estimate"]
        return estimate

    def train(need: dict[str, Any]) -> float:
        return sum(unit["seconds"]["train"] for unit in need["units"] if "train" in unit["seconds"])

    plain = need("llama")
    assert train(need("llama", "--predictor", "ridge")) < train(plain)
    published = train(need("llama", "--recipe", "released-code"))
    assert train(need("llama", "--epochs", "10", "--holdout", "0")) == pytest.approx(published)
    assert train(need("llama", "--epochs", "10")) == pytest.approx(2 * train(plain))
    assert train(need("llama", "--holdout", "0")) > train(plain)
    assert need("llama", "--variants", bases("llama"))["read_bytes"] > plain["read_bytes"]
    assert len(need("llama", "--zero-init")["units"]) == len(plain["units"]) - 2

    names = {
        flags: {unit["name"] for unit in need("mixtral", *flags)["units"] if "w1" in unit["name"]}
        for flags in ((), ("--share-experts",), ("--gpus-per-task", "0"))
    }
    assert names[()] == {"block_sparse_moe.experts.0-3.w1.weight"}
    assert names["--share-experts",] == {"block_sparse_moe.experts.*.w1.weight"}
    assert len(names["--gpus-per-task", "0"]) == 4
    code, out, line = inspect("llama", "--share-experts")
    assert (code, out) == (2, "")
    assert "has no experts" in line
    code, _, line = inspect("llama", "--memory-budget", "8 GBs")
    assert (code, line.count("\n")) == (2, 1)
