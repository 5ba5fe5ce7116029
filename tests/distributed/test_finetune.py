"""Fine-tuning from instruction data to a checkpoint that answers, by Ray; and what is refused before anything is
written."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lesa_ray import cli
from lesa_ray.distributed import finetune as module
from lesa_ray.errors import UserError
from lesa_ray.training.tokens import open_blocks
from lesa_ray.training.train_settings import FinetuneConfig
from tests import families
from tests.training import styles
from tests.training.blocks import make_blocks

Run = Callable[..., tuple[int, dict[str, Any] | str]]
QUESTIONS = ("left", "right", "café", "nine", "ten", "people", "add", "return")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return styles.qwen(styles.CHATML)


@pytest.fixture(scope="module")
def base(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small Llama with room for the tokenizer's tokens and a chat template."""
    folder = families.make(
        "llama", tmp_path_factory.mktemp("base") / "llama", layers=2, vocab_size=len(tokenizer), eos_token_id=0
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Questions whose answers can be learnt, half of them as messages, half as prompt and response."""
    folder = tmp_path_factory.mktemp("conversations")
    lines: tuple[list[str], list[str]] = ([], [])
    for number in range(240):
        word = QUESTIONS[number % len(QUESTIONS)]
        asked, answer = f"{number} {word}", f"{word} {word}"
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        row = {"prompt": asked, "response": answer} if number % 2 else {"messages": turns}
        lines[number % 2].append(json.dumps(row, ensure_ascii=False))
    for name, part in zip(("messages", "pairs"), lines, strict=True):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    return str(folder)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, local_ray: None) -> Run:
    """`lesa-ray finetune …`: its exit code, and its result or the last line of standard error."""

    def call(checkpoint: str, data: str, out: object, *flags: object) -> tuple[int, dict[str, Any] | str]:
        given = ["--data", data, "--out", out, "--cpus-per-worker", 1, "--seq-len", 64, "--json", *flags]
        monkeypatch.setattr(sys, "argv", ["lesa-ray", "finetune", checkpoint, *map(str, given)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed, err = capfd.readouterr()
        assert "Traceback" not in err, err
        code = int(stop.value.code or 0)
        return code, json.loads(printed) if code == 0 else err.strip().splitlines()[-1]

    return call


@pytest.mark.thorough
@pytest.mark.timeout(840)
def test_from_instruction_data_to_a_checkpoint_that_answers(
    run: Run, base: str, data: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ("--workers", 2, "--batch", 4, "--epochs", 6, "--learning-rate", 3e-3, "--holdout", 0.2, "--eval-every", 20)
    code, result = run(base, data, out, *flags)
    assert code == 0, result
    assert isinstance(result, dict)
    assert result["heldout_after"] < result["heldout_before"] - 1
    assert result["trained_parameters"] == result["parameters"]
    blocks = open_blocks(str(out / "training" / "data"))
    assert blocks.kind == "chat"
    assert blocks.manifest["documents"] == 240
    assert result["steps"] == -(-6 * blocks.train.rows // 4)

    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded.chat_template == tokenizer.chat_template
    asked = loaded.apply_chat_template(
        [{"role": "user", "content": "7 café"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**asked, max_new_tokens=12, do_sample=False)
    text = loaded.decode(answer[0, asked["input_ids"].shape[1] :])
    assert text.endswith("<|im_end|>"), text  # it has learnt to stop, and generation knows where
    assert text.count("<|im_end|>") == 1, text
    assert model.generation_config.eos_token_id == [loaded.convert_tokens_to_ids("<|im_end|>"), 0]

    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    code, again = run(base, data, out, *flags)
    assert code == 0
    assert again == {**result, "reused": True}
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == stamps
    code, said = run(base, data, out, *flags, "--learning-rate", 1e-3)
    assert code == 2
    assert "holds a run of other inputs or settings (learning_rate: 0.003 there, 0.001 now)" in str(said)
    code, said = run(base, data, out, *flags, "--holdout", 0.5)
    assert code == 2
    assert "holds token blocks of other data or settings" in str(said)
    assert (out / "training" / "data" / "manifest.json").exists()

    ready = str(out / "training" / "data")  # token blocks are taken as they are
    code, said = run(base, ready, tmp_path / "more", "--holdout", 0.5)
    assert code == 2
    assert "holdout 0.5: data" in str(said)
    assert "token blocks already, made with 0.2" in str(said)
    assert not (tmp_path / "more").exists()


@pytest.mark.timeout(600)
def test_wrong_input_is_one_line_and_leaves_nothing(
    run: Run, base: str, data: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    bare = Path(shutil.copytree(base, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    small = families.make("llama", tmp_path / "small", layers=2)
    tokenizer.save_pretrained(small)
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"text": "no conversation"}\n')
    silent = tmp_path / "silent.jsonl"
    silent.write_text('{"messages": [{"role": "user", "content": "hello?"}]}\n' * 4)
    text = make_blocks(str(tmp_path / "text"), rows=4, heldout=1)
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    cases: list[tuple[str, str, str, tuple[object, ...]]] = [
        ("has no chat template", str(bare), data, ()),
        ("its tokens go up to .*, the vocabulary of .* has 128", small, data, ()),
        (r"plain.jsonl: line 1: has no conversation: expected a column messages", base, str(plain), ()),
        ("silent.jsonl: has no conversation with an answer to train on", base, str(silent), ()),
        ("no such|nothing|does not exist|not found", base, str(tmp_path / "nothing.jsonl"), ()),
        ("seq_len 65: checkpoint .* was made for 64 tokens; give --seq-len 64 or less", base, data, ("--seq-len", 65)),
        ("holds text, not conversations; train on it with `lesa-ray pretrain`", base, text, ()),
        ("nothing.*: matches no parameter", base, data, ("--train", "*.nothing")),
        ("batch 5: cannot be divided among 2 workers", base, data, ("--batch", 5, "--workers", 2)),
        ("workers 8 .* the cluster can give 4", base, data, ("--workers", 8, "--wait", 0)),
    ]
    for message, checkpoint, conversations, flags in cases:
        out = tmp_path / "out"
        code, said = run(checkpoint, conversations, out, *flags)
        assert code == 2, (message, said)
        assert re.search(message, str(said)), (message, said)
        assert not out.exists(), message
    code, said = run(base, data, full)
    assert code == 2
    assert "is not empty; give a new place, or empty it" in str(said)
    assert [path.name for path in full.iterdir()] == ["notes.txt"]


@pytest.mark.timeout(360)
def test_a_run_goes_on_with_its_token_blocks_whatever_becomes_of_the_conversations(
    base: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, local_ray: None
) -> None:
    trained: list[str] = []
    monkeypatch.setattr(module, "pretrain", lambda config, *_, **__: trained.append(open_blocks(config.data).digest))
    mine = Path(shutil.copytree(data, tmp_path / "mine"))
    config = FinetuneConfig(checkpoint=base, data=str(mine), out=str(tmp_path / "out"), seq_len=64)
    blocks = tmp_path / "out/training/data"
    module.finetune(config)
    module.finetune(config)
    assert not caplog.messages
    before = (blocks / "manifest.json").read_bytes()
    for change in (lambda: (mine / "pairs.jsonl").touch(), lambda: shutil.rmtree(mine)):
        change()
        module.finetune(config)
        assert caplog.messages.pop().startswith(f"data {mine}: changed, moved or gone since token blocks were made of")
    assert trained == [open_blocks(str(blocks)).digest] * 4
    assert (blocks / "manifest.json").read_bytes() == before
    shutil.copytree(data, mine)
    with pytest.raises(UserError, match="holds token blocks of other data or settings"):
        module.finetune(config.model_copy(update={"too_long": "drop"}))


def test_the_defaults_are_three_epochs_of_everything(base: str) -> None:
    config = FinetuneConfig.model_validate({"checkpoint": base, "data": "d", "out": "o"})
    assert config.on_blocks("blocks").epochs == 3
    assert config.on_blocks("blocks").train == ("all",)
    assert FinetuneConfig.model_validate({**config.model_dump(), "steps": 5}).on_blocks("blocks").epochs is None
    asked = config.to_tokenize("blocks")
    assert (asked.kind, asked.seq_len, asked.tokenizer, asked.data) == ("chat", 2048, base, ("d",))
