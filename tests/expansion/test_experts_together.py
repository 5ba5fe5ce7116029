"""Mixtures whose files hold all experts of a layer in one tensor: each expert's part of it is a weight type of its own.

The yardstick is the same model with a tensor for each expert, which other tests hold against plain references."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lesa_ray import ExpandConfig, Expanded, UserError
from lesa_ray.analysis.settings import AnalyzeConfig
from lesa_ray.checkpoint import residual
from lesa_ray.checkpoint.anatomy import read_anatomy
from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.distributed.analyze import analyze
from lesa_ray.expansion.methods import lesa
from lesa_ray.expansion.prepare import prepare
from lesa_ray.expansion.rehearsal import rehearse
from lesa_ray.expansion.workbench import units_storage
from lesa_ray.report import terminal
from tests import families

EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(\w+)\.weight$")
Grow = Callable[..., Expanded]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    found: dict[str, str] = {}

    def base(family: str) -> str:
        if family not in found:
            found[family] = families.make(family, tmp_path_factory.mktemp(family), layers=6)
        return found[family]

    return base


def together(apart: str, folder: Path, *, inputs_first: bool) -> str:
    """The same model with a tensor for all experts of a kind in a layer."""
    folder.mkdir()
    (folder / "config.json").write_bytes((Path(apart) / "config.json").read_bytes())
    tensors = families.tensors(apart)
    for name in list(tensors):
        if match := EXPERT.match(name):
            tensors.setdefault(f"{match[1]}.{match[3]}", torch.empty(0))
    for name in [name for name in tensors if re.search(r"experts\.\w+_proj$", name)]:
        stack, kind = name.rsplit(".", 1)
        experts = [tensors.pop(f"{stack}.{index}.{kind}.weight") for index in range(4)]
        tensors[name] = torch.stack([expert.T.contiguous() if inputs_first else expert for expert in experts])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def apart(folder: str, *, inputs_first: bool) -> dict[str, Tensor]:
    """`together` undone."""
    found = {}
    for name, tensor in families.tensors(folder).items():
        if tensor.ndim != 3:
            found[name] = tensor
            continue
        stack, kind = name.rsplit(".", 1)
        for index, expert in enumerate(tensor):
            found[f"{stack}.{index}.{kind}.weight"] = expert.T.contiguous() if inputs_first else expert
    return found


@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lesa", {"lesa": {"epochs": 1}}),
        ("lesa", {"lesa": {"predictor": "ridge", "share_experts": True}}),
        ("avg-deus", {}),
        ("opt-deus", {}),
        ("llama-pro", {}),
    ],
)
def test_a_method_makes_what_it_makes_of_experts_in_tensors_of_their_own(
    method: str,
    settings: dict[str, Any],
    inputs_first: bool,
    made: Callable[[str], str],
    grow: Grow,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lesa, "_seed", lambda seed, name: seed)  # else that of a type's name
    own = made("qwen3_moe")
    base = together(own, tmp_path / "base", inputs_first=inputs_first)
    zero_init = {} if method in ("lesa", "avg-deus") else {"zero_init": False}
    expected = families.tensors(grow(own, method=method, **zero_init, **settings).out)
    found = apart(grow(base, method=method, **zero_init, **settings).out, inputs_first=inputs_first)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe"])
def test_means(family: str, made: Callable[[str], str], grow: Grow) -> None:
    base = made(family)
    result = grow(base, method="avg-deus")
    records = [record for record in result.manifest["layers"] if record["kind"] == "new"]
    assert len(records) == 3
    for record in records:
        sources = [families.layer_tensors(base, family, source) for source in record["base_layers"]]
        for name, tensor in families.layer_tensors(result.out, family, record["index"]).items():
            mean = torch.stack([source[name].double() for source in sources]).mean(0)
            expected = sources[0][name].double() if "router" in name else mean  # a router keeps its own order
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7, msg=name)
    families.load_strict(result.out, family)


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe"])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("llama-pro", {}),
        ("opt-deus", {}),
        ("random", {}),
        ("lesa", {"zero_init": True, "lesa": {"epochs": 1, "share_experts": True}}),
    ],
)
def test_the_function_is_kept(
    family: str, method: str, settings: dict[str, Any], made: Callable[[str], str], grow: Grow
) -> None:
    base = made(family)
    result = grow(base, method=method, **settings)
    assert result.manifest["zeroed"] == sorted(
        name for name in families.layer_tensors(base, family, 0) if families.matches(name, written(family))
    )
    ids = families.tokens()
    logits = [families.logits(families.load_strict(folder, family), ids) for folder in (base, result.out)]
    assert torch.equal(*logits)


def written(family: str) -> tuple[str, ...]:
    """Through what a layer of the family writes; attention's bias in gpt-oss too."""
    return (*families.TOGETHER[family].writes, "self_attn.o_proj.bias")


def test_the_trial_sees_an_output_of_experts_that_was_missed(
    made: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expansion = prepare(ExpandConfig(base=made("granitemoe"), out=str(tmp_path / "out"), method="llama-pro"))
    rehearse(expansion)
    monkeypatch.setattr(residual, "_WRITER", re.compile(residual._WRITER.pattern.replace("|output_linear", "")))
    with pytest.raises(UserError, match="do not keep the function of granitemoe"):
        rehearse(expansion)


def test_the_trial_may_have_a_tensor_for_each_expert(made: Callable[[str], str], tmp_path: Path) -> None:
    """As transformers writes the miniature of this family, whatever the files hold."""
    base = together(made("qwen3_moe"), tmp_path / "base", inputs_first=False)
    rehearse(prepare(ExpandConfig(base=base, out=str(tmp_path / "out"), method="llama-pro")))


def test_what_inspect_says(made: Callable[[str], str], tmp_path: Path) -> None:
    expansion = prepare(ExpandConfig(base=made("gpt_oss"), out=str(tmp_path / "out"), method="lesa"))
    types = terminal.describe(expansion)["base"]["weight_types"]
    assert types["mlp.experts.down_proj[3]"] == {"shape": [96, 64], "dtype": "F32", "kind": "matrix", "layers": 6}
    assert types["mlp.experts.gate_up_proj_bias[0]"]["kind"] == "vector"
    assert types["mlp.router.weight"]["kind"] == types["mlp.router.bias"]["kind"] == "router"
    assert "mlp.experts.down_proj" not in types
    anatomy = expansion.job.anatomy
    assert [len(group) for name, group in anatomy.kinds.items() if "experts" in name] == [4, 4]
    assert list(anatomy.stored(0)) == sorted(families.layer_tensors(made("gpt_oss"), "gpt_oss", 0))


@pytest.mark.parametrize(
    ("family", "shape", "config", "transposed"),
    [
        ("gpt_oss", {}, {}, True),
        ("granitemoe", {}, {}, False),
        # Square outputs, as gpt-oss' own are: the inputs tell.
        ("gpt_oss", {"intermediate_size": 64}, {}, True),
        ("granitemoe", {"intermediate_size": 64}, {}, False),
        # The width is not known: as linear layers are stored.
        ("gpt_oss", {}, {"hidden_size": None}, False),
    ],
)
def test_which_side_of_an_experts_matrix_is_which(
    family: str, shape: dict[str, int], config: dict[str, Any], transposed: bool, tmp_path: Path
) -> None:
    """LESA's basis is on the side of the outputs."""
    base = Path(families.make(family, tmp_path / "base", layers=3, **shape))
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**raw, **config}))
    anatomy = read_anatomy(open_checkpoint(str(base)))
    experts = [t for t in anatomy.matrices if t.is_expert]
    assert len(experts) == 8
    assert {t.transposed for t in experts} == {transposed}
    if not config:
        neurons = shape.get("intermediate_size", 96)
        assert {(t.d1, t.d2) for t in experts} == {(2 * neurons, 64), (64, neurons)}


def test_an_experts_part_is_read_alone(made: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(made("gpt_oss"))
    name = "model.layers.2.mlp.experts.down_proj"
    whole = checkpoint.read(name)
    assert torch.equal(checkpoint.read(f"{name}[3]"), whole[3])
    assert checkpoint.entry(f"{name}[3]").nbytes * 4 == checkpoint.entry(name).nbytes
    with pytest.raises(KeyError):
        checkpoint.read("model.layers.2.mlp.experts.absent[3]")


def test_a_value_that_is_no_number_is_told_by_its_place(made: Callable[[str], str], grow: Grow, tmp_path: Path) -> None:
    tensors = families.tensors(made("granitemoe"))
    tensors["model.layers.4.block_sparse_moe.input_linear.weight"][2, 5, 7] = float("nan")
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_bytes((Path(made("granitemoe")) / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"model\.layers\.4\.block_sparse_moe\.input_linear\.weight\[2\]"):
        grow(str(tmp_path / "base"), method="avg-deus")


@pytest.mark.parametrize("name", ["mixer.conv1d.weight", "mixer.filters"])
def test_3d_tensors_that_hold_no_experts(name: str, tmp_path: Path) -> None:
    shape = (4, 1, 8) if "conv" in name else (3, 8, 4)  # as many channels as experts; not as many as experts
    tensors = {f"layers.{i}.{name}": torch.zeros(shape) for i in range(2)}
    save_file(tensors | {f"layers.{i}.w.weight": torch.zeros(8, 8) for i in range(2)}, tmp_path / "model.safetensors")
    config = {"model_type": "unheard-of", "num_hidden_layers": 2, "num_experts": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    says = f"avg-deus: {name} is a 3-D tensor {list(shape)}, which only llama-pro and solar can expand"
    with pytest.raises(UserError, match=re.escape(says)):
        prepare(ExpandConfig(base=str(tmp_path), out=str(tmp_path / "out"), method="avg-deus", zero_init=False))


def test_a_fine_tune_gives_further_training_pairs(made: Callable[[str], str], grow: Grow, tmp_path: Path) -> None:
    tuned = families.make("gpt_oss", tmp_path / "tuned", layers=6, seed=1)
    ridge: dict[str, Any] = {"method": "lesa", "lesa": {"predictor": "ridge"}}
    without, given = (grow(made("gpt_oss"), variants=variants, **ridge) for variants in ([], [tuned]))
    name = "model.layers.3.mlp.experts.down_proj"
    one, other = (families.tensors(result.out)[name] for result in (without, given))
    assert all(not torch.equal(*experts) for experts in zip(one, other, strict=True))


def test_units_on_s3_are_put_together(made: Callable[[str], str], s3: str, tmp_path: Path, grow: Grow) -> None:
    """Each expert is a unit of its own on CPUs; their files and the base lie on S3, where the server copies."""
    base, out = f"{s3}/together/base", f"{s3}/together/out"
    for file in ("config.json", "model.safetensors"):
        Storage(base).write(file, (Path(made("gpt_oss")) / file).read_bytes())
    settings = {"method": "lesa", "gpus_per_task": 0, "lesa": {"predictor": "ridge"}}
    config = ExpandConfig.model_validate({"base": base, "out": out, **settings})
    spans = [part.source for shard in prepare(config).shards for t in shard.tensors for part in t.parts]
    assert len({span.file for span in spans if span is not None and span.url == units_storage(out).url}) == 8
    local = families.tensors(grow(made("gpt_oss"), **settings).out)
    result = grow(base, out=out, **settings)
    found = {}
    for file in Storage(result.out).list():
        if file.endswith(".safetensors"):
            (tmp_path / file).write_bytes(Storage(out).read(file))
    found = families.tensors(tmp_path)
    assert found.keys() == local.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in local.items())


def test_an_analysis_tells_what_it_tells_of_experts_in_tensors_of_their_own(
    made: Callable[[str], str], tmp_path: Path
) -> None:
    own = made("qwen3_moe")
    base = together(own, tmp_path / "base", inputs_first=True)
    one, other = (analyze(AnalyzeConfig(base=folder, fit=False), use_ray=False) for folder in (own, base))
    kinds = {name: re.sub(r"(.*experts)\.(\w+)\[\*\]", r"\1.*.\2.weight", name) for name in other["types"]}
    assert {*kinds.values()} == {*one["types"]}
    for name, figures in other["types"].items():
        expected = one["types"][kinds[name]]
        assert figures["norms"] == pytest.approx(expected["norms"], rel=1e-6), name
        assert figures["neighbour_cosine"] == pytest.approx(expected["neighbour_cosine"], abs=1e-6), name
