"""Fine-tunes of the base, from whose layers the predictor learns too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lesa_ray import ExpandConfig, MachineError, UserError, expand
from lesa_ray.config import LesaSettings
from lesa_ray.expansion.layout import Expansion
from lesa_ray.expansion.method import Unit
from lesa_ray.expansion.runner import InlineRunner, Listener
from lesa_ray.lesa.fit import fit_weight_type
from tests import families

Bases = Callable[[str], str]


def test_variants_join_the_training_rows(bases: Bases, grow: Callable[..., Any], tmp_path: Path) -> None:
    """Llama and its fine-tunes (paper, section 4.4): three checkpoints give three times the triples."""
    others = [families.make("llama", tmp_path / f"tuned-{seed}", seed=seed) for seed in (1, 2)]
    reports = {
        name: grow(bases("llama"), variants=variants, lesa={"epochs": 1}).manifest
        for name, variants in {"alone": [], "joined": others}.items()
    }
    alone, joined = (reports[name]["fit"]["mlp.up_proj.weight"] for name in ("alone", "joined"))
    triples = families.LAYERS - 2
    assert alone["triples_trained"] + alone["triples_held_out"] == triples
    assert joined["triples_trained"] + joined["triples_held_out"] == 3 * triples
    assert set(reports["joined"]["identity"]["variants"]) == set(others)
    assert reports["joined"]["fingerprint"] != reports["alone"]["fingerprint"]


@pytest.mark.parametrize("method", ["lesa", "aligned-lesa"])
def test_it_is_the_variants_weights_that_count(
    method: str, bases: Bases, grow: Callable[..., Any], tmp_path: Path
) -> None:
    """Ridge from all triples knows no seed; the base once more would give another result than a fine-tune."""
    tuned = [families.make("llama", tmp_path / f"tuned-{seed}", seed=seed) for seed in (1, 2)]
    settings = {"method": method, "layers": 6, "position": "1", "lesa": {"predictor": "ridge", "holdout": 0}}
    made = [grow(bases("llama"), variants=[other], **settings).out for other in tuned]
    one, two = (families.layer_tensors(out, "llama", 2) for out in made)
    for name, tensor in one.items():
        assert torch.equal(two[name], tensor) == (tensor.ndim == 1), name
    if method == "lesa":
        name = "self_attn.q_proj.weight"
        loads = [
            [families.layer_tensors(folder, "llama", i)[name] for i in range(families.LAYERS)].__getitem__
            for folder in (bases("llama"), tuned[0])
        ]
        found: dict[int, torch.Tensor] = {}
        ridge = LesaSettings(predictor="ridge", holdout=0)
        fit_weight_type(loads[0], families.LAYERS, [(5, 1, 2)], found.__setitem__, ridge, 0, variants=loads[1:])
        torch.testing.assert_close(one[name], found[5], rtol=1e-4, atol=1e-6)


def test_experts_held_out_are_not_known_from_the_variants(
    bases: Bases, grow: Callable[..., Any], tmp_path: Path
) -> None:
    """Of random experts nothing can be predicted, though the variants are the base once more, and once more."""
    copies = [str(shutil.copytree(bases("mixtral"), tmp_path / name)) for name in ("one", "two")]
    lesa = {"share_experts": True, "predictor": "ridge"}
    fit = grow(bases("mixtral"), variants=copies, layers=6, lesa=lesa).manifest["fit"]
    for name, found in fit.items():
        if "experts" in name:
            assert found["trained"]["predictor"]["r2"] > 0.1
            assert found["held_out"]["predictor"]["r2"] < 0


def test_a_variant_is_a_model_of_the_same_make(bases: Bases, tmp_path: Path) -> None:
    deeper = families.make("llama", tmp_path / "deeper", layers=families.LAYERS + 1)
    renamed = Path(shutil.copytree(bases("llama"), tmp_path / "renamed"))
    tensors = families.tensors(renamed)
    for file in renamed.glob("model*"):
        file.unlink()
    names = {name: name.replace("model.layers.", "decoder.layers.") for name in tensors}
    save_file({names[name]: tensor for name, tensor in tensors.items()}, renamed / "model.safetensors")
    for variant, words in (
        (deeper, f"has {families.LAYERS + 1} layers, BASE .* has {families.LAYERS}$"),
        (str(renamed), r"names its layers decoder\.layers\.\*, BASE .* model\.layers\.\*$"),
    ):
        config = ExpandConfig(base=bases("llama"), out=str(tmp_path / "out"), variants=(variant,))
        with pytest.raises(UserError, match=rf"^--variants {variant}: {words}"):
            expand(config, InlineRunner())
    assert not (tmp_path / "out").exists()


def test_a_variant_that_cannot_be_reached_any_more_loses_nothing(bases: Bases, tmp_path: Path) -> None:
    """It was looked at before; that it is gone from a machine later is that machine's fault."""
    tuned, out = Path(families.make("llama", tmp_path / "tuned", seed=1)), tmp_path / "out"

    class AwayAfterAUnit(InlineRunner):
        def run_units(self, expansion: Expansion, units: list[Unit], listener: Listener) -> dict[str, Any]:
            super().run_units(expansion, units[:1], listener)
            tuned.rename(tmp_path / "away")
            return super().run_units(expansion, units[1:], listener)

    config = ExpandConfig(base=bases("llama"), out=str(out), variants=(str(tuned),), lesa=LesaSettings(epochs=1))
    with pytest.raises(MachineError):
        expand(config, AwayAfterAUnit())
    assert len(list((out / ".lesa-ray" / "units").glob("*.json"))) == 1
    (tmp_path / "away").rename(tuned)
    assert expand(config, InlineRunner()).resumed
