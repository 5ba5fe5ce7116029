"""Token blocks made in this process, a piece after another: what is finished stays good when rows are wrong, files are
mended and work goes on; which ids there are."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import LlamaConfig, PreTrainedTokenizerFast

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.distributed import finetune as tune
from lesa_ray.distributed import tokenize as module
from lesa_ray.distributed.tokenize import Tokenized, tokenize
from lesa_ray.errors import KeptError, UserError
from lesa_ray.expansion.runner import Silent
from lesa_ray.report.data import describe_tokens, token_lines
from lesa_ray.training import layout, sources, tokens
from lesa_ray.training.block_folder import BEGUN, made_with
from lesa_ray.training.data_settings import TokenizeConfig
from lesa_ray.training.run import check_data
from lesa_ray.training.tokens import open_blocks
from lesa_ray.training.train_settings import FinetuneConfig
from tests import families
from tests.distributed.test_tokenize import GROUP_TOKENS, PIECE, SEQ, Stop, bytes_of, chat_rows, save, words
from tests.training import styles

Run = Callable[..., Tokenized]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The files of each piece that is tokenised, from now on."""
    tokenised: list[list[str]] = []

    def one_by_one(job: Any, work: Callable[..., Any], items: Sequence[Any], *_: Any) -> Iterator[Any]:
        for item in items:
            if isinstance(item, sources.Piece):
                tokenised.append([part.source.name.rsplit("/", 1)[-1] for part in item.parts])
            yield work(job, item)

    monkeypatch.setattr(module, "_run_all", one_by_one)
    monkeypatch.setattr(module, "start_ray", lambda: None)
    return tokenised


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[list[str]]) -> Run:
    """`tokenize` into `tmp_path / "out"`, or where `out` says, in small units."""
    monkeypatch.setattr(tokens, "GROUP_TOKENS", GROUP_TOKENS)
    monkeypatch.setattr(layout, "GROUPS_PER_FILE", 1)
    monkeypatch.setattr(sources, "PIECE_BYTES", PIECE)

    def call(data: Path | list[str], tokenizer: str, listener: Any = None, **settings: Any) -> Tokenized:
        given = {
            "data": data if isinstance(data, list) else [str(data)],
            "tokenizer": tokenizer,
            "out": str(tmp_path / "out"),
            "seq_len": SEQ,
        }
        return tokenize(TokenizeConfig.model_validate({**given, **settings}), listener)

    return call


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("gpt2"), styles.gpt2())


def lines_of(folder: Path, **wrong: str) -> None:
    """Files a, b and c of rows, a piece each, the third line of some of them wrong."""
    folder.mkdir(exist_ok=True)
    for number, name in enumerate("abc"):
        lines = [json.dumps({"text": words(number * 100 + row, 40)}) for row in range(15)]
        if name in wrong:
            lines[2] = wrong[name]
        path = folder / f"{name}.jsonl"
        if not path.exists() or path.read_text() != "\n".join(lines):
            path.write_text("\n".join(lines))


def test_another_tokenizer_at_the_same_place_is_another(gpt2: str, tmp_path: Path, run: Run) -> None:
    data, tokenizer = tmp_path / "data", Path(shutil.copytree(gpt2, tmp_path / "tokenizer"))
    lines_of(data)
    run(data, str(tokenizer))
    assert run(data, str(tokenizer)).reused
    file = tokenizer / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "clean_up_tokenization_spaces": True}, indent=7))
    with pytest.raises(UserError, match=r"holds token blocks of other data or settings"):
        run(data, str(tokenizer))


def test_nothing_half_written_lies_in_what_is_done(
    gpt2: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    lines_of(data)
    left = [out / ".sources.jsonl.0123abcd.tmp", out / "train/.0.arrow.0123abcd.tmp"]
    remove = Storage.remove_tree

    def killed(storage: Storage, name: str = "") -> None:
        if (out / "manifest.json").exists():
            raise KeyboardInterrupt
        remove(storage, name)

    class Meanwhile(Silent):
        def progress(self, done: float, detail: str) -> None:
            if (out / "train").exists():
                for file in left:
                    file.touch()

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "remove_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            run(data, gpt2, Meanwhile())
    assert (out / ".lesa-ray").exists()
    assert run(data, gpt2).reused
    assert not list(out.rglob(".*"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ('{"text": broken', "c.jsonl: line 3 is not JSON"),
        ("[1]", "c.jsonl: line 3 is not a JSON object of columns"),
        ('{"body": "a"}', "c.jsonl: line 3: there is no text in a column 'text'"),
    ],
)
def test_a_wrong_row_does_not_cost_what_is_finished(
    read: list[list[str]], gpt2: str, tmp_path: Path, run: Run, wrong: str, said: str
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    lines_of(data, c=wrong)
    for tried in (3, 1):
        with pytest.raises(KeptError, match=f"{said}.*with --bad-rows skip; what is finished stays .*: 2") as found:
            run(data, gpt2, holdout=0.1)
        assert "\n" not in str(found.value)
        assert not (out / "manifest.json").exists()
        assert len(read) == tried
        read.clear()

    shutil.copytree(out, tmp_path / "mended")
    left_out = run(data, gpt2, holdout=0.1, bad_rows="skip").blocks
    assert read == [["c.jsonl"]]
    assert (left_out.manifest["bad_rows"], left_out.manifest["documents"]) == (1, 44)
    (first,) = left_out.manifest["first_bad_rows"]
    assert said in first
    assert run(data, gpt2, holdout=0.1, bad_rows="skip").reused
    with pytest.raises(UserError, match=r"holds token blocks without the rows of the data that are wrong \(1\)"):
        run(data, gpt2, holdout=0.1)
    rest = (data / "c.jsonl").read_text().replace(wrong + "\n", "")
    lines_of(tmp_path / "without")
    (tmp_path / "without/c.jsonl").write_text(rest)
    assert run(tmp_path / "without", gpt2, holdout=0.1, out=str(tmp_path / "o")).blocks.digest == left_out.digest

    read.clear()
    lines_of(data)
    mended = run(data, gpt2, holdout=0.1, out=str(tmp_path / "mended"))
    assert read == [["c.jsonl"]]
    assert mended.resumed
    whole = run(data, gpt2, holdout=0.1, out=str(tmp_path / "whole"))
    assert bytes_of(mended.blocks.url) == bytes_of(whole.blocks.url)


class Guarded(SimpleHTTPRequestHandler):
    """Serves a folder to who has the password, and one of two signatures."""

    def send_head(self) -> Any:
        signed = urlsplit(self.path).query in ("part=1&X-Amz-Signature=FIRST", "part=1&X-Amz-Signature=SECOND")
        if signed and self.headers.get("Authorization") == f"Basic {b64encode(b'bob:hunter2').decode()}":
            return super().send_head()
        self.send_error(403)
        return None

    def log_message(self, *content: object) -> None: ...


def told(said: str, folder: Path) -> list[str]:
    """What is said, or written into files, with what lets `Guarded` be read."""
    written = [said, *(file.read_bytes().decode(errors="replace") for file in folder.rglob("*") if file.is_file())]
    return [text for text in written if any(word in text for word in ("hunter2", "FIRST", "SECOND"))]


def test_what_reads_a_url_is_in_no_file_and_may_change(
    read: list[list[str]], gpt2: str, tmp_path: Path, run: Run
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    lines_of(data, c="no")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Guarded, directory=str(data))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def urls(signature: str, part: int = 1) -> list[str]:
            at = f"bob:hunter2@127.0.0.1:{server.server_port}"
            return [f"http://{at}/{name}.jsonl?part={part}&X-Amz-Signature={signature}" for name in "abc"]

        with pytest.raises(KeptError, match=r"DATA http://127[^?@]*/c\.jsonl: line 3 is not JSON") as found:
            run(urls("FIRST"), gpt2)
        assert len(read) == 3
        read.clear()
        assert not told(str(found.value), out)
        result = run(urls("SECOND"), gpt2, bad_rows="skip")
        assert result.resumed
        assert [len(names) for names in read] == [1]
        assert run(urls("FIRST"), gpt2, bad_rows="skip").reused
        with pytest.raises(UserError, match=r"a\.jsonl: is given twice, signed in two ways"):
            run([*urls("FIRST"), *urls("SECOND")], gpt2, out=str(tmp_path / "twice"))
        server.shutdown()
    for part, same in ((1, True), (2, False)):
        asked = TokenizeConfig.model_validate(
            {**result.blocks.manifest["settings"], "data": urls("SECOND", part), "out": str(out)}
        )
        assert made_with(result.blocks.manifest, asked) is same
    place = f"http://127.0.0.1:{server.server_port}"
    assert result.blocks.manifest["settings"]["data"] == [f"{place}/{name}.jsonl" for name in "abc"]
    assert result.blocks.manifest["first_bad_rows"][0].startswith(f"{place}/c.jsonl: line 3 is not JSON")
    assert not told("", out)


def test_what_was_left_out_is_looked_at_again_where_that_is_not_wanted(
    read: list[list[str]], gpt2: str, tmp_path: Path, run: Run
) -> None:
    lines_of(tmp_path / "data", a="no", b="no", c="no")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "data", gpt2, Stop("tokenising", 1), bad_rows="skip")
    with pytest.raises(KeptError, match=r"a.jsonl: line 3 is not JSON"):
        run(tmp_path / "data", gpt2)
    result = run(tmp_path / "data", gpt2, bad_rows="skip")
    assert read == [["a.jsonl"], ["b.jsonl"], ["a.jsonl"], ["c.jsonl"]]
    assert describe_tokens(result)["bad_rows"] == 3
    assert "3 rows left out, as they are wrong; the first:" in token_lines(result)
    assert [name in token_lines(result) for name in ("a.jsonl: line 3", "c.jsonl: line 3")] == [True, True]


def test_files_of_rows_are_written_again_when_the_data_changed(
    read: list[list[str]], gpt2: str, tmp_path: Path, run: Run
) -> None:
    data = tmp_path / "data"
    lines_of(data)
    with pytest.raises(KeyboardInterrupt):
        run(data, gpt2, Stop("writing rows", 3))
    rows = (data / "a.jsonl").read_text().splitlines()
    (data / "a.jsonl").write_text("\n".join(rows[:2]))
    (data / "c.jsonl").unlink()
    result = run(data, gpt2)
    assert result.resumed
    assert bytes_of(result.blocks.url) == bytes_of(run(data, gpt2, out=str(tmp_path / "whole")).blocks.url)


def test_files_of_rows_are_written_again_when_the_data_are_what_they_were_before(
    read: list[list[str]], gpt2: str, tmp_path: Path, run: Run
) -> None:
    """A file that strayed into the folder, and out again."""
    data, stray = tmp_path / "data", tmp_path / "data" / "0.jsonl"
    lines_of(data)
    for strays in (False, True):
        if strays:
            stray.write_text("\n".join((data / "a.jsonl").read_text().splitlines()[:2]))
        with pytest.raises(KeyboardInterrupt):
            run(data, gpt2, Stop("writing rows", 3))
    stray.unlink()
    result = run(data, gpt2)
    assert bytes_of(result.blocks.url) == bytes_of(run(data, gpt2, out=str(tmp_path / "whole")).blocks.url)


def test_conversations_that_a_template_refuses_can_be_left_out(read: list[list[str]], tmp_path: Path, run: Run) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + styles.CHATML
    name = save(tmp_path / "strict", styles.qwen(strict))
    rows = chat_rows(20)
    wrong = [{"messages": [{"role": "system", "content": "be kind"}, *rows[0]["messages"]]}, {"messages": "hello"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows[:10], *wrong, *rows[10:]])))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"line 11: the chat template does not take it .*no system.*--bad-rows skip"):
        run(tmp_path / "a.jsonl", name, kind="chat")
    assert not (tmp_path / "out").exists()
    blocks = run(tmp_path / "a.jsonl", name, kind="chat", bad_rows="skip", seq_len=256).blocks
    assert (blocks.manifest["documents"], blocks.manifest["bad_rows"], blocks.manifest["left_out"]) == (20, 2, 0)
    assert [message.split(": ")[1] for message in blocks.manifest["first_bad_rows"]] == ["line 11", "line 12"]
    plain = run(tmp_path / "b.jsonl", name, kind="chat", seq_len=256, out=str(tmp_path / "plain")).blocks
    assert blocks.digest == plain.digest


def test_a_fine_tuning_run_keeps_what_is_finished_too(
    run: Run, read: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(tune, "pretrain", lambda config, *_, **__: None)
    base = families.make("llama", tmp_path / "base", layers=2, vocab_size=400)
    styles.qwen(styles.CHATML).save_pretrained(base)
    (tmp_path / "data").mkdir()
    rows = list(map(json.dumps, chat_rows(20)))
    for name, lines in (("a", rows), ("b", [*rows, "no"])):
        (tmp_path / f"data/{name}.jsonl").write_text("\n".join(lines))
    config = FinetuneConfig(checkpoint=base, data=str(tmp_path / "data"), out=str(tmp_path / "tuned"), seq_len=64)
    with pytest.raises(KeptError, match=r"b.jsonl: line 21 is not JSON"):
        tune.finetune(config)
    read.clear()
    tune.finetune(config.model_copy(update={"bad_rows": "skip"}))
    assert read == [["b.jsonl"]]
    assert "1 rows left out, as they are wrong; the first: " in caplog.text


def test_data_of_which_every_row_is_wrong(read: list[list[str]], gpt2: str, tmp_path: Path, run: Run) -> None:
    (tmp_path / "a.jsonl").write_text("no\n" * 3)
    with pytest.raises(UserError, match=r"each of its 3 rows is wrong; the first: .*a.jsonl: line 1 is not JSON"):
        run(tmp_path / "a.jsonl", gpt2, bad_rows="skip")
    assert not (tmp_path / "out").exists()


def with_more_tokens(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose last ids the data need not hold: a token for pictures, one for padding, one to end turns."""
    tokenizer = styles.qwen(template)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<picture>", "<turn_end>"]})
    return tokenizer


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_what_counts_of_a_tokenizer_is_which_of_its_ids_the_data_hold(run: Run, tmp_path: Path, kind: str) -> None:
    name = save(tmp_path / "more", with_more_tokens(styles.CHATML))
    size = len(styles.qwen())
    rows = chat_rows(60) if kind == "chat" else [{"text": words(number, 50)} for number in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    blocks = run(tmp_path / "a.jsonl", name, kind=kind, holdout=0.1, seq_len=128).blocks
    largest = max(int(split.read(range(split.rows))["input_ids"].max()) for split in (blocks.train, blocks.heldout))
    assert blocks.vocab_size == size + 3
    assert blocks.largest_id == largest < size
    check_data(blocks, {}, LlamaConfig(vocab_size=largest + 1), "checkpoint a")
    just = LlamaConfig(vocab_size=largest + 1, max_position_embeddings=blocks.seq_len)
    check_data(blocks, {}, just, "checkpoint a")
    with pytest.raises(UserError, match=f"its tokens go up to {largest}, the vocabulary of checkpoint a has {largest}"):
        check_data(blocks, {}, LlamaConfig(vocab_size=largest), "checkpoint a")
    if kind == "chat":  # rows are filled with what is surely in the vocabulary
        columns = blocks.train.read(range(blocks.train.rows))
        filled = columns["input_ids"][:, -1][columns["labels"][:, -1] == tokens.UNSCORED]
        assert styles.qwen().eos_token_id in filled
    (tmp_path / "out/manifest.json").write_text(
        json.dumps({name: value for name, value in blocks.manifest.items() if name != "largest_id"})
    )
    assert open_blocks(blocks.url).largest_id == size + 2  # where it was not noted


def test_an_id_that_only_stands_in_questions_counts_too(run: Run, tmp_path: Path) -> None:
    name = save(tmp_path / "chatml", styles.qwen(styles.CHATML))
    talk = [{"role": "user", "content": words(0, 40)}, {"role": "assistant", "content": "a"}]
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps({"messages": talk})] * 3))
    blocks = run(tmp_path / "a.jsonl", name, kind="chat", holdout=0, seq_len=256).blocks
    columns = blocks.train.read(range(blocks.train.rows))
    assert blocks.largest_id == columns["input_ids"].max() > columns["labels"].max()


def test_a_limit_of_conversations_is_counted_in_columns_too(run: Run, tmp_path: Path) -> None:
    name = save(tmp_path / "chatml", styles.qwen(styles.CHATML))
    pq.write_table(pa.Table.from_pylist(chat_rows(20)), tmp_path / "a.parquet", row_group_size=2)
    assert run(tmp_path / "a.parquet", name, kind="chat", limit=7, seq_len=256).blocks.manifest["documents"] == 7


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_the_digest_of_a_source_is_that_of_its_documents(run: Run, tmp_path: Path, kind: str) -> None:
    name = save(tmp_path / "chatml", styles.qwen(styles.CHATML))
    rows = chat_rows(20) if kind == "chat" else [{"text": words(number, 40)} for number in range(20)]
    other = [*rows[1:], rows[0]]
    digests = []
    for number, (file, lines) in enumerate([("a", rows), ("b", rows), ("b", other)]):
        path = tmp_path / f"{number}" / f"{file}.jsonl"
        path.parent.mkdir()
        path.write_text("\n".join(map(json.dumps, lines)))
        out = str(tmp_path / f"out{number}")
        (source,) = run(path, name, kind=kind, seq_len=256, out=out).blocks.manifest["sources"]
        digests.append(source["digest"])
    assert digests[0] == digests[1] != digests[2]


def test_an_id_that_only_fills_rows_counts_too(run: Run, tmp_path: Path) -> None:
    """Neither token that could fill them is in the data."""
    tokenizer = styles.qwen(styles.CHATML)
    tokenizer.add_special_tokens({"eos_token": "<end>", "pad_token": "<pad>"})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, chat_rows(20))))
    blocks = run(tmp_path / "a.jsonl", save(tmp_path / "more", tokenizer), kind="chat", seq_len=128).blocks
    held = blocks.train.read(range(blocks.train.rows))["input_ids"]
    assert blocks.largest_id == held.max() == tokenizer.eos_token_id >= len(styles.qwen())


def test_a_model_need_not_hold_all_tokens_of_its_tokenizer_but_that_which_ends_answers(tmp_path: Path) -> None:
    base = families.make("llama", tmp_path / "base", layers=2, vocab_size=len(styles.qwen()))
    with_more_tokens(styles.CHATML).save_pretrained(base)
    config = FinetuneConfig(checkpoint=base, data="a", out="b", seq_len=64)
    tune._check_model(config)
    with_more_tokens(styles.CHATML.replace("<|im_end|>", "<turn_end>")).save_pretrained(base)
    with pytest.raises(UserError, match=r"the token that ends an answer is 321, the vocabulary of .* has 319; give"):
        tune._check_model(config)


def test_telling_of_a_piece_does_not_look_at_all_before_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    many, looked, told = 300, [0], []

    class Record(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            looked[0] += key == "tokens"
            return super().__getitem__(key)

    class Told(Stop):
        def progress(self, done: float, detail: str) -> None:
            told.append(detail)

    dealt = [sources.Piece((sources.Part(sources.Source(f"{number}.txt", 1, "")),)) for number in range(many)]
    records = [
        Record(key=piece.key, tokens={"train": number, "heldout": 1}, counts={"bad_rows": 0})
        for number, piece in enumerate(dealt)
    ]
    monkeypatch.setattr(module, "_run_all", lambda *_: iter(records))
    job = module.Job(TokenizeConfig(data=("a",), tokenizer="b", out=str(tmp_path / "out")), "", 1, 1)
    assert module._tokenise(job, dealt, (), Told("", 0)) == records
    assert (told[0], told[9], len(told)) == ("1 tokens", "55 tokens", many)
    assert looked[0] <= 2 * many


def test_a_file_may_have_a_name_that_is_no_utf8(run: Run, gpt2: str, tmp_path: Path) -> None:
    """As those that came out of an old archive."""
    folder = tmp_path / "data"
    folder.mkdir()
    names = sorted(os.fsdecode(name) for name in (b"caf\xe9.txt", b"plain.txt"))
    for name in names:
        (folder / name).write_text(words(len(name), 400))
    (folder / os.fsdecode(b"of.caf\xe9")).touch()
    result = run(folder, gpt2)
    assert result.blocks.manifest["unread_files"] == {os.fsdecode(b".caf\xe9"): 1}
    lines = (tmp_path / "out" / "sources.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(Path(json.loads(line)["name"]).name for line in lines) == names
    assert token_lines(result)


def test_a_task_that_begins_says_so(tmp_path: Path) -> None:
    """Until one has, all are taken to wait for room."""
    job: Any = SimpleNamespace(config=SimpleNamespace(out=str(tmp_path)))
    storage = Storage(str(tmp_path))
    found = module._do({"item": pickle.dumps("x")}, lambda *_: storage.exists(BEGUN), job, ())
    assert pickle.loads(found["result"]) == ("done", True)
