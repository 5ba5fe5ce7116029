"""The study: equal models on equal data, what its figures say, and that it goes on where it was left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from safetensors.torch import load_file
from scipy.stats import ttest_rel

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.comparison.layerwise_study import LayerwiseStudyConfig, Row, check_tokens, models_of, reading, summarise
from lesa_ray.config import load_settings
from lesa_ray.errors import UserError
from lesa_ray.layerwise.settings import sizes_of
from lesa_ray.training.tokens import content_digest, open_blocks, write_rows
from lesa_ray.training.train_settings import TrainConfig
from pipelines import layerwise_study
from pipelines.layerwise_study import in_turn, run_study, side_by_side, table, train_with_ray
from tests.layerwise.test_layerwise_training import train_here
from tests.training.blocks import make_blocks

PIPELINES = Path(__file__).parent.parent.parent / "pipelines"
TINY: dict[str, Any] = {
    "profiles": ["isotropic", "crown"], "layers": [4], "seeds": [0, 1], "params": 150_000, "d_model": 32, "head_dim": 8,
    "kv_heads": 1, "train": {"steps": 30, "batch": 4, "learning_rate": 1e-2, "warmup": 3, "checkpoint_every": 30,
                             "eval_every": 30, "log_every": 10, "precision": "fp32"},
}  # fmt: skip


def settings(**changes: Any) -> LayerwiseStudyConfig:
    return load_settings(LayerwiseStudyConfig, None, **{"out": "unused", "data": "unused", **TINY, **changes})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_blocks(str(tmp_path_factory.mktemp("data") / "blocks"), rows=96, seq_len=32, vocab=256)


def test_a_study_runs_goes_on_and_says_what_it_found(data: str, tmp_path: Path) -> None:
    """In this process. Seeds differ, data does not, and what is finished is not made again."""
    config = settings(out=str(tmp_path / "study"), data=data)
    trained: list[str] = []

    def until(count: int) -> Any:
        def train(given: Any) -> Any:
            if len(trained) == count:
                raise KeyboardInterrupt
            trained.append(given.out)
            return train_here(given)

        return train

    with pytest.raises(KeyboardInterrupt):
        run_study(config, in_turn(until(3)))
    names = [name.removeprefix(f"{config.out}/") for name in trained]
    assert names == [f"runs/4-layers/{p}/seed-{s}" for p, s in (("isotropic", 0), ("crown", 0), ("isotropic", 1))]
    assert len(json.loads((tmp_path / "study" / "results.json").read_text())["rows"]) == 3
    content = run_study(config, in_turn(until(7)))
    assert json.loads((tmp_path / "study" / "results.json").read_text()) == content
    rows = [Row(**row) for row in content["rows"]]
    assert len({row.heldout_loss for row in rows}) == 4
    assert {row.tokens for row in rows} == {30 * 4 * 32}
    assert all(abs(row.parameters / 150_000 - 1) <= 0.005 for row in rows)
    assert all(row.heldout_loss < 5.4 for row in rows)  # ln 256 = 5.55
    assert content["data"]["share"] < 0.2
    one, other = summarise(rows)
    assert (one.profile, one.difference, one.speed) == ("isotropic", 0.0, 1.0)
    mine = {row.seed: row.heldout_loss for row in rows if row.profile == "crown"}
    base = {row.seed: row.heldout_loss for row in rows if row.profile == "isotropic"}
    assert other.difference == pytest.approx(sum(mine[seed] - base[seed] for seed in (0, 1)) / 2)
    shown = table([one, other])
    assert shown.row_count == 2
    weights = {name: {"attention": 0, "mlp": 0} for name in ("isotropic", "crown")}
    for name, parts in weights.items():
        for tensor, value in load_file(tmp_path / "study" / config.run_name(name, 4, 0) / "model.safetensors").items():
            if ".layers." in tensor and value.ndim == 2:
                parts["mlp" if ".mlp." in tensor else "attention"] += value.numel()
    for summary, parts in zip((one, other), weights.values(), strict=True):
        assert summary.attention == pytest.approx(parts["attention"] / sum(parts.values()))
    column = [each.header for each in shown.columns].index("attention")
    assert list(shown.columns[column].cells) == [f"{100 * each.attention:.1f} %" for each in (one, other)]
    again = run_study(config, in_turn(train_here))
    assert again["rows"] == content["rows"], "a second time all is read"


@pytest.mark.timeout(200)
@pytest.mark.parametrize("parallel", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_a_run_whose_loss_is_no_number_stops_no_other(
    parallel: int, data: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """That of one model's first run is."""

    def diverging(config: TrainConfig) -> Any:
        if config.out.endswith("crown/seed-0"):
            raise UserError("step 7: the loss is nan")
        return SimpleNamespace(parameters=9, tokens=9, heldout_after=3.0 + config.seed, loss=3.0, tokens_per_second=9.0)

    if parallel > 1:
        request.getfixturevalue("local_ray")
    monkeypatch.setattr("lesa_ray.distributed.train.pretrain", diverging)
    monkeypatch.setattr(layerwise_study, "train_with_ray", diverging)
    file = tmp_path / "study.yaml"
    file.write_text(json.dumps({**TINY, "data": data, "parallel": parallel}))
    with pytest.raises(typer.Exit) as end:
        layerwise_study.main(str(file), out=str(tmp_path / "study"), as_json=True)
    shown = capsys.readouterr()
    content = json.loads(shown.out)
    assert json.loads((tmp_path / "study" / "results.json").read_text()) == content
    assert {(row["profile"], row["seed"]) for row in content["rows"]} == {
        ("isotropic", 0), ("isotropic", 1), ("crown", 1)
    }  # fmt: skip
    lost = f"{tmp_path}/study/runs/4-layers/crown/seed-0: step 7: the loss is nan"
    assert (end.value.exit_code, content["missing"]) == (1, [lost])
    assert f"layerwise_study: {lost}; the same command tries again" in shown.err


def test_a_study_none_of_whose_runs_can_be_is_refused(data: str, tmp_path: Path) -> None:
    def train(config: TrainConfig) -> Any:
        raise UserError(f"{config.out}: batch 4: no")

    with pytest.raises(UserError, match="isotropic/seed-0: batch 4: no"):
        run_study(settings(out=str(tmp_path / "study"), data=data), in_turn(train))
    assert not (tmp_path / "study" / "results.json").exists()


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_runs_of_the_study_on_ray(local_ray: None, data: str, tmp_path: Path) -> None:
    """Two side by side, led by tasks; then, as they are done, in turn."""
    config = settings(out=str(tmp_path / "study"), data=data, seeds=[0])
    on_ray = run_study(config, side_by_side(2))["rows"]
    here = run_study(config.model_copy(update={"out": str(tmp_path / "here")}), in_turn(train_here))["rows"]
    assert [row["heldout_loss"] for row in on_ray] == pytest.approx([row["heldout_loss"] for row in here], rel=1e-4)
    for name in ("profile", "parameters", "tokens", "seed"):
        assert [row[name] for row in on_ray] == [row[name] for row in here]
    assert run_study(config, in_turn(train_with_ray))["rows"] == on_ray


def test_models_of_a_depth_share_a_multiple(data: str) -> None:
    config = settings(profiles=["isotropic", "vanilla", "framed", "reverse", "crown"], layers=[12, 18], params="180M",
                      d_model=768, head_dim=64, kv_heads=4, vocab_size=50_304)  # fmt: skip
    models = models_of(config, open_blocks(data))
    assert len(models) == 10
    for layers, multiple in ((12, 64), (18, 256)):
        solved = [sizes_of(model) for (depth, _), model in models.items() if depth == layers]
        assert {one.multiple for one in solved} == {multiple}
        totals = [one.sizes.parameters for one in solved]
        assert max(totals) / min(totals) < 1.01
    with pytest.raises(UserError, match=r"12 layers, isotropic: params 1,000: too few"):
        models_of(config.model_copy(update={"params": 1000}), open_blocks(data))


@pytest.mark.parametrize(("name", "vocab_size"), [("layerwise_study", 50_277), ("layerwise_study_small", 4096)])
def test_the_shipped_studies_have_models_of_equal_size(name: str, vocab_size: int, data: str) -> None:
    config = load_settings(LayerwiseStudyConfig, str(PIPELINES / f"{name}.yaml"))
    if name == "layerwise_study":  # a cluster that grows from nothing has none when the default looks
        assert config.train["gpus_per_worker"] == 1
    models = models_of(config, replace(open_blocks(data), vocab_size=vocab_size))
    for layers in config.layers:  # heads are rounded, and the baseline must not have gained most by it
        share = {profile: sizes_of(models[layers, profile]).sizes.attention_share for profile in config.profiles}
        assert share["isotropic"] == min(share.values())
    assert len(models) == len(config.layers) * len(config.profiles) == 10
    for model in models.values():
        solved = sizes_of(model)
        assert abs(solved.sizes.parameters / config.params - 1) <= 0.005
        assert solved.multiple >= 8


def test_tokens_read_with_the_wrong_width_are_noticed(data: str, tmp_path: Path) -> None:
    """int32 read as uint16, as in the published ablation: every second token is 0."""
    assert check_tokens(open_blocks(data))["share"] < 0.1
    right = open_blocks(data).train.read(range(96))["input_ids"]
    wrong = right.view(np.uint16).astype(np.int32)[:, :32]
    storage = Storage(str(tmp_path))
    record = write_rows(storage, "train/part-00000.parquet", "text", 32, [{"input_ids": wrong}])
    manifest = json.loads(Storage(data).read("manifest.json"))
    manifest["splits"] = {
        "train": {"rows": 96, "tokens": 96 * 32, "files": [record]},
        "heldout": {"rows": 0, "tokens": 0, "files": []},
    }
    manifest |= {"rows_per_group": 96, "digest": content_digest("text", 32, [record])}
    storage.write("manifest.json", json.dumps(manifest).encode())
    with pytest.raises(UserError, match=r"5\d % of its tokens are id 0"):
        check_tokens(open_blocks(str(tmp_path)))


def row(profile: str, seed: int, loss: float, speed: float = 100.0) -> Row:
    return Row(18, profile, seed, 1000, 0.2, 10, loss, loss, speed)


def test_differences_are_taken_seed_by_seed() -> None:
    losses = {
        "isotropic": (3.0, 3.2, 3.1),
        "crown": (2.9, 3.11, 3.0),
        "vanilla": (3.1, 3.1, 3.1),
        "framed": (3.1, 3.3, 3.2),
    }
    rows = [row(name, seed, loss) for name, values in losses.items() for seed, loss in enumerate(values)]
    rows.append(row("crown", 7, 9.0, 900.0))  # a seed that the isotropic model has not
    base, crown, vanilla, framed = summarise(rows)
    assert base.spread == pytest.approx(0.1)
    assert (crown.seeds, crown.difference) == (3, pytest.approx(-0.29 / 3))
    interval = ttest_rel(losses["crown"], losses["isotropic"]).confidence_interval(0.95)
    assert crown.difference_half == pytest.approx((interval.high - interval.low) / 2, rel=1e-3)
    assert (vanilla.spread, vanilla.difference) == (pytest.approx(0.0), pytest.approx(0.0))
    assert framed.difference == pytest.approx(0.1)
    (said,) = reading([base, crown, vanilla, framed])
    assert said.startswith("18 layers: below isotropic: crown; above it: framed; not told apart: vanilla.")
    assert said.endswith("The profiles lie 0.1967 nats apart.")
    alone = summarise(rows[:1])[0]
    assert (alone.spread, alone.difference_half, alone.seeds) == (None, None, 1)
    assert summarise([row("crown", 0, 3.0)]) == []
    hint = {"isotropic": (3.0, 3.0, 3.0), "crown": (3.02, 3.09, 3.16)}  # 2.2 standard errors above with every seed
    rows = [row(name, seed, loss) for name, values in hint.items() for seed, loss in enumerate(values)]
    assert "above it" not in reading(summarise(rows))[0]
    assert "not told apart: crown" in reading(summarise(rows))[0]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"profiles": ["crown"]}, "isotropic is missing"),
        ({"seeds": [1, 1]}, "seeds: give at least one, each once"),
        ({"train": {"seed": 3}}, "train.seed: the study decides it"),
        ({"train": {"step": 3}}, "train.step: Extra inputs"),
        ({"train": {"steps": 3, "tokens": 5}}, "train: give steps, tokens or epochs"),
        ({"train": {"steps": 3, "eval_rows": 0}}, "train.eval_rows: 0 leaves nothing to compare"),
    ],
)
def test_a_study_that_cannot_be_is_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        settings(**changed)
