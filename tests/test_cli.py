"""Wrong input, as a user types it: one line that says what, where and what to do; exit code 2; nothing written."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lesa_ray import __version__, cli
from lesa_ray.report.terminal import log_line

Bases = Callable[[str], str]
LESA_RAY = Path(sys.executable).parent / "lesa-ray"


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    """Exit code, standard output, last line of standard error."""
    monkeypatch.setattr(sys, "argv", ["lesa-ray", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return int(stop.value.code or 0), out, (err.strip().splitlines() or [""])[-1]


@pytest.fixture
def broken(bases: Bases, tmp_path: Path) -> Path:
    """A copy of a good sharded checkpoint, to be damaged."""
    return Path(shutil.copytree(bases("llama"), tmp_path / "base"))


def missing(base: Path) -> None:
    shutil.rmtree(base)


def no_config(base: Path) -> None:
    (base / "config.json").unlink()


def truncated(base: Path) -> None:
    shard = sorted(base.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def truncated_in_the_header(base: Path) -> None:
    shard = sorted(base.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:40])


def empty_shard(base: Path) -> None:
    sorted(base.glob("*.safetensors"))[1].write_bytes(b"")


def missing_shard(base: Path) -> None:
    sorted(base.glob("*.safetensors"))[1].unlink()


def lacking_tensor(base: Path) -> None:
    shard = sorted(base.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, shard)


def pickled(base: Path) -> None:
    for file in base.glob("model*"):
        file.unlink()
    torch.save({}, base / "pytorch_model.bin")


def quantised(base: Path) -> None:
    edit_config(base, quantization_config={"quant_method": "gptq", "bits": 4})


def quantised_tensor(base: Path) -> None:
    shard = next(f for f in sorted(base.glob("*.safetensors")) if any("q_proj" in k for k in load_file(f)))
    tensors = {k: t.to(torch.int8) if "q_proj" in k else t for k, t in load_file(shard).items()}
    save_file(tensors, shard)


def packed(base: Path) -> None:
    """As AutoGPTQ packs a matrix, without a word in config.json."""
    shard = next(f for f in sorted(base.glob("*.safetensors")) if any("q_proj" in k for k in load_file(f)))
    packs = {k.replace("weight", "qweight"): t.to(torch.int32) for k, t in load_file(shard).items() if "q_proj" in k}
    save_file(load_file(shard) | packs, shard)


def quantise_config(base: Path) -> None:
    (base / "quantize_config.json").write_text('{"bits": 4}')


def adapter(base: Path) -> None:
    (base / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def other_depth(base: Path) -> None:
    edit_config(base, num_hidden_layers=7)


def unknown_list(base: Path) -> None:
    edit_config(base, head_counts=[1, 2, 3, 4, 5])


def no_offsets(base: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}).encode()
    sorted(base.glob("*.safetensors"))[1].write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


def damaged_json(base: Path) -> None:
    (base / "config.json").write_text('{"model_type": ')


def damaged_index(base: Path) -> None:
    (base / "model.safetensors.index.json").write_text('{"metadata": {}}')


def nan(base: Path) -> None:
    poison(base, "model.layers.2.self_attn.v_proj.weight", float("nan"))


def inf_outside(base: Path) -> None:
    poison(base, "model.embed_tokens.weight", float("inf"))


def poison(base: Path, name: str, value: float) -> None:
    shard = next(f for f in sorted(base.glob("*.safetensors")) if name in load_file(f))
    tensors = load_file(shard)
    tensors[name][3, 5] = value
    save_file(tensors, shard)


def edit_config(base: Path, **changes: object) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (missing, "no such folder"),
        (no_config, "there is no config.json"),
        (truncated, "is truncated or damaged"),
        (truncated_in_the_header, "is not a whole safetensors file"),
        (empty_shard, "is not a whole safetensors file"),
        (missing_shard, "which is not there"),
        (lacking_tensor, "lacks the tensor"),
        (pickled, "only pytorch_model.bin and no safetensors"),
        (quantised, "is quantised (gptq)"),
        (quantised_tensor, "has dtype I8, so the checkpoint is quantised"),
        (packed, "q_proj.qweight has dtype I32, so the checkpoint is quantised"),
        (quantise_config, "is quantised (quantize_config.json)"),
        (adapter, "holds an adapter (adapter_config.json)"),
        (other_depth, "config.json says num_hidden_layers = 7, the files hold 5 layers"),
        (unknown_list, "head_counts seems to hold one value for each of the 5 layers"),
        (no_offsets, "is not a whole safetensors file"),
        (damaged_json, "is not JSON"),
        (damaged_index, "has no weight_map"),
        (nan, "model.layers.2.self_attn.v_proj.weight holds NaN or Inf"),
        (inf_outside, "model.embed_tokens.weight holds NaN or Inf"),
    ],
)
def test_a_base_that_cannot_be_expanded(
    damage: Callable[[Path], None],
    says: str,
    broken: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damage(broken)
    code, out, line = run(capsys, monkeypatch, "expand", broken, tmp_path / "out", "--method", "solar")
    assert (code, out) == (2, "")
    assert says in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--factor", "1"], "must be greater than 1"),
        (["--factor", "0.5"], "must be greater than 1"),
        (["--factor", "nan"], "factor: Input should be a finite number"),
        (["--factor", "inf"], "factor: Input should be a finite number"),
        (["--factor", "1e308"], "more than 64 times"),
        (["--seed", "-1"], "seed: Input should be greater than or equal to 0"),
        (["--factor", "1.01"], "adds no layer to 5; use --layers 6"),
        (["--factor", "2", "--layers", "8"], "give factor or layers, not both"),
        (["--layers", "5"], "the base has 5 already"),
        (["--method", "solar", "--layers", "11"], "more than twice the base's 5"),
        (["--position", "0-3", "--layers", "12"], "names 4 gaps, and 7 layers are to be added"),
        (["--method", "magic"], "use one of lesa, llama-pro"),
        (["--position", "left"], "unknown; use top, middle"),
        (["--position", "4"], "out of range"),
        (["--position", "2-9"], "out of range"),
        (["--position", "3-1"], "runs backwards"),
        (["--position", "1,1"], "names a gap twice"),
        (["--method", "solar", "--position", "top"], "solar stacks two runs of layers"),
        (["--method", "avg-deus", "--variants", "x"], "has no use for them"),
        (["--method", "avg-deus", "--rank", "3", "--epochs", "9"], "epochs, rank: a setting of lesa"),
        (["--shard-size", "5 bananas"], "--shard-size 5 bananas"),
        (["--dtype", "int8"], "dtype"),
        (["--svd", "magic"], "svd"),
        (["--rank", "0"], "rank"),
        (["--holdout", "1"], "holdout"),
        (["--factor", "many"], "--factor"),
        (["--nonsense"], "--nonsense"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_options_that_make_no_sense(
    arguments: list[str],
    says: str,
    bases: Bases,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, out, line = run(capsys, monkeypatch, "expand", bases("llama"), tmp_path / "out", *arguments)
    assert (code, out) == (2, "")
    assert says in line
    assert not (tmp_path / "out").exists()


def test_out_that_is_taken(
    bases: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "torn" / ".lesa-ray").mkdir(parents=True)
    (tmp_path / "torn" / ".lesa-ray" / "run.json").touch()
    base = bases("llama")
    for out, says in (
        (tmp_path / "out", "is not empty"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "torn", "its .lesa-ray/run.json is damaged"),
        (Path(base), "lies inside BASE"),
        (Path(base) / "inner", "lies inside BASE"),
    ):
        code, _, line = run(capsys, monkeypatch, "expand", base, out, "--method", "solar")
        assert code == 2
        assert says in line
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["notes.txt"]
    assert not (Path(base) / "inner").exists()


def test_out_with_another_result_is_refused_and_the_same_is_reused(
    bases: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["expand", bases("llama"), tmp_path / "out", "--method", "solar", "--json"]
    code, out, _ = run(capsys, monkeypatch, *command)
    assert (code, json.loads(out)["reused"]) == (0, False)
    before = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in (tmp_path / "out").iterdir()}
    code, out, _ = run(capsys, monkeypatch, *command)
    assert (code, json.loads(out)["reused"]) == (0, True)
    code, out, line = run(capsys, monkeypatch, *command, "--layers", "9")
    assert (code, out) == (2, "")
    assert "another expansion" in line
    code, _, line = run(capsys, monkeypatch, "expand", bases("qwen2"), tmp_path / "out", "--method", "solar")
    assert code == 2
    assert before == {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in (tmp_path / "out").iterdir()}
    file = tmp_path / "out" / "expansion.json"
    file.write_text(file.read_text().replace(f'"lesa_ray": "{__version__}"', '"lesa_ray": "0.0.9"'))
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({**manifest, "fingerprint": "of that version"}))
    code, _, line = run(capsys, monkeypatch, *command)
    assert code == 2
    assert f"made by lesa-ray 0.0.9 (this is {__version__}); give a new place" in line


def test_too_few_layers_for_lesa(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests import families

    families.make("llama", tmp_path / "two", layers=2)
    code, _, line = run(capsys, monkeypatch, "expand", tmp_path / "two", tmp_path / "out")
    assert code == 2
    assert "lesa: needs at least 3 layers, the base has 2" in line


@pytest.mark.parametrize(("other", "says"), [("qwen3", "self_attn.k_norm.weight"), ("gpt2", "--variants")])
def test_variants_of_another_shape(
    other: str,
    says: str,
    bases: Bases,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, _, line = run(capsys, monkeypatch, "expand", bases("llama"), tmp_path / "out", "--variants", bases(other))
    assert code == 2
    assert says in line
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_no_text_is_told_of_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same in the current folder's: of it pages and tokenizers make absolute names."""
    name = os.fsdecode(b"caf\xe9")
    code, _, line = run(capsys, monkeypatch, "analyze", "base", "--out", tmp_path / name)
    assert code == 2
    assert line.startswith(f"lesa-ray: {tmp_path}/caf\\udce9: is no UTF-8; rename it")
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    assert run(capsys, monkeypatch, "analyze", "base") == (2, "", line)
    (tmp_path / name).rmdir()
    code, _, line = run(capsys, monkeypatch, "analyze", "base")
    assert (code, line) == (2, "lesa-ray: the current folder was removed; go to one that is there")


@pytest.mark.timeout(120)
def test_closed_streams_take_nothing_and_are_no_number_of_a_file(bases: Bases, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = shlex.join(
        [sys.executable, "-m", "lesa_ray.cli", "expand", bases("llama"), str(out), "--method", "solar"]
    )
    assert subprocess.run(f"{command} <&- >&- 2>&-", shell=True, timeout=110, check=False).returncode == 0
    assert (out / "config.json").exists()


def test_work_goes_on_where_its_progress_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), open(writer, "w") as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        log_line("expand out", "writing the checkpoint")


def test_a_hub_id_without_network(tmp_path: Path) -> None:
    """The hub's address is one where nothing listens: refused at once, as without a network."""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    command = [str(LESA_RAY), "expand", "some-org/some-model", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=360, check=False)
    assert done.returncode == 2, done.stderr
    assert "BASE some-org/some-model: cannot be listed" in done.stderr.splitlines()[-1]
    assert "network" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_dry_run_and_inspect_write_nothing_and_agree(
    bases: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases("llama")
    code, out, _ = run(capsys, monkeypatch, "expand", base, tmp_path / "out", "--dry-run", "--json")
    assert code == 0
    planned = json.loads(out)
    code, out, _ = run(capsys, monkeypatch, "inspect", base, "--json")
    assert code == 0
    seen = json.loads(out)
    assert not (tmp_path / "out").exists()
    assert seen["plan"] == planned["plan"]
    assert seen["base"]["layers"] == 5
    assert seen["base"]["weight_types"]["self_attn.k_proj.weight"]["shape"] == [32, 64]
    assert seen["plan"]["layers"] == 8
    tensors = {k: v for f in Path(base).glob("*.safetensors") for k, v in load_file(f).items()}
    assert seen["base"]["parameters"] == sum(t.numel() for t in tensors.values())


def test_inspect_takes_the_options_of_expand(
    bases: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, helps = [], []
    for name in ("expand", "inspect"):
        code, out, _ = run(capsys, monkeypatch, name, "--help")
        assert code == 0
        flags.append(set(re.findall(r"^  (--[\w-]+)", out, re.MULTILINE)))
        helps.append(" ".join(out.split()))
    assert flags[0] - {"--dry-run"} == flags[1] - {"--cluster"}
    assert {"--method", "--vectors", "--new-width", "--rank", "--share-experts", "--holdout", "--shard-size"} < flags[0]
    shown = ("--vectors lower|mean|first", "--gpus-per-task <float>", "--memory-budget <str>", "[default: 5GB]")
    assert all(one in text for one in shown for text in helps)
    assert all("lesa: singular directions kept" in text and "SkipInit" not in text for text in helps)
    config = tmp_path / "config.yaml"
    config.write_text("method: solar\nlesa: {svd: none}\nvectors: mean\n")
    for more, says in (
        (["--rank", "3"], "lesa: rank 3 with svd none"),  # from the file and from a flag
        (["--vectors", "middle"], "vectors: Input should be 'lower', 'mean' or 'first'"),
        (["--svd", "auto", "--rank", "4"], "rank: a setting of lesa"),
    ):
        code, _, line = run(capsys, monkeypatch, "inspect", bases("llama"), "--config", config, *more)
        assert code == 2
        assert says in line


def test_settings_from_a_file_and_flags_win(
    bases: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"base: {bases('llama')}\nout: {tmp_path / 'out'}\nmethod: lesa\nlesa: {{epochs: 7}}\nlayers: 6\n"
    )
    code, out, _ = run(capsys, monkeypatch, "expand", "--config", config, "--layers", "7", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["plan"]["layers"] == 7
    config.write_text("base: x\nout: y\nmethods: lesa\n")
    code, _, line = run(capsys, monkeypatch, "expand", "--config", config)
    assert code == 2
    assert "methods" in line
    for recipe in ("paper", "released-code"):
        for lesa in ("5", "[]"):
            config.write_text(f"base: x\nout: y\nrecipe: {recipe}\nlesa: {lesa}\n")
            code, _, line = run(capsys, monkeypatch, "expand", "--config", config)
            assert code == 2
            assert f"config {config}: lesa: Input should be" in line


def test_no_file_holds_a_number_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where a setting is of any kind, as an arm's are: JSON, which names results, has no word for it."""
    config = tmp_path / "config.yaml"
    config.write_text("base: x\ntokens: 1\narms: [{method: lesa}, {method: solar, expand: {base: [2, .inf]}}]\n")
    code, _, line = run(capsys, monkeypatch, "compare", config)
    assert (code, line.strip()) == (2, f"lesa-ray: config {config}: arms.expand.base: is not a finite number")
