"""`--method auto` takes the first choice that a base can have, and is then no different from naming it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lesa_ray import ExpandConfig, UserError, cli
from lesa_ray.comparison.arms import arms_of
from lesa_ray.comparison.settings import ComparisonConfig
from lesa_ray.config import LesaSettings
from lesa_ray.expansion import auto
from lesa_ray.expansion.auto import CHOICES, Choice
from lesa_ray.expansion.prepare import prepare

Bases = Callable[[str], str]
TRIED = (Choice("mean-aligned", "it won"), Choice("llama-pro", "it came second"))


def settings(base: str, **more: Any) -> ExpandConfig:
    return ExpandConfig(base=base, out="out", **more)


def test_what_is_shipped_is_a_choice_for_every_base(bases: Bases) -> None:
    first = CHOICES[0]
    found = prepare(settings(bases("llama"), method="auto"))
    named = prepare(settings(bases("llama"), method=first.method))
    assert (found.fingerprint, found.chosen) == (named.fingerprint, first.reason)
    assert named.chosen is None
    for family in ("gpt2", "mixtral", "gpt_neox", "phi3"):
        assert prepare(settings(bases(family), method="auto")).chosen


def test_the_first_that_the_base_can_have_is_taken(bases: Bases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "CHOICES", TRIED)
    llama, mixtral = (prepare(settings(bases(family), method="auto", factor=1.4)) for family in ("llama", "mixtral"))
    assert (llama.job.method.name, llama.chosen) == ("mean-aligned", "it won")
    assert (mixtral.job.method.name, mixtral.chosen) == ("llama-pro", "it came second")
    assert llama.job.plan.layers == 7
    placed = prepare(settings(bases("llama"), method="auto", position="bottom"))
    assert (placed.job.method.name, placed.job.config.position) == ("mean-aligned", "bottom")  # what was given stays


def test_a_function_that_would_not_be_kept_is_no_choice(bases: Bases) -> None:
    found = prepare(settings(bases("bert"), method="auto"))
    assert (found.job.method.name, found.rehearsed) == ("avg-deus", False)
    assert prepare(settings(bases("llama"), method="auto")).rehearsed


def test_a_base_that_cannot_be_grown_at_all_is_refused(bases: Bases, tmp_path: Path) -> None:
    base = Path(shutil.copytree(bases("llama"), tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "scale_depth": 1.4}))  # as MiniCPM's
    for method in ("auto", "llama-pro", "solar", "avg-deus"):
        with pytest.raises(UserError, match=r"scale_depth = 1\.4: what each layer adds is divided by the root"):
            prepare(settings(str(base), method=method))


def test_settings_that_no_base_can_have_are_an_error(bases: Bases) -> None:
    with pytest.raises(UserError, match="--position 90"):
        prepare(settings(bases("llama"), method="auto", position="90"))
    for write in ({"zero_init": False}, {"output_scale": 0.5}):
        with pytest.raises(UserError, match="--method auto: new layers that write at once"):
            prepare(settings(bases("llama"), method="auto", **write))
    for more in ({"lesa": LesaSettings(rank=3)}, {"variants": ("v",)}, {"recipe": "released-code"}):
        with pytest.raises(UserError, match="--method auto: decides LESA's settings itself"):
            prepare(settings(bases("llama"), method="auto", **more))
    config = ComparisonConfig.model_validate(
        {"name": "c", "store": "s", "base": "b", "blocks": "d", "tokens": 1, "arms": [{"method": ["lesa", "auto"]}]}
    )
    with pytest.raises(UserError, match="auto is a choice between the other methods"):
        arms_of(config, "file")


def test_inspect_says_what_was_chosen_and_why(
    bases: Bases, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(auto, "CHOICES", TRIED)
    for words in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["lesa-ray", "inspect", bases("mixtral"), "--method", "auto", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code in (0, None)
        shown = capsys.readouterr()
        if words:
            plan = json.loads(shown.out)["plan"]
            assert (plan["method"], plan["chosen"]) == ("llama-pro", "it came second")
        else:
            assert "chosen by auto: it came second" in shown.err
