"""An S3 server that answers 503 or half an answer now and then, or is away. Nothing is lost, the result is the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from lesa_ray import ExpandConfig, MachineError, expand
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.expansion.runner import InlineRunner
from tests.moody import Moody

Bases = Callable[[str], str]


@pytest.fixture
def moody(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Moody]:
    proxy = Moody(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's own retries wait for minutes; s3fs's are left
    S3FileSystem.clear_instance_cache()
    yield proxy
    S3FileSystem.clear_instance_cache()
    proxy.stop()


@pytest.mark.parametrize("mood", ["refuses", "cuts"])
def test_a_store_that_fails_now_and_then(
    mood: str, s3: str, moody: Moody, bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "4")
    storage = Storage(f"{s3}/moody/base-{mood}")
    for file in Path(bases("llama")).iterdir():
        storage.write(file.name, file.read_bytes())
    setattr(moody, mood, lambda number: number % 7 == 0)
    out = f"{s3}/moody/out-{mood}"
    result = expand(ExpandConfig(base=storage.url, out=out, method="avg-deus"), runner=InlineRunner())
    assert moody.refused + moody.cut > 5
    setattr(moody, mood, lambda number: False)
    assert not result.resumed
    expand(ExpandConfig(base=bases("llama"), out=str(tmp_path / "local"), method="avg-deus"), runner=InlineRunner())
    for file in (tmp_path / "local").glob("model*"):
        assert Storage(out).read(file.name) == file.read_bytes()


def test_a_store_that_goes_away_in_the_middle(s3: str, moody: Moody, bases: Bases, tmp_path: Path) -> None:
    config = ExpandConfig(base=bases("llama"), out=f"{s3}/moody/outage", method="avg-deus")
    moody.refuses = lambda number: number > 40
    with pytest.raises(MachineError, match="the same command goes on from here"):
        expand(config, runner=InlineRunner())
    moody.refuses = lambda number: False
    left = Storage(config.out)
    assert left.exists(".lesa-ray/run.json")
    assert not left.exists("config.json")
    assert expand(config, runner=InlineRunner()).resumed
    expand(ExpandConfig(base=bases("llama"), out=str(tmp_path / "local"), method="avg-deus"), runner=InlineRunner())
    assert left.list().keys() == {f.name for f in (tmp_path / "local").iterdir()}
    for file in (tmp_path / "local").glob("model*"):
        assert left.read(file.name) == file.read_bytes()


def test_a_base_whose_store_is_away(s3: str, moody: Moody, bases: Bases, tmp_path: Path) -> None:
    storage = Storage(f"{s3}/moody/base-away")
    for file in Path(bases("llama")).iterdir():
        storage.write(file.name, file.read_bytes())
    start = moody.seen
    for after in (0, 3):  # at the listing, at the headers
        moody.seen = start
        moody.refuses = lambda number, after=after: number > start + after  # type: ignore[misc]
        with pytest.raises(MachineError, match="the store does not answer"):
            expand(ExpandConfig(base=storage.url, out=str(tmp_path / "out"), method="solar"), runner=InlineRunner())
        assert not (tmp_path / "out" / "config.json").exists()
    moody.stop()
    S3FileSystem.clear_instance_cache()
    with pytest.raises(MachineError, match="the store does not answer"):
        expand(ExpandConfig(base=storage.url, out=str(tmp_path / "out"), method="solar"), runner=InlineRunner())
