"""A real comparison on an embedded Ray: what it finds, an arm that joins later, one that fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lesa_ray import cli
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.comparison.collect import FILE
from lesa_ray.store.catalog import Store
from tests import families
from tests.training.blocks import make_blocks
from tests.training.metric_rows import read_metrics

BATCH, SEQ_LEN, STEPS = 4, 32, 6


@pytest.fixture
def compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, Any, str]]:
    """`compare(settings, *words)` runs `lesa-ray compare` in this process: exit code, JSON, standard error."""

    def run(settings: dict[str, Any], *words: str) -> tuple[int, Any, str]:
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
        *first, last = [*words, str(tmp_path / "c.yaml")]
        monkeypatch.setattr(sys, "argv", ["lesa-ray", "compare", *first, last, "--json"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr()
        return int(str(end.value.code)), json.loads(shown.out) if shown.out else None, shown.err

    return run


def settings_of(tmp_path: Path) -> dict[str, Any]:
    families.make("llama", tmp_path / "base")
    make_blocks(str(tmp_path / "blocks"), seq_len=SEQ_LEN)
    none = ("base_same_tokens", "base_same_compute", "random_zero_output", "plain_copies")
    return {
        "name": "tiny",
        "store": str(tmp_path / "store"),
        "base": str(tmp_path / "base"),
        "blocks": str(tmp_path / "blocks"),
        "tokens": STEPS * BATCH * SEQ_LEN,
        "seeds": [3],
        "arms": [{"method": "llama-pro"}],
        "controls": dict.fromkeys(none, False),
        "eval_every": 3,
        "expand": {"factor": 1.4},
        "pretrain": {
            "batch": BATCH, "learning_rate": 1e-3, "precision": "fp32", "cpus_per_worker": 1, "wait": 0, "log_every": 2
        },
        "at_once": 1,
    }  # fmt: skip


def arms(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {arm["name"]: arm for arm in content["arms"]}


@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("local_ray")
def test_a_comparison_arms_that_join_and_one_that_fails(
    compare: Callable[..., tuple[int, Any, str]], tmp_path: Path
) -> None:
    settings = settings_of(tmp_path)
    code, before, _ = compare(settings, "status")
    assert code == 0
    assert {run["status"] for arm in before["arms"] for run in arm["runs"]} == {"missing"}
    assert not (tmp_path / "store").exists()

    code, content, log = compare(settings)
    assert code == 0, log
    store = Store(settings["store"])
    first = {record["label"]: record for _, record in store.finished()}
    assert first.keys() == {"tiny-llama-pro", "tiny-llama-pro-s3"}
    check(content, {"llama-pro"})
    assert content["base"]["loss"] is None
    (folder,) = (tmp_path / "store" / "comparison").iterdir()
    assert folder.name.startswith("tiny-")
    assert json.loads((folder / FILE).read_text()) == content

    settings["controls"]["base_same_tokens"] = True
    settings["arms"] += [{"label": "too many", "method": "llama-pro", "pretrain": {"workers": 64, "batch": 64}}]
    code, content, log = compare(settings)
    assert code == 1  # of the one that fails, and it stops no other
    after = {record["label"]: record for _, record in store.finished()}
    assert {label: after[label] for label in first} == first
    assert after.keys() - first.keys() == {"tiny-base-same-tokens-s3"}
    check(content, {"llama-pro", "base, same tokens"})
    (pro,), (base,), (lost,) = (arms(content)[name]["runs"] for name in ("llama-pro", "base, same tokens", "too many"))
    assert (pro["seed"], base["seed"], base["expansion"]) == (3, 3, None)
    assert content["base"]["loss"] == base["loss_before"] == pytest.approx(pro["loss_before"], abs=1e-5)
    assert lost["status"] == "failed"
    assert "pretrain/tiny-too-many-s3: workers 64" in lost["problem"]
    assert (lost["training"], lost["curve"]) == (None, [])
    assert lost["expansion"] == pro["expansion"]
    assert content["machine"]["cpus"] == 4
    assert json.loads((folder / FILE).read_text()) == content

    code, status, _ = compare(settings, "status")
    assert (code, status) == (0, content)
    code, standings, _ = compare(settings, "--dry-run")
    waiting = {one["stage"]: one["state"] for one in standings if one["state"] != "complete"}
    assert waiting == {"pretrain/tiny-too-many-s3": "failed"}


def check(content: dict[str, Any], complete: set[str]) -> None:
    """The figures are those of the runs' own files."""
    assert {name for name, arm in arms(content).items() if {run["status"] for run in arm["runs"]} == {"complete"}} == (
        complete
    )
    for name in complete:
        arm = arms(content)[name]
        for run in arm["runs"]:
            rows = read_metrics(run["training"])
            heldout = {row["step"]: row["heldout_loss"] for row in rows if "heldout_loss" in row}
            assert {point["step"]: point["loss"] for point in run["curve"]} == heldout
            assert list(heldout) == [0, 3, 6]
            for point in run["curve"]:
                assert point["tokens"] == point["step"] * BATCH * SEQ_LEN
                assert point["flops"] == pytest.approx(point["tokens"] * arm["flops_per_token"], rel=1e-9)
            paces = [BATCH * SEQ_LEN / row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
            assert run["curve"][-1]["seconds"] == pytest.approx(2 * paces[0] + paces[1] + paces[2] + 2 * paces[3])
            assert run["final_loss"] == heldout[6]
            assert run["loss_before"] == heldout[0]
            result = json.loads(Storage(run["training"]).read("training/result.json"))
            assert (result["parameters"], result["trained_parameters"]) == (
                arm["parameters"], arm["trained_parameters"]
            )  # fmt: skip
    assert {entry["of"]: entry["loss"] for entry in content["reached"]} == {
        name: arms(content)[name]["runs"][0]["final_loss"] for name in complete
    }
    for entry in content["reached"]:
        for name in complete:
            for run, tokens in zip(arms(content)[name]["runs"], entry["arms"][name], strict=True):
                lowest = min(point["loss"] for point in run["curve"])
                assert (tokens is None) == (lowest > entry["loss"])


def test_what_is_wrong_with_the_words_is_said(
    compare: Callable[..., tuple[int, Any, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = compare({"name": "c"})
    assert (code, "missing" in err) == (2, True)
    assert compare(settings_of(tmp_path), "stats")[0] == 2
    monkeypatch.setattr(sys, "argv", ["lesa-ray", "compare"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
