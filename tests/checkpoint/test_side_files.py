"""What goes along with new weights, and what is of the old ones."""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from lesa_ray import Expanded
from lesa_ray.checkpoint.copying import PIECE
from lesa_ray.checkpoint.side_files import copy_side_files, side_files
from lesa_ray.checkpoint.storage import Storage


def test_weights_of_other_frameworks_stay_behind() -> None:
    kept = ["tokenizer.json", "chat_template.jinja", "modeling_x.py", "LICENSE", "tokenizer.model"]
    weights = ["rust_model.ot", "64.tflite", "model.onnx", "model.onnx_data", "m.nemo", "model.pdparams", "imatrix.dat"]
    assert side_files([*kept, *weights]) == kept


def test_what_was_true_of_the_old_weights_and_hidden_files_stay_behind() -> None:
    old = ["config.json", "README.md", "model.safetensors.index.json", "trainer_state.json", "eval_results.json"]
    assert side_files([*old, ".env", ".gitattributes", "generation_config.json"]) == ["generation_config.json"]


def test_templates_in_their_folder_go_along(
    bases: Callable[[str], str], grow: Callable[..., Expanded], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(bases("llama"), tmp_path / "base"))
    (base / "additional_chat_templates").mkdir()
    for name in ("tool_use.jinja", "notes.txt"):
        (base / "additional_chat_templates" / name).write_text(name)
    out = Path(grow(str(base), method="solar").out)
    copied = list((out / "additional_chat_templates").iterdir())
    assert [(file.name, file.read_text()) for file in copied] == [("tool_use.jinja", "tool_use.jinja")]


def copied(base: Path, out: Path) -> dict[str, str]:
    source = Storage(str(base))
    copy_side_files(source, Storage(str(out)), source.list())
    return {str(file.relative_to(out)): file.read_text() for file in out.rglob("*") if file.is_file()}


def test_links_out_of_a_checkpoint_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A repository can bring a link to any file of whoever clones it."""
    (tmp_path / "base-too").mkdir()
    for name in ("secret", "base-too/secret", "tool.jinja"):
        (tmp_path / name).write_text("secret")
    base = tmp_path / "base"
    (base / "more").mkdir(parents=True)
    (base / "more" / "licence").write_text("free")
    (base / "tokenizer.json").write_text("{}")
    (base / "empty.py").write_text("")
    (base / "additional_chat_templates").mkdir()
    for name, target in {
        "LICENSE": "more/licence",
        "key": "../secret",
        "absolute": str(tmp_path / "secret"),
        "beside": "../base-too/secret",
        "twice": "key",
        "additional_chat_templates/tool.jinja": "../../tool.jinja",
    }.items():
        (base / name).symlink_to(target)
    (tmp_path / "link").symlink_to("base")
    for number, place in enumerate((base, tmp_path / "link")):
        caplog.clear()
        found = copied(place, tmp_path / f"out-{number}")
        assert found == {"LICENSE": "free", "tokenizer.json": "{}", "empty.py": ""}
        assert sorted(line.split("'")[1] for line in caplog.messages) == [
            *("absolute", "additional_chat_templates/tool.jinja", "beside", "key", "twice")
        ]


def test_a_snapshot_of_the_hub_s_cache_is_links(tmp_path: Path) -> None:
    cache = tmp_path / "snapshots" / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / "0a1b").write_text("words")
    (cache / "blobs" / "0c1d").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("secret")
    for folder, blobs in (("snapshots/f00", "../../blobs"), ("snapshots/f00/small", "../../../blobs")):
        (cache / folder).mkdir(parents=True)
        for name, digest in (("tokenizer.json", "0a1b"), ("key", "0c1d")):
            (cache / folder / name).symlink_to(f"{blobs}/{digest}")
        assert copied(cache / folder, tmp_path / folder.replace("/", "-")) == {"tokenizer.json": "words"}


def test_a_folder_of_links_to_a_checkpoint_is_one(tmp_path: Path) -> None:
    """That lies in a folder, or in the hub's cache."""
    folder, cache = tmp_path / "models", tmp_path / "hub"
    (cache / "blobs").mkdir(parents=True)
    for place in (folder, cache / "snapshots"):
        place.mkdir()
        for number, name in enumerate(("config.json", "tokenizer.model", "key")):
            if place == folder:
                (place / name).write_text(name)
            else:
                (cache / "blobs" / str(number)).write_text(name)
                (place / name).symlink_to(f"../blobs/{number}")
        mine = tmp_path / f"links-to-{place.name}"
        mine.mkdir()
        for name in ("config.json", "tokenizer.model"):
            (mine / name).symlink_to(place / name)
        (mine / "licence").symlink_to(folder / "key")
        assert copied(mine, tmp_path / f"out-{place.name}") == {"tokenizer.model": "tokenizer.model"}


def test_what_git_annex_keeps_is_a_checkpoints(tmp_path: Path) -> None:
    base, kept = tmp_path / "repository" / "base", tmp_path / "repository" / ".git" / "annex" / "objects"
    for folder in (base, kept, tmp_path / "other" / ".git" / "annex" / "objects"):
        folder.mkdir(parents=True)
    for repository in ("repository", "other"):
        (tmp_path / repository / ".git/annex/objects/MD5-1").write_text(repository)
        (base / f"{repository}.model").symlink_to(f"../../{repository}/.git/annex/objects/MD5-1")
    assert copied(base, tmp_path / "out") == {"repository.model": "repository"}


def test_large_ones_are_not_held(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for number in range(2):
        with open(base / f"{number}.dat", "wb") as file:
            file.truncate(2 * PIECE)
    source = Storage(str(base))
    tracemalloc.start()
    copy_side_files(source, Storage(str(tmp_path / "out")), source.list())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < PIECE
