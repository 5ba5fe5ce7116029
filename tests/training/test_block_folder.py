"""What a folder of token blocks remembers of the work in it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import UserError
from lesa_ray.training import sources
from lesa_ray.training.block_folder import STOP, claim, out_state, prepare
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
