"""Methods that compute, on a GPU: the same new layers as on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lesa_ray.config import ExpandConfig, LesaSettings
from lesa_ray.distributed.expand import expand
from lesa_ray.expansion.runner import InlineRunner
from tests.families import tensors

BRIEF = LesaSettings(epochs=1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"method": "lesa", "lesa": BRIEF}),
        ("llama", {"method": "lesa", "lesa": LesaSettings(epochs=1, svd="randomized", rank=16)}),
        ("llama", {"method": "lesa", "lesa": LesaSettings(predictor="ridge")}),
        ("mixtral", {"method": "lesa", "lesa": BRIEF}),
        ("mixtral", {"method": "lesa", "lesa": LesaSettings(epochs=1, share_experts=True)}),
        ("llama", {"method": "aligned-lesa", "lesa": BRIEF}),
        ("llama", {"method": "mean-aligned"}),
        ("llama", {"method": "opt-deus"}),
    ],
    ids=["gram", "randomized", "ridge", "experts", "shared experts", "aligned", "mean", "transport"],
)
def test_new_layers_are_those_of_the_cpu(
    family: str, settings: dict[str, Any], bases: Callable[[str], str], tmp_path: Path
) -> None:
    for device in ("cpu", "cuda"):
        config = ExpandConfig(base=bases(family), out=str(tmp_path / device), zero_init=False, **settings)
        expand(config, runner=InlineRunner(device))
    here, there = tensors(tmp_path / "cpu"), tensors(tmp_path / "cuda")
    assert here.keys() == there.keys()
    for name, one in here.items():
        torch.testing.assert_close(there[name], one, rtol=0.02, atol=0.02 * float(one.abs().max()), msg=name)
