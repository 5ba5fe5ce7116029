"""The rehearsal notices what names alone would miss, and leaves no trace."""

from __future__ import annotations

import errno
import re
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from lesa_ray import ExpandConfig, MachineError, UserError, expand
from lesa_ray.checkpoint import residual
from lesa_ray.expansion import rehearsal
from lesa_ray.expansion.layout import Expansion
from lesa_ray.expansion.prepare import prepare
from lesa_ray.expansion.rehearsal import rehearse
from lesa_ray.expansion.runner import InlineRunner
from tests import families

Bases = Callable[[str], str]


def planned(base: str, tmp_path: Path) -> Expansion:
    return prepare(ExpandConfig(base=base, out=str(tmp_path / "out"), method="llama-pro"))


@pytest.mark.parametrize("family", [name for name in families.FAMILIES if families.FAMILIES[name].keeps_function])
def test_families_that_keep_their_function_pass_and_leave_no_trace(
    family: str, bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expansion = planned(bases(family), tmp_path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    state = torch.get_rng_state()
    rehearse(expansion)
    assert torch.equal(torch.get_rng_state(), state)
    assert not [path for path in scratch.iterdir() if path.name.startswith("lesa-ray-")]
    assert not (tmp_path / "out").exists()


class _FullDisk(InlineRunner):
    def write_shards(self, *given: object, **more: object) -> None:
        raise OSError("the disk is full")


def test_none_is_left_running_when_the_work_fails(bases: Bases, tmp_path: Path) -> None:
    """It patches transformers for a while; a model that the caller then loads must have its weights tied."""
    config = ExpandConfig(base=bases("llama"), out=str(tmp_path / "out"), method="llama-pro")
    with pytest.raises(MachineError, match="the disk is full"):
        expand(config, runner=_FullDisk())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rehearsal")]


def test_a_norm_after_the_addition_is_noticed(bases: Bases, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"do not keep the function of bert.*use --no-zero-init"):
        rehearse(planned(bases("bert"), tmp_path))


@pytest.mark.parametrize(
    ("family", "missed"), [("llama", "down_proj"), ("gpt_neox", "dense_4h_to_h"), ("mixtral", "w2")]
)
def test_a_projection_whose_name_is_not_known_is_noticed(
    family: str, missed: str, bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = residual._WRITER.pattern.replace(f"|{missed}", "")
    assert pattern != residual._WRITER.pattern
    monkeypatch.setattr(residual, "_WRITER", re.compile(pattern))
    with pytest.raises(UserError, match=f"do not keep the function of {families.FAMILIES[family].model_type}"):
        rehearse(planned(bases(family), tmp_path))


def test_attention_that_depends_on_the_layers_index_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DiffLlama subtracts two attentions by a factor that follows the layer's index: old layers change when moved."""
    monkeypatch.setattr("lesa_ray.checkpoint.depth._FAMILY_FOLLOWS_DEPTH", {})  # as if it were not known by name
    config = AutoConfig.for_model(
        "diffllama",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="do not keep the function of diffllama"):
        rehearse(planned(str(tmp_path / "base"), tmp_path))


def test_a_family_that_transformers_does_not_know(bases: Bases, tmp_path: Path) -> None:
    import json
    import shutil

    base = Path(shutil.copytree(bases("llama"), tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    with pytest.raises(UserError, match="unheard-of is not known to transformers"):
        rehearse(planned(str(base), tmp_path))


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on the device"),
        (RuntimeError("can't start new thread"), "can't start new thread"),
    ],
)
def test_a_machine_that_cannot_try_it_is_no_reason_to_give_the_promise_up(
    lacking: Exception, said: str, bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> float:
        raise lacking

    monkeypatch.setattr(rehearsal, "_difference", fails)
    with pytest.raises(MachineError, match=f"{re.escape(tempfile.gettempdir())}: .*{said}"):
        rehearse(planned(bases("llama"), tmp_path))
