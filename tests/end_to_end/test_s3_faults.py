"""An S3 server that answers 503 or half an answer now and then, or is away. Nothing is lost, the result is the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem

from lesa_ray import ExpandConfig, MachineError, UserError, expand
from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.config import read_yaml
from lesa_ray.distributed.export import export_checkpoint
from lesa_ray.distributed.finetune import finetune
from lesa_ray.distributed.report_file import try_place
from lesa_ray.evaluation.texts import find_files
from lesa_ray.expansion.out import out_state
from lesa_ray.expansion.prepare import prepare
from lesa_ray.expansion.runner import InlineRunner
from lesa_ray.layerwise.folder import write_folder
from lesa_ray.report.page.build import write_report
from lesa_ray.training.run import read_architecture, use_bf16
from lesa_ray.training.sources import find_sources
from lesa_ray.training.train_settings import FinetuneConfig, TrainConfig
from tests.moody import Moody

DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
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


@pytest.mark.parametrize("shut", ["config.json", "model.safetensors.index.json", ".safetensors"])
def test_a_base_that_may_be_listed_but_not_read(shut: str, s3: str, moody: Moody, bases: Bases) -> None:
    storage = Storage(f"{s3}/moody/gated")
    for file in Path(bases("llama")).iterdir():
        storage.write(file.name, file.read_bytes())
    moody.answers = lambda request, headers: (403, DENIED) if request.partition("?")[0].endswith(shut) else None
    with pytest.raises(UserError, match=rf"^checkpoint x: \S*{shut} cannot be read \(PermissionError.*credentials"):
        open_checkpoint(storage.url, "checkpoint x")


def first_contacts(bases: Bases, url: str, tmp_path: Path) -> dict[str, Callable[[], Any]]:
    """What each command does first with a place, by what it has to call it."""
    expand_config = ExpandConfig(base=bases("llama"), out=url, method="solar")
    tuning = {"checkpoint": bases("llama"), "out": str(tmp_path / "tuned")}
    training = TrainConfig(checkpoint=bases("llama"), data="none", out=url)
    return {
        f"OUT {url}": lambda: out_state(prepare(expand_config)),
        f"OUT {url}:": lambda: use_bf16(training, gpus=False),
        f"architecture {url}": lambda: read_architecture(TrainConfig(architecture=url, data="none", out="none")),
        f"data {url}": lambda: finetune(FinetuneConfig(**tuning, data=url)),
        f"RUN {url}": lambda: export_checkpoint(url, str(tmp_path / "exported"), "last"),
        f"RUN {url}:": lambda: write_report([url], str(tmp_path / "report")),
        f"OUT {url}: ": lambda: write_folder(url, {"model_type": "llama"}),
        f"DATA {url}": lambda: find_sources([url], None, "train"),
        f"--data {url}": lambda: find_files([url]),
        f"config {url}/a.yaml": lambda: read_yaml(f"{url}/a.yaml"),
        f"--out {url}": lambda: try_place(url, url),
    }


def test_a_place_that_is_shut_or_away(
    s3: str, moody: Moody, bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    contacts = first_contacts(bases, f"{s3}/moody/shut", tmp_path)
    moody.answers = lambda request, headers: (403, DENIED)
    for where, contact in contacts.items():
        with pytest.raises(UserError, match=f"^{where}.*PermissionError.*; check the address and the credentials"):
            contact()
    moody.refuses = lambda number: True
    for contact in contacts.values():
        with pytest.raises(MachineError, match="the store does not answer"):
            contact()
    moody.stop()
    S3FileSystem.clear_instance_cache()
    for contact in contacts.values():
        with pytest.raises(MachineError, match="the store does not answer"):
            contact()
    assert not list(tmp_path.iterdir())
