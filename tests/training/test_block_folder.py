"""What a folder of token blocks remembers of the work in it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import UserError
from lesa_ray.training import sources
from lesa_ray.training.block_folder import STOP, Run, abandon, check_out, claim, out_state, prepare
from lesa_ray.training.data_settings import TokenizeConfig
from tests.training import styles


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commit at which the hub's `main` is; one asked for by its name is that."""
    commits = ["first"]

    def info(self: object, name: str, revision: str | None = None) -> SimpleNamespace:
        assert name == "org/name"
        return SimpleNamespace(sha=commits[0] if revision in (None, "main") else revision)

    monkeypatch.setitem(sys.modules, "datasets", ModuleType("datasets"))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    monkeypatch.setattr(sources, "open_dataset", lambda *_: SimpleNamespace(num_shards=2))
    return commits


def test_a_dataset_is_given_at_one_revision(newest: list[str]) -> None:
    assert len(sources.find_sources(["org/name", "org/name@main"], None, "train")) == 1
    with pytest.raises(UserError, match="DATA org/name@v1: is given as org/name, too; give one revision of it"):
        sources.find_sources(["org/name", "org/name@v1"], None, "train")


@pytest.mark.parametrize("name", ["org/name", "org/name@main"])
def test_unfinished_work_goes_on_with_the_revision_it_began_with(name: str, newest: list[str], tmp_path: Path) -> None:
    styles.gpt2().save_pretrained(tmp_path / "tokenizer")
    config = TokenizeConfig(data=(name,), tokenizer=str(tmp_path / "tokenizer"), out=str(tmp_path / "out"))
    storage = Storage(config.out)
    claim(storage, prepare(config))
    newest[0] = "second"
    run = prepare(config)
    assert [source.mark for source in run.sources] == ["first"]
    assert out_state(storage, run) == "resume"
    storage.write(STOP, b"")  # a row of it is wrong
    leaving_out = config.model_copy(update={"bad_rows": "skip"})
    assert [source.mark for source in prepare(leaving_out).sources] == ["first"]
    run = prepare(config)
    assert [source.mark for source in run.sources] == ["second"]
    assert out_state(storage, run) == "resume"
    claim(storage, run)
    assert not storage.exists(STOP)  # with it every task would do nothing


def test_out_may_lie_beside_the_data_but_not_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("data")
    for data, out in [
        ("data", "data-out"),
        ("data/in", "data"),
        ("s3://b/data", "s3://b/data-out"),
        ("data", "s3://b"),
    ]:
        check_out(data, out)
    check_out("corpus/*.txt", "corpus/blocks")
    inside = [
        ("corpus/*", "corpus/blocks"),
        ("corpus/b*", "corpus/blocks/out"),
        ("data", "data"),
        ("data/", "data/out"),
        ("link", "data/out"),
        ("d/**/*.txt", "d/o"),
    ]
    for data, out in [*inside, ("s3://b/d/", "s3://b/d/o")]:
        with pytest.raises(UserError, match="lies inside DATA"):
            check_out(data, out)


def test_rows_are_filled_with_an_id_that_the_data_hold(tmp_path: Path) -> None:
    config = TokenizeConfig(data=("a",), tokenizer="b", out=str(tmp_path))
    run = Run(config, [], {}, 10, pads=(5, 3), unread={})
    for largest, pad in ((6, 5), (5, 5), (4, 3), (2, 3)):
        record: Any = {"largest_id": largest}
        assert run.pad([record]) == pad


def test_what_is_given_up_takes_nothing_of_others_with_it(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "out"))
    for name in ("notes.txt", "train/part-00000.parquet", "tokenizer/tokenizer.json", "sources.jsonl", STOP):
        storage.write(name, b"")
    abandon(storage)
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["notes.txt"]
    storage.remove("notes.txt")
    abandon(storage)
    assert not (tmp_path / "out").exists()
