"""A run says when it would begin with the rows that its checkpoint, or the base behind it, began with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec import AbstractFileSystem

from lesa_ray.training.lineage import replayed
from lesa_ray.training.run import Run, claim, prepare
from lesa_ray.training.train_settings import TrainConfig
from tests.training.blocks import make_blocks

Bases = Callable[[str], str]
Grow = Callable[..., Any]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_blocks(str(tmp_path_factory.mktemp("data") / "blocks"))


def run(checkpoint: str, data: str, out: Path, seed: int = 0) -> Run:
    given = {"checkpoint": checkpoint, "data": data, "out": str(out), "steps": 3, "batch": 2, "seed": seed}
    return prepare(TrainConfig.model_validate({**given, "train": "all"}), gpus=False)


def trained_on(base: str, data: str, folder: Path) -> str:
    """The base as a run on `data` with seed 0 leaves it, but for what it learnt."""
    folder.mkdir()
    for file in Path(base).iterdir():
        (folder / file.name).symlink_to(file)
    claim(run(base, data, folder))
    return str(folder)


def test_a_run_like_its_checkpoints_own_is_noticed(bases: Bases, data: str, tmp_path: Path) -> None:
    base = trained_on(bases("llama"), data, tmp_path / "base")
    line = replayed(run(base, data, tmp_path / "out"))
    assert line is not None
    assert f"{base} was trained on the same token blocks with the same seed" in line
    assert "the 6 rows" in line
    assert replayed(run(base, data, tmp_path / "out", seed=1)) is None
    other = make_blocks(str(tmp_path / "other"), rows=60)
    assert replayed(run(base, other, tmp_path / "out")) is None
    assert replayed(run(bases("llama"), data, tmp_path / "out")) is None


def test_so_is_one_behind_an_expansion_and_further_training(
    bases: Bases, grow: Grow, data: str, tmp_path: Path
) -> None:
    base = trained_on(bases("llama"), data, tmp_path / "base")
    deeper = grow(base, method="llama-pro", out=str(tmp_path / "deeper")).out
    line = replayed(run(deeper, data, tmp_path / "out"))
    assert line is not None
    assert f"{base} was trained" in line
    on = tmp_path / "on"
    on.mkdir()
    for file in Path(deeper).iterdir():
        (on / file.name).symlink_to(file)
    claim(run(deeper, data, on, seed=7))
    assert replayed(run(str(on), data, tmp_path / "out", seed=7)) is not None
    line = replayed(run(str(on), data, tmp_path / "out"))
    assert line is not None
    assert f"{base} was trained" in line


class Asked(AbstractFileSystem):
    """Notes what is asked of it."""

    protocol = "lineage-asked"
    names: ClassVar[list[str]] = []

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self.names.append(path)
        raise FileNotFoundError(path)


@pytest.mark.parametrize("behind", ["lineage-asked://host/base", "s3://bucket::lineage-asked://host/base", 3])
def test_an_address_of_any_kind_is_not_followed(
    behind: object, bases: Bases, grow: Grow, data: str, tmp_path: Path
) -> None:
    fsspec.register_implementation("lineage-asked", Asked, clobber=True)
    deeper = grow(bases("llama"), method="llama-pro", out=str(tmp_path / "deeper")).out
    manifest = Path(deeper, "expansion.json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "base": behind}))
    assert replayed(run(deeper, data, tmp_path / "out")) is None
    assert not Asked.names
