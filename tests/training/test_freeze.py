"""What is trained, and that the rest costs nothing: no gradient, no optimizer state, no backward pass below."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lesa_ray.checkpoint.manifest import read_manifest
from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import UserError
from lesa_ray.training.conversion import plan_conversions
from lesa_ray.training.freeze import default_choice, freeze, trained_names
from lesa_ray.training.loop import Place, Trainer, make_optimizer
from lesa_ray.training.model import build, layers_of, load, shard, stored_types, trained_parameters
from tests import families
from tests.training.test_model import LENGTH, STEPS, config_for, rows
from tests.training.workers import run_workers


def names_of(base: str, *chosen: str) -> tuple[str, ...]:
    model = build(open_checkpoint(base).config, base)
    return trained_names(model, chosen, read_manifest(Storage(base)), base)


def test_new_layers_are_those_of_the_manifest(grow: Callable[..., Any], bases: Callable[[str], str]) -> None:
    grown = grow(bases("llama"), method="llama-pro").out
    manifest = read_manifest(Storage(grown))
    assert manifest is not None
    new = names_of(grown, "new")
    assert {int(name.split(".")[2]) for name in new} == set(manifest["new_layers"])
    assert len(new) == 9 * len(manifest["new_layers"])
    assert default_choice(manifest, grown) == ("new",)
    assert set(names_of(grown, "new", "norms")) - set(new) >= {
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
    }


def test_names_and_patterns(bases: Callable[[str], str]) -> None:
    llama, tied, gpt2 = bases("llama"), bases("llama_tied"), bases("gpt2")
    assert names_of(llama, "embeddings") == ("model.embed_tokens.weight",)
    assert names_of(llama, "lm_head") == ("lm_head.weight",)
    assert names_of(tied, "lm_head") == names_of(tied, "embeddings") == ("model.embed_tokens.weight",)
    assert names_of(tied, "lm_head.*") == ("model.embed_tokens.weight",)
    assert len(names_of(llama, "norms")) == 2 * families.LAYERS + 1
    assert len(names_of(gpt2, "norms")) == 4 * families.LAYERS + 2
    assert len(names_of(llama, "*.mlp.*")) == 3 * families.LAYERS
    assert len(names_of(llama, "all")) == 9 * families.LAYERS + 3


def test_wrong_choices_say_what_is_wrong(bases: Callable[[str], str]) -> None:
    with pytest.raises(UserError, match=r"train \*.nothing.\*: matches no parameter of .*, such as model.embed_tokens"):
        names_of(bases("llama"), "*.nothing.*")
    with pytest.raises(UserError, match=r"has no expansion.json"):
        names_of(bases("llama"), "new")
    with pytest.raises(UserError, match=r"has no expansion.json.*--train all"):
        default_choice(None, "x")


def test_the_lowest_trained_layer(bases: Callable[[str], str]) -> None:
    model = build(open_checkpoint(bases("llama")).config, "x")
    names = [name for name, _ in model.named_parameters()]
    assert freeze(model, names) is None
    assert freeze(model, [n for n in names if ".layers.3." in n or ".layers.4." in n]) == 3
    assert freeze(model, ["lm_head.weight", "model.norm.weight"]) == families.LAYERS
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["model.norm.weight", "lm_head.weight"]


def watched_step(base: str, activation_checkpointing: bool) -> dict[str, Any]:
    """One step with hooks on every layer: where backward passes, where the forward pass is made again."""
    checkpoint, config = open_checkpoint(base), config_for(base)
    model = build(checkpoint.config, base)
    names = trained_names(model, ["*.layers.3.*"], None, base)
    lowest = freeze(model, names)
    conversions = plan_conversions(model, checkpoint.tensors, base)
    stored = stored_types(checkpoint, conversions)
    shard(
        model, init_device_mesh("cpu", (dist.get_world_size(),)), bf16=False, stored=stored, lowest=lowest,
        activation_checkpointing=activation_checkpointing, compiled=False, cpu_offload=False,
    )  # fmt: skip
    load(model, checkpoint, conversions)
    trained = trained_parameters(model, names)
    optimizer = make_optimizer(trained, config)
    place = Place(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    trainer = Trainer(model, trained, optimizer, config, place, STEPS, LENGTH)
    backward, forward = set(), dict.fromkeys(range(families.LAYERS), 0)

    def watch(index: int, module: torch.nn.Module) -> None:
        def on_forward(_: Any, inputs: Any) -> None:
            forward[index] += 1
            hidden = inputs[0]
            if hidden.requires_grad:
                hidden.register_hook(lambda _: backward.add(index))

        module.mlp.register_forward_pre_hook(on_forward)

    for index, layer in enumerate(layers_of(model)):
        watch(index, layer)
    trainer.step(0, {name: column[:1] for name, column in rows(0).items()})
    return {
        "backward": backward,
        "forward": forward,
        "gradients": [name for name, p in model.named_parameters() if p.requires_grad],
        "state": len(optimizer.state),
        "trained": len(names),
        "stored": {name: str(p.dtype) for name, p in model.named_parameters()},
    }


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_frozen_layers_cost_no_backward_pass(activation_checkpointing: bool, tmp_path: Path) -> None:
    base = families.make("llama", tmp_path / "base", dtype=torch.bfloat16)
    found = run_workers(watched_step, 1, base, activation_checkpointing)[0]
    assert found["backward"] == {3, 4}
    again = 2 if activation_checkpointing else 1
    assert found["forward"] == {0: 1, 1: 1, 2: 1, 3: again, 4: again}
    assert len(found["gradients"]) == found["state"] == found["trained"] == 9
    kinds = {name: kind for name, kind in found["stored"].items() if ".layers.3." in name}
    assert set(kinds.values()) == {"torch.float32"}
    assert found["stored"]["model.layers.0.mlp.up_proj.weight"] == "torch.bfloat16"
