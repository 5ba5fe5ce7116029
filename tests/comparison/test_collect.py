"""What comparison.json is made of, when it is written, and where it lies."""

from __future__ import annotations

import copy
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lesa_ray.comparison import collect
from lesa_ray.comparison.collect import Collector
from lesa_ray.comparison.curves import curve_of
from lesa_ray.comparison.graph import Comparison
from lesa_ray.distributed import compare
from lesa_ray.distributed.compare import run_comparison
from lesa_ray.fleet.state import Outcome
from lesa_ray.machines import Machines
from lesa_ray.store.catalog import Store
from lesa_ray.store.record import make_record
from tests.comparison.planning import made

PIPELINES = Path(__file__).parents[2] / "pipelines"


def test_a_comparison_stays_where_it_is_unless_what_counts_changes(given: Path) -> None:
    def place(**changes: Any) -> str:
        comparison = made(given, **changes)
        return Collector(comparison, Store(str(given / "store"), 60.0)).storage.url

    tuned = {"data": str(given / "chat.jsonl"), "seq_len": 16}
    usual = place(finetune=tuned)
    assert place(
        pretrain={"batch": 4, "workers": 2, "keep": 1},
        expand={"factor": 1.4, "lesa": {"epochs": 1}, "gpus_per_task": 0.5},
        finetune={**tuned, "bad_rows": "skip", "workers": 2},
    ) == usual  # fmt: skip
    others = [
        place(finetune=tuned, pretrain={"batch": 8}), place(finetune=tuned, expand={"factor": 1.6}), place(),
        place(finetune={**tuned, "epochs": 1}), place(finetune=tuned, pretrain={"batch": 4, "eval_rows": 3}),
    ]  # fmt: skip
    assert len({usual, *others}) == 6


def test_arms_that_another_file_left_are_named(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = made(given, store=str(tmp_path), arms=[{"method": ["lesa", "solar"]}])
    other = replace(made(given, store=str(tmp_path), arms=[{"method": "lesa"}]), file="other.yaml")
    collector = Collector(one, Store(str(tmp_path), 60.0))
    assert collector.displaced() is None
    collector.write(collector.collect())
    assert collector.displaced() is None
    monkeypatch.setattr("lesa_ray.distributed.compare.run_fleet", lambda *_: [])
    said: list[str] = []
    run_comparison(other, lambda _, text: said.append(text))
    assert said[0] == "comparison.json is written anew without solar of file; another `name` keeps both"
    said.clear()
    run_comparison(other, lambda _, text: said.append(text))
    assert [line.split(":")[0] for line in said] == ["written"]


def test_what_a_task_s_figure_is_comes_with_it(given: Path, tmp_path: Path) -> None:
    """lambada_openai has its perplexity first; piqa's published figure is acc_norm."""
    comparison = made(given, store=str(tmp_path), tasks=["lambada_openai", "piqa"], arms={"method": "llama-pro"})
    tasks = {
        "lambada_openai": {
            "metrics": {"perplexity": {"value": 13.0, "stderr": 0.1, "higher_is_better": False},
                        "acc": {"value": 0.4, "stderr": 0.1, "higher_is_better": True}},
        },
        "piqa": {
            "metrics": {"acc": {"value": 0.7, "stderr": 0.1, "higher_is_better": True},
                        "acc_norm": {"value": 0.6, "stderr": 0.1, "higher_is_better": True}},
        },
        "own": {"metrics": {"bits_per_byte": {"value": 1.5, "stderr": None, "higher_is_better": None}}},
        "broken": {"metrics": {"acc": {"value": None, "stderr": None, "higher_is_better": True}}},
    }  # fmt: skip
    stage = next(stage for stage in comparison.stages if stage.id == comparison.base_evaluate)
    assert stage.identity is not None
    store = Store(str(tmp_path), 60.0)
    record = make_record(
        stage.identity, stage.label, given={}, started="2026-01-01", seconds=1.0, files={},
        metrics={"checkpoints": [{"tasks": tasks}]},
    )  # fmt: skip
    store.finish(stage.identity.place(stage.label), record)
    content = Collector(comparison, store).collect()
    assert content["base"]["tasks"] == {"lambada_openai": 13.0, "piqa": 0.6, "own": 1.5}
    assert content["task_metrics"] == {
        "lambada_openai": {"metric": "perplexity", "higher_is_better": False},
        "piqa": {"metric": "acc_norm", "higher_is_better": True},
        "own": {"metric": "bits_per_byte", "higher_is_better": None},
    }


@pytest.fixture
def finished(given: Path, tmp_path: Path) -> tuple[Comparison, Store, list[str]]:
    """A comparison whose runs have ended at 2.5, its store, and the places of the runs."""
    comparison, store = made(given, store=str(tmp_path / "store")), Store(str(tmp_path / "store"), 60.0)
    places = []
    for stage in comparison.stages:
        assert stage.identity is not None
        place = stage.identity.place(stage.label)
        if stage.kind == "pretrain":
            places.append(store.folder(place).url)
            rows = [{"step": 0, "heldout_loss": 3.0}, {"step": 8, "tokens": 1024, "tokens_per_second": 512.0},
                    {"step": 8, "heldout_loss": 2.5}]  # fmt: skip
            text = "".join(json.dumps(row) + "\n" for row in rows)
            store.folder(place).within("training").write("metrics.jsonl", text.encode())
        record = make_record(
            stage.identity, stage.label, given={}, started="2026-01-01", seconds=1.0, files={},
            metrics={"heldout_after": 2.5},
        )  # fmt: skip
        store.finish(place, record)
    return comparison, store, places


def test_a_finished_run_is_read_once(
    finished: tuple[Comparison, Store, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison, store, places = finished
    read: list[str] = []
    monkeypatch.setattr(collect, "curve_of", lambda place: read.append(place) or curve_of(place))
    collector = Collector(comparison, store)
    content = collector.collect()
    runs = [run for arm in content["arms"] for run in arm["runs"]]
    assert {run["status"] for run in runs} == {"complete"}
    assert {tuple(point["loss"] for point in run["curve"]) for run in runs} == {(3.0, 2.5)}
    assert sorted(read) == sorted(places)
    assert collector.collect() == content
    collector.write(content)
    assert Collector(comparison, store).collect() == content
    assert len(read) == len(places)
    changed = copy.deepcopy(content)
    changed["arms"][0]["runs"][0]["curve"].pop()  # of a run that was made again since, and ended elsewhere
    collector.write(changed)
    assert Collector(comparison, store).collect() == content
    assert read[len(places) :] == [content["arms"][0]["runs"][0]["training"]]
    collector.write({**content, "lesa_ray": "0.0.1"})
    assert Collector(comparison, store).collect() == content
    assert len(read) == 2 * len(places) + 1


@pytest.mark.timeout(60)
@pytest.mark.parametrize("end", ["all is made", "interrupted"])
def test_stages_are_started_while_the_runs_are_read(
    end: str, finished: tuple[Comparison, Store, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is slow to answer here holds up no stage, and nothing of it outlives the command."""
    comparison, _, places = finished
    answers, asked = threading.Event(), threading.Semaphore(0)
    read: list[str] = []

    def slow(place: str) -> Any:
        read.append(place)
        asked.release()
        assert answers.wait(30)
        return curve_of(place)

    def fleet(config: Any, stages: Any, say: Any, settled: Any) -> Any:
        for stage in stages:
            settled(Outcome(stage.id, "complete", ""))
        assert asked.acquire(timeout=30)
        threading.Timer(0.2, answers.set).start()
        if end == "interrupted":
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr(compare, "_WRITE_SECONDS", 0.0)
    monkeypatch.setattr(compare, "run_fleet", fleet)
    monkeypatch.setattr(collect, "curve_of", slow)
    monkeypatch.setattr(collect, "THREADS", 2)
    before, said = threading.active_count(), []
    if end == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            run_comparison(comparison, lambda _, text: said.append(text))
        assert len(read) <= 2 < len(places)
        assert not said
    else:
        content, _ = run_comparison(comparison, lambda _, text: said.append(text))
        assert json.loads(Path(said[-1].split(": ")[1].split(";")[0]).read_text()) == content
        assert sorted(read) == sorted(places)
    assert threading.active_count() <= before + 1  # the timer


def test_what_keeps_comparison_json_from_being_written_is_said(
    finished: tuple[Comparison, Store, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison, _, _ = finished
    said: list[str] = []

    def fleet(config: Any, stages: Any, say: Any, settled: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(collect, "curve_of", away)
            settled(Outcome(stages[0].id, "complete", ""))
            while not said:
                time.sleep(0.01)
        return []

    def away(place: str) -> Any:
        raise OSError("the store is away")

    monkeypatch.setattr(compare, "_WRITE_SECONDS", 0.0)
    monkeypatch.setattr(compare, "run_fleet", fleet)
    run_comparison(comparison, lambda _, text: said.append(text))
    assert "comparison.json: not written now: " in said[0]
    assert "the store is away" in said[0]
    assert said[1].startswith("written: ")


def test_the_machines_of_a_comparison_are_those_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = 2 * [{"CPU": 8.0, "GPU": 4.0, "accelerator_type:L4": 1.0}]
    monkeypatch.setattr(
        compare, "machines", lambda: Machines.of([{"memory": 1e9, "node:__internal_head__": 1.0}, *workers])
    )
    told = compare._cluster()
    assert (told["nodes"], told["cpus"], told["gpus"], told["device"]) == (2, 16, 8, "L4")
