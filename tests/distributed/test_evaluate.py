"""Several checkpoints at once, on a real Ray: the same figures as one after another, differences, faults, reports."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.distributed.evaluate import evaluate
from lesa_ray.errors import MachineError, SomeWrong, UserError
from lesa_ray.evaluation.settings import EvaluateConfig
from lesa_ray.report.evaluation import evaluation_table
from tests.evaluation import tiny
from tests.waiting import titles


class Heard:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.done: list[float] = []
        self.details: list[str] = []

    def phase(self, name: str, total: float) -> None:
        self.phases.append(name)

    def progress(self, done: float, detail: str) -> None:
        self.done.append(done)
        self.details.append(detail)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints `one`, `two` (other weights) and `three` (another tokenizer), and a text."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny.checkpoint(folder / "one")
    tiny.checkpoint(folder / "two", seed=1)
    tiny.checkpoint(folder / "three", seed=2, merges=True)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny.TEXTS * 3))
    return folder


def config(folder: Path, *names: str, **settings: Any) -> EvaluateConfig:
    checkpoints = [name if "/" in name else str(folder / name) for name in names]
    data = {} if "tasks" in settings else {"data": str(folder / "texts.jsonl")}
    return EvaluateConfig.model_validate({"checkpoints": checkpoints, "window": 16, **data, **settings})


def shown(report: dict[str, Any], width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(evaluation_table(report))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.timeout(360)
def test_side_by_side_is_one_after_another(folder: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard()
    monkeypatch.chdir(folder)  # relative names are this process's, not the workers'
    wanted = config(folder, "./one", "./two", "./three")
    together = evaluate(wanted, heard)
    assert "starting Ray" in heard.phases
    assert heard.done[-1] == 3
    alone = evaluate(wanted, use_ray=False)
    records = together["checkpoints"]
    for record, other in zip(records, alone["checkpoints"], strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert record["digests"] == other["digests"]
    assert [record["checkpoint"] for record in records] == ["./one", "./two", "./three"]
    assert len({record["loss"] for record in records}) == 3
    assert "difference" not in records[0]
    second, third = records[1]["difference"], records[2]["difference"]
    assert second["value"] == pytest.approx(records[1]["loss"] - records[0]["loss"], rel=1e-9)
    assert (second["of"], second["over"], second["to"]) == ("loss", "windows", "./one")
    assert third["value"] == pytest.approx(records[2]["bits_per_byte"] - records[0]["bits_per_byte"], rel=1e-9)
    assert (third["of"], third["over"]) == ("bits_per_byte", "documents")
    text = shown(together)
    for record in records:
        assert f"{record['loss']:.4f}" in text
        assert f"{record['bits_per_byte']:.4f}" in text
    assert f"{second['value']:+.4f} ± {second['stderr']:.4f}" in text
    assert f"{second['value']:+.4f} ± {second['stderr']:.4f}" in shown(together, 80)  # a terminal of 80 cuts nothing
    assert "windows of 16 tokens, one every 16" in text
    assert "tokenizers differ" in text


@pytest.mark.timeout(180)
def test_files_that_were_not_read_are_told(folder: Path, tmp_path: Path) -> None:
    for name in ("a.txt", "b.csv"):
        (tmp_path / name).write_text("some words")
    report = evaluate(config(folder, "one", data=str(tmp_path)), use_ray=False)
    assert (report["data"]["files"], report["data"]["unread_files"]) == (1, {".csv": 1})
    assert "files among the data that were not read: 1 .csv" in shown(report)


@pytest.mark.timeout(180)
def test_a_checkpoint_does_not_differ_from_itself(folder: Path) -> None:
    report = evaluate(config(folder, "one", "one", stride=8), use_ray=False)
    assert report["checkpoints"][1]["difference"] | {"count": 0} == {
        "to": str(folder / "one"), "of": "loss", "value": 0.0, "stderr": 0.0, "over": "windows", "count": 0
    }  # fmt: skip
    assert (report["window"], report["stride"]) == (16, 8)


@pytest.mark.timeout(180)
def test_one_checkpoint_needs_no_ray_and_reports_where_it_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    heard = Heard()
    report = evaluate(config(folder, "one", out=str(tmp_path / "report.json")), heard)
    assert heard.phases == ["reading the headers", f"measuring {folder / 'one'}"]
    assert heard.done == sorted(heard.done)
    assert any("perplexity" in detail for detail in heard.details)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["settings"]["window"] == 16
    assert report["checkpoints"][0]["perplexity"] == math.exp(report["checkpoints"][0]["loss"])
    again = evaluate(config(folder, "one", out=str(tmp_path / "folder")))
    assert json.loads((tmp_path / "folder" / "evaluation.json").read_text()) == again
    assert "Δ" not in shown(report)


@pytest.mark.timeout(180)
def test_what_headers_show_is_found_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for wanted, says in (
        (config(folder, "one", "nowhere"), r"^checkpoint .*nowhere: no such folder"),
        (config(folder, "one", "two", window=49), r"^window 49: checkpoint .*one was made for 48 positions"),
        (config(folder, "one", "two", data=str(folder / "no.txt")), "no.txt: there is no such file or folder"),
        (config(folder, "one", out=str(tmp_path / "file")), r"^--out .*file.* is a file"),
        (config(folder, "one", out=str(tmp_path / "file" / "report.json")), r"^--out .*file.* is a file"),
        (config(folder, "one", out="gopher://x/report.json"), "--out gopher"),
    ):
        heard = Heard()
        with pytest.raises(UserError, match=says):
            evaluate(wanted, heard)
        assert [phase for phase in heard.phases if phase != "reading the headers"] == []


@pytest.mark.timeout(360)
def test_a_checkpoint_that_fails_stops_no_other(folder: Path, tmp_path: Path, local_ray: None) -> None:
    broken = Path(shutil.copytree(folder / "two", tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    says = r"^checkpoint .*broken: its loss is not a number .*; try --dtype float32"
    for names in (("one", str(broken), "two"), (str(broken), "one", "two")):
        out = tmp_path / f"report-{names.index(str(broken))}"
        with pytest.raises(SomeWrong, match=f"{says}$") as error:
            evaluate(config(folder, *names, out=str(out)))
        report = error.value.report
        assert report == json.loads((out / "evaluation.json").read_text())
        failed = names.index(str(broken))
        assert report["checkpoints"][failed] == {"checkpoint": str(broken), "error": str(error.value)}
        assert [("loss" in one, "difference" in one) for one in report["checkpoints"]] == [
            (place != failed, place == 2 and failed != 0) for place in range(3)
        ]
        assert shown(report).count(f"{report['checkpoints'][2]['loss']:.4f}") == 1
        assert "not measured: checkpoint" in shown(report)
    for use_ray in (True, False):
        with pytest.raises(UserError, match=f"{says}$"):
            evaluate(config(folder, str(broken), str(broken), out=str(tmp_path / "none")), use_ray=use_ray)
    assert not (tmp_path / "none").exists()
    with pytest.raises(SomeWrong, match=rf"{says} \(and 1 more that could not be measured\)$"):
        evaluate(config(folder, "one", str(broken), str(broken)), use_ray=False)
    for settings, kind, says in (
        (
            {"cpus_per_task": 64},
            MachineError,
            "asks for 64 CPUs: no machine of this cluster has that \\(the most are 0 GPUs, 4 CPUs",
        ),
        ({"gpus_per_task": 1}, MachineError, "asks for 1 GPU and 1 CPU"),
        ({"device": "cuda"}, UserError, "--device cuda: there is no GPU in this Ray cluster"),
    ):
        with pytest.raises(kind, match=says):
            evaluate(config(folder, "one", "two", **settings))


@pytest.mark.timeout(360)
def test_a_killed_worker_is_replaced(folder: Path, local_ray: None) -> None:
    calm = evaluate(config(folder, "one", "two", stride=4, batch_size=4), use_ray=False)
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 300
        while not killed and time.monotonic() < deadline:
            for pid, title in titles().items():
                if title.startswith(b"ray::evaluate " + bytes(folder / "two")):
                    killed.append(pid)
                    os.kill(pid, signal.SIGKILL)
                    break
            time.sleep(0.02)

    killer = threading.Thread(target=kill_one)
    killer.start()
    report = evaluate(config(folder, "one", "two", stride=4, batch_size=4))
    killer.join()
    assert killed
    for record, other in zip(report["checkpoints"], calm["checkpoints"], strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-6)


@pytest.mark.timeout(360)
def test_everything_on_s3(folder: Path, s3: str, tmp_path: Path) -> None:
    """Checkpoint, token blocks, text and report behind URLs; nothing but the report is written there."""
    Storage(f"{s3}/eval").fs.put(str(folder), "bucket/eval", recursive=True)
    rows = [{"input_ids": [(7 * place * place + row) % 256 for place in range(20)]} for row in range(5)]
    remote = tiny.blocks(f"{s3}/eval/blocks", "text", 20, rows)
    local = tiny.blocks(str(tmp_path / "blocks"), "text", 20, rows)
    before = sorted(Storage(s3).fs.find("bucket/eval"))
    for there, here in ((remote, local), (f"{s3}/eval/*.jsonl", str(folder / "texts.jsonl"))):
        names = [f"{s3}/eval/one", f"{s3}/eval/two/"]
        out = f"{s3}/eval-reports/first"
        found = evaluate(config(folder, *names, data=there, out=out), use_ray=False)
        wanted = evaluate(config(folder, "one", "two", data=here), use_ray=False)
        for record, other in zip(found["checkpoints"], wanted["checkpoints"], strict=True):
            assert record["loss"] == pytest.approx(other["loss"], rel=1e-9)
            assert record["tokens_sha256"] == other["tokens_sha256"]
        assert json.loads(Storage(out).read("evaluation.json")) == found
    assert sorted(Storage(s3).fs.find("bucket/eval")) == before
    for wrong, says in (
        (config(folder, f"{s3}/eval/none"), r"checkpoint s3://bucket/eval/none: there is nothing at"),
        (config(folder, "one", data=f"{s3}/eval/none"), "there is no such file or folder|no data found"),
        (config(folder, "one", data="s3://no-such-bucket/x"), "there is no such file or folder|no data found"),
    ):
        with pytest.raises(UserError, match=says):
            evaluate(wrong)


@pytest.mark.skipif(
    not (importlib.util.find_spec("lm_eval") and importlib.util.find_spec("accelerate")),
    reason="lm-evaluation-harness is an extra: pip install 'lesa-ray[eval]'",
)
@pytest.mark.timeout(360)
def test_tasks_side_by_side(folder: Path, tmp_path: Path, local_ray: None, capfd: pytest.CaptureFixture[str]) -> None:
    from tests.evaluation.test_harness import CHOICE, QUESTIONS

    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    (tmp_path / "choice.yaml").write_text(CHOICE)
    report = evaluate(config(folder, "one", "two", tasks=str(tmp_path / "choice.yaml"), window=None))
    assert capfd.readouterr().out == ""  # standard output is for `--json`
    assert (report["data"], report["window"]) == (None, None)
    text = shown(report)
    for record in report["checkpoints"]:
        found = record["tasks"]["tiny_choice"]["metrics"]["acc"]
        assert record["tasks"]["tiny_choice"]["examples"] == len(QUESTIONS)
        assert f"{found['value']:.4f} ± {found['stderr']:.4f}" in text
    assert "acc ↑" in text
