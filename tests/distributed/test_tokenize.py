"""Token blocks by Ray Data, against plain loops in one process."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.config import load_settings
from lesa_ray.distributed import tokenize as module
from lesa_ray.distributed.tokenize import Tokenized, tokenize
from lesa_ray.errors import MachineError, UserError
from lesa_ray.expansion.runner import Silent
from lesa_ray.report.data import token_lines
from lesa_ray.training import layout, sources, tokens
from lesa_ray.training.data_settings import TokenizeConfig
from lesa_ray.training.tokens import Split, open_blocks
from tests.end_to_end.test_s3_faults import Moody
from tests.training import styles

pytestmark = [pytest.mark.timeout(360), pytest.mark.usefixtures("local_ray")]
SEQ, GROUP_TOKENS, GROUPS, PIECE = 64, 64 * 10, 3, 6000
WORDS = ["café", "add", "left", "right", "return", "naïve", "ten\n", "\n    people", "come – "]


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces, groups and files of a few kilobytes of data."""
    monkeypatch.setattr(tokens, "GROUP_TOKENS", GROUP_TOKENS)
    monkeypatch.setattr(layout, "GROUPS_PER_FILE", GROUPS)
    monkeypatch.setattr(sources, "PIECE_BYTES", PIECE)


def words(seed: int, many: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, many))


def save(path: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """A folder with data of every kind, and its documents in order."""
    root = tmp_path_factory.mktemp("corpus")
    documents = []
    for number in range(25):
        text = words(number, 40)
        (root / f"a{number:02d}.{('txt', 'md', 'py')[number % 3]}").write_text(text, encoding="utf-8", newline="")
        documents.append(text)
    (root / "b.txt").write_bytes(b"")
    long = words(100, 5000)  # six pieces
    (root / "c.txt").write_text(long, encoding="utf-8", newline="")
    (root / "d.txt").write_bytes("naïve".encode("latin-1"))
    documents += [long, "na\ufffdve"]
    lines = [words(200 + number, 60) for number in range(60)]
    rows = [json.dumps({"text": text, "n": 1}) for text in lines]
    (root / "e.jsonl").write_text("\n".join([*rows, '{"text": ""}', '{"text": null}', '{"text": "half \\udc00"}']))
    with gzip.open(root / "f.jsonl.gz", "wt") as file:
        file.write("\n".join(rows[:9]))
    pq.write_table(pa.table({"text": [*lines[20:50], None], "n": range(31)}), root / "g.parquet", row_group_size=4)
    return str(root), [*documents, *lines, "half ?", *lines[:9], *lines[20:50]]


def reference(tokenizer: PreTrainedTokenizerFast, documents: list[str], share: float) -> dict[str, np.ndarray]:
    """All documents of each split in one go."""
    streams: dict[str, list[int]] = {"train": [], "heldout": []}
    for text in documents:
        first = hashlib.sha256(text.encode()[: 2**16]).digest()[:8]
        split = "heldout" if int.from_bytes(first, "big") < share * 2**64 else "train"
        streams[split] += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return {name: np.array(ids[: len(ids) // SEQ * SEQ]).reshape(-1, SEQ) for name, ids in streams.items()}


def ids_of(split: Split) -> np.ndarray:
    return split.read(range(split.rows))["input_ids"]


def bytes_of(folder: str | Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Tokenized]:
    """`tokenize` into `tmp_path / "out"`, or where `out` says."""

    def call(data: Any, tokenizer: str, listener: Any = None, **settings: Any) -> Tokenized:
        data = data if isinstance(data, list | tuple) else [data]
        given = {"data": [str(name) for name in data], "tokenizer": tokenizer, "out": str(tmp_path / "out")}
        return tokenize(TokenizeConfig.model_validate({**given, "seq_len": SEQ, **settings}), listener)

    return call


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("gpt2"), styles.gpt2())


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("qwen"), styles.qwen(styles.CHATML))


@pytest.mark.parametrize("style", styles.STYLES)
def test_rows_are_those_of_one_plain_loop(
    corpus: tuple[str, list[str]], tmp_path: Path, run: Callable[..., Tokenized], style: str
) -> None:
    folder, documents = corpus
    name = save(tmp_path / style, styles.STYLES[style]())
    tokenizer = AutoTokenizer.from_pretrained(name)
    data, files = folder, 31
    if style == "llama2":  # it would put a space before each fragment of the long document
        data, files = f"{folder}/[!c]*", 30
        documents = [text for text in documents if len(text) < 20_000]
    blocks, expected = run(data, name, holdout=0.1).blocks, reference(tokenizer, documents, 0.1)
    np.testing.assert_array_equal(ids_of(blocks.train), expected["train"])
    np.testing.assert_array_equal(ids_of(blocks.heldout), expected["heldout"])
    manifest = blocks.manifest
    assert blocks.heldout.rows > 3
    assert blocks.train.rows > GROUPS * 10
    groups = [file["rows"] for file in blocks.train.files]
    assert all(rows == GROUPS * 10 for rows in groups[:-1])
    assert manifest["documents"] == len(documents)
    assert manifest["vocab_size"] == len(tokenizer)
    assert manifest["splits"]["train"]["scored"] == blocks.train.rows * (SEQ - 1)
    assert all(0 <= manifest["dropped_tokens"][split] < SEQ for split in ("train", "heldout"))
    assert (manifest["sources"][0]["name"], manifest["sources"][0]["files"]) == (data, files)
    assert len((tmp_path / "out/sources.jsonl").read_text().splitlines()) == files
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "manifest.json", "sources.jsonl", "tokenizer", "train", "heldout",
    }  # fmt: skip
    saved = AutoTokenizer.from_pretrained(tmp_path / "out/tokenizer")
    assert saved("naïve")["input_ids"] == tokenizer("naïve")["input_ids"]


_ONE_CPU = """
import json, sys
import ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
from lesa_ray.distributed.tokenize import tokenize
from lesa_ray.report.data import token_lines
from lesa_ray.training import layout, sources, tokens
from lesa_ray.training.data_settings import TokenizeConfig
tokens.GROUP_TOKENS, layout.GROUPS_PER_FILE, sources.PIECE_BYTES = map(int, sys.argv[1:4])
for config in sys.argv[4:]:
    tokenize(TokenizeConfig.model_validate_json(config))
"""


def chat_rows(many: int = 40) -> list[dict[str, Any]]:
    def talk(seed: int) -> list[dict[str, str]]:
        turns = [words(seed * 10 + turn, 1 + (seed * 7 + turn * 3) % 9) for turn in range(2 + 2 * (seed % 2))]
        return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(turns)]

    return [{"messages": talk(seed)} for seed in range(many)]


@pytest.fixture(scope="module")
def elsewhere(
    corpus: tuple[str, list[str]], gpt2: str, qwen: str, s3: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, TokenizeConfig]]:
    """What another process makes on a Ray with one CPU: a folder with `text` and `chat`, and all of `text` on S3."""
    root = tmp_path_factory.mktemp("one")
    (root / "chat.jsonl").write_text("\n".join(map(json.dumps, chat_rows(200))))
    bucket = f"{s3}/tokenize"
    for local, remote in ((corpus[0], "data"), (gpt2, "tokenizer")):
        for name, data in bytes_of(local).items():
            Storage(f"{bucket}/{remote}").write(name, data)
    given = {
        "text": (corpus[0], gpt2, str(root / "text"), "text"),
        "chat": (str(root / "chat.jsonl"), qwen, str(root / "chat"), "chat"),
        "s3": (f"{bucket}/data", f"{bucket}/tokenizer", f"{bucket}/out", "text"),
    }
    configs = {
        name: TokenizeConfig.model_validate(
            {"data": [data], "tokenizer": tokenizer, "out": out, "kind": kind, "seq_len": SEQ, "holdout": 0.1}
        )
        for name, (data, tokenizer, out, kind) in given.items()
    }
    units = [str(unit) for unit in (GROUP_TOKENS, GROUPS, PIECE)]
    jobs = [config.model_dump_json() for config in configs.values()]
    done = subprocess.run([sys.executable, "-c", _ONE_CPU, *units, *jobs], timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return root, configs


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_the_bytes_do_not_depend_on_the_number_of_cpus(
    elsewhere: tuple[Path, dict[str, TokenizeConfig]], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, configs = elsewhere
    monkeypatch.chdir(tmp_path)  # which is not where tasks run
    tokenize(configs[kind].model_copy(update={"out": "four"}))
    four = bytes_of(tmp_path / "four")
    assert four == bytes_of(one / kind)
    assert len([name for name in four if name.endswith(".parquet")]) > 3


def test_everything_may_lie_on_s3(elsewhere: tuple[Path, dict[str, TokenizeConfig]]) -> None:
    one, configs = elsewhere
    local, remote = open_blocks(str(one / "text")), open_blocks(configs["s3"].out)
    assert remote.digest == local.digest
    for mine, other in ((local.train, remote.train), (local.heldout, remote.heldout)):
        np.testing.assert_array_equal(ids_of(mine), ids_of(other))
    assert sorted(Storage(remote.url).list()) == ["manifest.json", "sources.jsonl"]
    assert tokenize(configs["s3"]).reused
    assert tokenize(configs["text"]).reused


class Stop:
    """A listener that ends the run, as Ctrl-C does, after so much progress in a phase."""

    def __init__(self, phase: str, after: int) -> None:
        self._at, self._left, self._now = phase, after, ""
        self.steps: dict[str, int] = {}

    def phase(self, name: str, total: float) -> None:
        self._now = name

    def progress(self, done: float, detail: str) -> None:
        self.steps[self._now] = self.steps.get(self._now, 0) + 1
        if self._now == self._at:
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    corpus: tuple[str, list[str]], gpt2: str, tmp_path: Path, run: Callable[..., Tokenized]
) -> None:
    whole = Stop("", 0)
    assert not run(corpus[0], gpt2, whole, out=str(tmp_path / "whole"), holdout=0.1).resumed
    for phase, after in (("tokenising", 4), ("writing rows", 2)):
        with pytest.raises(KeyboardInterrupt):
            run(corpus[0], gpt2, Stop(phase, after), holdout=0.1)
        with pytest.raises(UserError, match="holds no finished token blocks"):
            open_blocks(str(tmp_path / "out"))
    with pytest.raises(UserError, match="holds unfinished work on other data or settings"):
        run(corpus[0], gpt2, holdout=0.2)
    (tmp_path / "out/train/.part-00009.parquet.1a2b3c4d.tmp").write_bytes(b"half")  # as a kill leaves it
    last = Stop("", 0)
    result = run(corpus[0], gpt2, last, holdout=0.1)
    assert (result.resumed, result.reused) == (True, False)
    assert "tokenising" not in last.steps  # all pieces were there
    assert last.steps["writing rows"] <= whole.steps["writing rows"] - 2
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")

    again = run(corpus[0], gpt2, holdout=0.1)
    assert again.reused
    assert again.blocks == result.blocks
    with pytest.raises(UserError, match="holds token blocks of other data or settings"):
        run(corpus[0], gpt2, holdout=0.1, seq_len=32)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_cloned_data_set_is_read_without_its_card(
    kind: str, qwen: str, tmp_path: Path, run: Callable[..., Tokenized]
) -> None:
    (tmp_path / "set/data").mkdir(parents=True)
    (tmp_path / "set/README.md").write_text("# Card")
    (tmp_path / "set/info.json").write_text("{}")
    rows = [{"text": words(seed, 9), **row} for seed, row in enumerate(chat_rows())]
    (tmp_path / "set/data/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run(tmp_path / "set", qwen, kind=kind)
    assert result.blocks.manifest["documents"] == len(rows)
    assert result.blocks.manifest["unread_files"] == {".json": 1, ".md": 1}
    assert "\nfiles among the data that were not read: 1 .json, 1 .md" in token_lines(result)


def test_a_changed_file_is_other_data(gpt2: str, tmp_path: Path, run: Callable[..., Tokenized]) -> None:
    (tmp_path / "a.txt").write_text(words(0, 500))
    run(tmp_path / "a.txt", gpt2)
    (tmp_path / "a.txt").write_text(words(1, 500))
    with pytest.raises(UserError, match="holds token blocks of other data or settings"):
        run(tmp_path / "a.txt", gpt2)


def test_a_worker_that_is_killed_is_replaced(tmp_path: Path) -> None:
    config = TokenizeConfig(data=("a",), tokenizer="b", out=str(tmp_path / "out"))
    job = module.Job(config, "", 1, 1)
    trace = str(tmp_path)

    def work(job: Any, item: int) -> int:
        path = os.path.join(trace, f"killed-{item}")
        if item == 3 and not os.path.exists(path):
            open(path, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return item * 2

    assert list(module._run_all(job, work, range(8), (), print)) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert (tmp_path / "killed-3").exists()

    def full(job: Any, item: int) -> int:
        with open(os.path.join(trace, "tries"), "a") as file:
            file.write("x")
        raise OSError(28, "No space left on device", "/disk")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TRIES", 1)
        with pytest.raises(MachineError, match="no space left on the device"):
            list(module._run_all(job, full, range(1), (), print))


def test_who_comes_second_harms_nothing_of_whom_is_at_work(
    corpus: tuple[str, list[str]], gpt2: str, tmp_path: Path, run: Callable[..., Tokenized]
) -> None:
    """Both would write the same; but one that gives up removes all of it."""

    class Visited(Silent):
        def phase(self, name: str, total: float) -> None:
            if name in ("tokenising", "writing rows"):
                with pytest.raises(MachineError, match=rf"OUT .*: process {os.getpid()} on .* is at work on it"):
                    run(f"{corpus[0]}/a*", gpt2)

    assert not run(f"{corpus[0]}/a*", gpt2, Visited()).resumed
    assert not (tmp_path / "out/.lesa-ray").exists()
    assert run(f"{corpus[0]}/a*", gpt2).reused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "no"}, "DATA .*no: there is no such file or folder"),
        ({"tokenizer": "no"}, "tokenizer .*no: no such folder"),
        ({"tokenizer": "empty"}, "tokenizer .*empty: cannot be loaded"),
        ({"tokenizer": "endless"}, "tokenizer .*endless: has no end-of-text token"),
        ({"data": "rows.jsonl", "kind": "chat"}, "tokenizer .*gpt2.*: has no chat template"),
        ({"out": "full"}, "OUT .*full: is not empty"),
        ({"data": ".", "out": "out"}, "OUT .*out: lies inside DATA .*, so it would be read as data"),
        ({"data": "**/*.txt", "out": "out"}, "OUT .*out: lies inside DATA .*, so it would be read as data"),
        ({"data": "*.txt", "out": "torn"}, "OUT .*torn: its .lesa-ray/run.json is damaged"),
        ({"data": "blank.jsonl"}, "DATA .*blank.jsonl: is empty; there is not one document in it"),
        ({"data": "a.txt", "seq_len": 4096}, "gives .* tokens to train on, less than one row of 4096"),
        ({"data": "rows.jsonl", "text_column": "body"}, "rows.jsonl: line 1: there is no text in a column 'body'"),
        ({"data": "a.txt", "kind": "chat", "tokenizer": "chat"}, "a.txt: is of no kind that is read here"),
        ({"data": "rows.jsonl", "kind": "chat", "tokenizer": "chat"}, "line 1: has no conversation: expected"),
        ({"data": "mute.jsonl", "kind": "chat", "tokenizer": "chat"}, "has no conversation with an answer to train on"),
    ],
)
def test_wrong_input_ends_with_one_line_and_leaves_nothing(
    gpt2: str, qwen: str, tmp_path: Path, run: Callable[..., Tokenized], settings: dict[str, Any], message: str
) -> None:
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    (tmp_path / "torn/.lesa-ray").mkdir(parents=True)
    (tmp_path / "torn/.lesa-ray/run.json").touch()
    endless = styles.gpt2()
    endless.eos_token = None
    save(tmp_path / "endless", endless)
    (tmp_path / "a.txt").write_text(words(0, 300))
    (tmp_path / "blank.jsonl").write_text('\n{"text": ""}\n')
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 2000)
    (tmp_path / "mute.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    before = bytes_of(tmp_path)
    given = {"data": "a.txt", "tokenizer": gpt2, "out": "out", **settings}
    given["tokenizer"] = qwen if given["tokenizer"] == "chat" else given["tokenizer"]
    for key in ("data", "tokenizer", "out"):
        given[key] = str(tmp_path / given[key])
    with pytest.raises(UserError, match=message) as caught:
        run(**given)
    assert "\n" not in str(caught.value)
    assert bytes_of(tmp_path) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seq_len": 1}, "options: seq_len: Input should be greater than or equal to 2"),
        ({"holdout": 1}, "options: holdout: Input should be less than 1"),
        ({"data": []}, "DATA: missing; give it"),
        ({"kind": "speech"}, "options: kind: "),
        ({"limit": 0}, "options: limit: "),
        ({"sequence": 5}, "options: sequence: Extra inputs are not permitted"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        load_settings(TokenizeConfig, None, **{"data": ["a"], "tokenizer": "b", "out": "c", **given})


def test_documents_are_held_out_by_what_they_say(gpt2: str, tmp_path: Path, run: Callable[..., Tokenized]) -> None:
    texts = [f"{number} " + words(number, 30) for number in range(300)]
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    held = []
    for order in (texts, texts[::-1] + texts[:50]):
        file = tmp_path / f"{len(held)}.jsonl"
        file.write_text("\n".join(json.dumps({"text": text}) for text in order))
        blocks = run(file, gpt2, holdout=0.2, out=str(tmp_path / f"out{len(held)}")).blocks
        assert blocks.manifest["heldout_from_end"] == 0
        whole = tokenizer.decode(ids_of(blocks.heldout).ravel()).split("<|endoftext|>")[:-1]
        held.append(set(whole))
        other = tokenizer.decode(ids_of(blocks.train).ravel())
        assert not [text for text in whole if text in other]  # no copy on the other side
    assert 35 < len(held[0]) < 85
    assert len(held[0] ^ held[1]) <= 2  # the ends that fill no row


def test_few_documents_give_held_out_rows_from_the_end(
    gpt2: str, tmp_path: Path, run: Callable[..., Tokenized]
) -> None:
    text = words(0, 3000)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    blocks = run(tmp_path / "a.txt", gpt2).blocks
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    rows = max(1, round(len(ids) * 0.01 / SEQ))
    assert blocks.manifest["heldout_from_end"] == rows * SEQ
    assert ids_of(blocks.heldout).ravel().tolist() == ids[-rows * SEQ :]
    assert ids_of(blocks.train).ravel().tolist() == ids[: (len(ids) - rows * SEQ) // SEQ * SEQ]
    none = run(tmp_path / "a.txt", gpt2, holdout=0, out=str(tmp_path / "none")).blocks
    assert (none.heldout.rows, none.train.rows) == (0, len(ids) // SEQ)


def test_a_limit_takes_the_first_documents(
    corpus: tuple[str, list[str]], gpt2: str, run: Callable[..., Tokenized], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    folder, documents = corpus
    for limit in (3, 26, 40):  # 26: up to the empty file and the long document; 40: into the rows
        blocks = run(folder, gpt2, limit=limit, holdout=0, out=str(tmp_path / str(limit))).blocks
        expected = reference(tokenizer, documents[: limit - (limit > 25)], 0)  # the empty file counts
        np.testing.assert_array_equal(ids_of(blocks.train), expected["train"])


def test_conversations_fill_rows_whole(qwen: str, tmp_path: Path, run: Callable[..., Tokenized]) -> None:
    rows = chat_rows(300)
    long = [{"role": "user", "content": "add"}, {"role": "assistant", "content": words(1, 200)}]
    deaf = [{"role": "user", "content": words(1, 200)}, {"role": "assistant", "content": "left"}]
    odd = [{"messages": long}, {"messages": deaf}, {"messages": rows[0]["messages"][:1]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows[:200], *odd])))
    pq.write_table(pa.table({"messages": [row["messages"] for row in rows[200:]]}), tmp_path / "b.parquet")
    data = [tmp_path / "a.jsonl", tmp_path / "b.parquet"]
    blocks = run(data, qwen, kind="chat", holdout=0.1, seq_len=256).blocks
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    talks = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    found: list[str] = []
    for split in (blocks.train, blocks.heldout):
        columns = split.read(range(split.rows))
        for ids, labels, positions in zip(*(columns[c] for c in tokens.COLUMNS["chat"]), strict=True):
            starts = [*np.flatnonzero(positions == 0).tolist(), 256]
            for a, b in pairwise(starts):
                np.testing.assert_array_equal(positions[a:b], range(b - a))
                if (ids[a:b] == tokenizer.pad_token_id).all():
                    assert b == 256
                    assert (labels[a:b] == -100).all()
                    continue
                scored = labels[a:b] != -100
                np.testing.assert_array_equal(labels[a:b][scored], ids[a:b][scored])
                text = tokenizer.decode(ids[a:b])
                answers = text.split("<|im_start|>assistant\n")[1:]
                answers = [m.split("<|im_end|>")[0] + "<|im_end|>" * ("<|im_end|>" in m) for m in answers]
                assert tokenizer.decode(ids[a:b][scored]) == "".join(answers)
                found.append(text)
    cut = [text for text in found if text not in talks]
    assert [tokenizer.apply_chat_template(long, tokenize=False).startswith(text) for text in cut] == [True]
    assert sorted(text for text in found if text in talks) == sorted(talks)
    manifest = blocks.manifest
    assert (manifest["documents"], manifest["truncated"], manifest["left_out"]) == (303, 1, 2)
    assert blocks.heldout.rows > 1
    used = (blocks.train.tokens + blocks.heldout.tokens) / ((blocks.train.rows + blocks.heldout.rows) * 256)
    assert used > 0.9
    dropped = run(data, qwen, kind="chat", too_long="drop", seq_len=256, out=str(tmp_path / "drop")).blocks.manifest
    assert (dropped["truncated"], dropped["left_out"]) == (0, 3)


def test_few_conversations_give_held_out_ones_from_the_end(qwen: str, tmp_path: Path, run: Any) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, chat_rows(8))))
    blocks = run(tmp_path / "a.jsonl", qwen, kind="chat", holdout=1e-9, seq_len=256).blocks
    assert blocks.manifest["heldout_from_end"] == 1
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    text = tokenizer.apply_chat_template(chat_rows(8)[-1]["messages"], tokenize=False)
    assert tokenizer.decode(blocks.heldout.read([0])["input_ids"][0]).startswith(text)


def test_a_store_that_refuses_every_tenth_request(
    elsewhere: tuple[Path, dict[str, TokenizeConfig]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, configs = elsewhere
    monkeypatch.setattr(module, "_run_all", lambda job, work, items, *_: (work(job, item) for item in items))
    local = configs["text"].model_copy(update={"out": str(tmp_path / "local"), "limit": 12})
    remote = configs["s3"].model_copy(update={"out": configs["s3"].out + "-moody", "limit": 12})
    proxy = Moody(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server.server_port}")
    S3FileSystem.clear_instance_cache()
    proxy.refuses = lambda number: number % 10 == 0
    try:
        blocks, expected = tokenize(remote).blocks, tokenize(local).blocks
        np.testing.assert_array_equal(ids_of(blocks.train), ids_of(expected.train))
        assert blocks.digest == expected.digest
        assert proxy.refused > 5
    finally:
        proxy.stop()
        S3FileSystem.clear_instance_cache()
