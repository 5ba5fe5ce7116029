"""From the command to a trained checkpoint: OUT of `layerwise` is what `pretrain --architecture` begins with."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from lesa_ray import Expanded, cli
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.distributed.evaluate import evaluate
from lesa_ray.evaluation.settings import EvaluateConfig
from lesa_ray.expansion.runner import Silent
from lesa_ray.layerwise.names import CODE_FILES
from lesa_ray.layerwise.register import register
from lesa_ray.training.finish import finish_run, is_trained, trained_result
from lesa_ray.training.packing_check import check_packing
from lesa_ray.training.run import claim, out_state, prepare
from lesa_ray.training.tokens import open_blocks
from lesa_ray.training.train_settings import TrainConfig
from lesa_ray.training.worker import train
from tests.families import tensors
from tests.layerwise.models import SMALL, loaded, small_architecture, write_checkpoint
from tests.training.blocks import make_blocks
from tests.training.test_model import plain_loop, several
from tests.training.workers import run_workers

WORDS = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of `lesa-ray layerwise …`."""
    monkeypatch.setattr(sys, "argv", ["lesa-ray", "layerwise", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def train_here(config: TrainConfig) -> Any:
    """`pretrain` in this process, one worker, without Ray."""
    run = prepare(config, gpus=False)
    if out_state(run) == "done":
        return trained_result(run, reused=True)
    claim(run)
    if not is_trained(run):
        store = torch.distributed.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            train(run, torch.device("cpu"), lambda progress: None)
        finally:
            dist.destroy_process_group()
    finish_run(run, Silent())
    return trained_result(run)


def test_from_the_command_to_a_trained_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "crown"
    code, _, err = command(monkeypatch, capsys, out, *WORDS, "--eos-token-id", 5)
    assert code == 0, err
    assert err.count("█") > 5 * 4
    assert f"lesa-ray pretrain --architecture {out}/config.json" in err
    assert {path.name for path in out.iterdir()} == {"config.json", *CODE_FILES}
    raw = json.loads((out / "config.json").read_text())
    assert raw["intermediate_sizes"][2] > raw["intermediate_sizes"][1]

    data = make_blocks(str(tmp_path / "blocks"), rows=64, seq_len=32)
    config = TrainConfig(
        architecture=f"{out}/config.json", data=data, out=str(tmp_path / "trained"), steps=40, batch=4, warmup=5,
        learning_rate=1e-2, activation_checkpointing=True, dtype="float32", precision="fp32", log_every=10,
        checkpoint_every=40, eval_every=40,
    )  # fmt: skip
    result = train_here(config)
    assert result.heldout_after < result.heldout_before - 0.5
    folder = tmp_path / "trained"
    assert {*CODE_FILES} <= set(Storage(str(folder)).list())
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values())
    assert sum(p.numel() for p in model.parameters()) == result.parameters
    assert json.loads((folder / "config.json").read_text())["auto_map"] == raw["auto_map"]
    assert model.generation_config.eos_token_id == 5


def test_narrower_layers_of_a_qwen_are_let_in_and_trained_alone(
    bases: Callable[[str], str], grow: Callable[..., Expanded], tmp_path: Path
) -> None:
    deeper = grow(bases("qwen2"), method="copy", layers=7, new_width="0.5,1.5")
    data = make_blocks(str(tmp_path / "blocks"), rows=32, seq_len=16)
    config = TrainConfig(
        checkpoint=deeper.out, data=data, out=str(tmp_path / "trained"), steps=4, batch=4, warmup=0, insert_over=0.5,
        learning_rate=1e-2, activation_checkpointing=True, precision="fp32", checkpoint_every=4,
    )  # fmt: skip
    result = train_here(config)
    before, after = tensors(deeper.out), tensors(tmp_path / "trained")
    new = tuple(f"model.layers.{layer}." for layer in deeper.manifest["new_layers"])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(new)}
    assert any(name.endswith("q_proj.bias") for name in changed)
    assert result.parameters == sum(p.numel() for p in loaded(str(tmp_path / "trained")).parameters())
    assert {*CODE_FILES} <= set(Storage(str(tmp_path / "trained")).list())


def test_the_command_as_json_and_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "vanilla"
    words = (out, "--profile", "vanilla", "--layers", 12, "--params", "180M", "--json")
    first, second = (command(monkeypatch, capsys, *words) for _ in range(2))
    assert first[0] == second[0] == 0
    told = json.loads(first[1])
    assert not told["reused"]
    assert json.loads(second[1]) == {**told, "reused": True}
    assert abs(told["parameters"] / told["budget"] - 1) < 0.005
    assert [layer["ffn"] for layer in told["layers"]] == json.loads((out / "config.json").read_text())[
        "intermediate_sizes"
    ]
    code, _, err = command(monkeypatch, capsys, out, "--preset", "crown-18")
    assert code == 2
    assert "is not empty" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--params", "60M"), "too few for 18 layers"),
        (("--kv-heads", "5"), "do not divide the 12 heads"),
        (("--beta", "1.0,-1"), "widths of zero or below"),
        (("--profile", "star"), "'vanilla', 'framed', 'reverse', 'crown' or 'isotropic'"),
    ],
)
def test_wrong_input_leaves_nothing(
    words: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    code, _, err = command(monkeypatch, capsys, tmp_path / "out", *words)
    assert code == 2
    assert says in err
    assert err.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_it_is_measured_and_keeps_packed_conversations_apart(layerwise_folder: str, tmp_path: Path) -> None:
    data = make_blocks(str(tmp_path / "blocks"), rows=8, heldout=4, seq_len=32)
    config = EvaluateConfig(checkpoints=(layerwise_folder,), data=(data,))
    (record,) = evaluate(config, use_ray=False)["checkpoints"]
    model = AutoModelForCausalLM.from_pretrained(layerwise_folder)
    ids = torch.from_numpy(open_blocks(data).heldout.read(range(4))["input_ids"]).long()
    with torch.no_grad():
        assert record["loss"] == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-4)
    assert record["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    check_packing(json.loads(Path(layerwise_folder, "config.json").read_text()), "here", 32)


def test_two_workers_give_what_a_plain_loop_gives(layerwise_folder: str, tmp_path: Path) -> None:
    """FSDP2 with activation checkpointing, all layers trained or the upper ones alone; with Qwen's settings too."""
    register()
    qwen = write_checkpoint(tmp_path / "qwen", {**small_architecture(), "qkv_bias": True, "qk_norm": True})
    which = [(layerwise_folder, "all"), (layerwise_folder, "upper"), (qwen, "all")]
    cases = [(folder, chosen, {"activation_checkpointing": True}) for folder, chosen in which]
    found, _ = run_workers(several, 2, cases)
    for (curve, _), (folder, chosen, _) in zip(found, cases, strict=True):
        expected = plain_loop(folder, chosen)
        assert [value for step in curve for value in step] == pytest.approx(
            [value for step in expected for value in step], rel=2e-4
        )
