"""What a folder of token blocks remembers of the work in it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.training import sources
from lesa_ray.training.block_folder import STOP, claim, out_state, prepare
from lesa_ray.training.data_settings import TokenizeConfig
from tests.training import styles


def test_unfinished_work_goes_on_with_the_revision_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = ["first"]
    monkeypatch.setitem(sys.modules, "datasets", ModuleType("datasets"))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name: SimpleNamespace(sha=newest[0]))
    monkeypatch.setattr(sources, "open_dataset", lambda *_: SimpleNamespace(num_shards=2))
    styles.gpt2().save_pretrained(tmp_path / "tokenizer")
    config = TokenizeConfig(data=("org/name",), tokenizer=str(tmp_path / "tokenizer"), out=str(tmp_path / "out"))
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
