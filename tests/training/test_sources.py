"""Which files and datasets are read, and how they are dealt out."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionNotFoundError

from lesa_ray.errors import UserError
from lesa_ray.evaluation.texts import find_files
from lesa_ray.training.documents import cut
from lesa_ray.training.sources import ROWS, Part, Piece, Source, count_endings, deal, find_sources
from tests.training.data_sources import NO_DATASET, find, read

pytestmark = pytest.mark.timeout(180)


def test_linked_folders_are_read_once_each(tmp_path: Path) -> None:
    """By training and by evaluation alike; in a loop, to a folder that is here anyway, twice to one, hidden."""
    for name in ("data/own", "data/.hidden", "far/deep", "farther", "secret"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("data/own/1", "data/.hidden/2", "far/3", "far/deep/4", "farther/5", "secret/6"):
        (tmp_path / f"{name}.txt").write_text(name)
    for name, target in (
        ("data/a", "data/own"), ("data/b", "far"), ("data/c", "far"), ("data/own/up", "data"), ("data/.no", "secret"),
        ("far/deep/on", "farther"), ("farther/back", "far"), ("data/gone", "nowhere"),
    ):  # fmt: skip
        (tmp_path / name).symlink_to(tmp_path / target)
    expected = [f"data/{name}.txt" for name in ("b/3", "b/deep/4", "b/deep/on/5", "own/1")]
    (tmp_path / "data/b/deep").joinpath("z.txt").symlink_to(tmp_path / "secret/6.txt")
    expected.insert(3, "data/b/deep/z.txt")
    assert [source.name for source in find(tmp_path / "data")] == [str(tmp_path / name) for name in expected]
    files = find_files([str(tmp_path / "data")])
    assert [(file.name, file.nbytes) for file in files] == [(s.name, s.nbytes) for s in find(tmp_path / "data")]
    (tmp_path / "data/own/out").symlink_to(tmp_path)  # what lies beside the data is none
    assert [source.name for source in find(tmp_path / "data")] == [str(tmp_path / name) for name in expected]
    (tmp_path / "data/gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"gone\.txt is a link that leads nowhere"):
        find(tmp_path / "data")
    (tmp_path / "data/gone.txt").unlink()
    assert read(tmp_path / "data") == ["far/3", "far/deep/4", "farther/5", "secret/6", "data/own/1"]


def test_sources_are_found_once_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/y.parquet", "c.csv", ".git/d.txt", "a/.e.txt", "f.jsonl.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = [source.name.removeprefix(f"{tmp_path}/") for source in find(tmp_path / "f.jsonl.gz", tmp_path)]
    assert names == ["f.jsonl.gz", "a/y.parquet", "a/z.md", "b.txt"]
    assert [source.name for source in find(tmp_path / "*.txt")] == [str(tmp_path / "b.txt")]
    assert {source.given for source in find(tmp_path)} == {str(tmp_path)}


def test_what_is_about_a_data_set_is_no_part_of_it(tmp_path: Path) -> None:
    names = ["README.md", "LICENSE", "license.txt", "data/a.jsonl", "data/b.json.bz2", "data/c.csv", "data/d.csv",
             "code.py", "more.txt", "books/Readme.md", "books/e.txt", ".git/f.txt"]  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    unread: set[str] = set()
    found = find_sources([str(tmp_path)], *NO_DATASET, unread=unread)
    assert [source.name.removeprefix(f"{tmp_path}/") for source in found] == [
        "books/Readme.md", "books/e.txt", "code.py", "data/a.jsonl", "more.txt",
    ]  # fmt: skip
    assert count_endings(unread) == {".csv": 2, ".json.bz2": 1, "": 1, ".md": 1, ".txt": 1}
    unread.clear()
    named = [str(tmp_path), str(tmp_path / "README.md")]
    found = find_sources(named, *NO_DATASET, unread=unread)
    assert found[-1].name == str(tmp_path / "README.md")
    assert sum(count_endings(unread).values()) == 5
    unread.clear()
    (source,) = find_sources([str(tmp_path)], *NO_DATASET, ROWS, unread)
    assert source.name == str(tmp_path / "data/a.jsonl")
    assert sum(count_endings(unread).values()) == 10
    with pytest.raises(UserError, match=r"more\.txt: is of no kind that is read here \(\.jsonl, "):
        find_sources([str(tmp_path / "more.txt")], *NO_DATASET, ROWS)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("")
    for name, message in [
        (str(tmp_path / "no.txt"), "there is no such file or folder"),
        (str(tmp_path / "no"), "there is no such file or folder"),
        (str(tmp_path / "*.txt"), "no data found"),
        (str(tmp_path / "empty"), "no data found; expected files that end with .txt"),
        (str(tmp_path / "a.csv"), "is of no kind that is read here"),
        ("no.jsonl", "there is no such file or folder"),
        ("nowhere://x", "nowhere"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            find(name)
        assert str(caught.value).startswith(f"DATA {name}: ")
        assert "\n" not in str(caught.value)


def test_pieces_hold_small_files_together_and_part_large_ones() -> None:
    sources = [Source(f"{number}.txt", size, "") for number, size in enumerate([4, 4, 4, 25, 1, 0, 9])]
    pieces = deal([*sources, Source("a.jsonl.gz", 99, ""), Source("a/b", 0, "main", shards=2)], piece_bytes=10)
    assert [[(p.source.name, p.index, p.count) for p in piece.parts] for piece in pieces] == [
        [("0.txt", 0, 1), ("1.txt", 0, 1)],
        [("2.txt", 0, 1)],
        *[[("3.txt", index, 3)] for index in range(3)],
        [("4.txt", 0, 1)],
        [("5.txt", 0, 1)],
        [("6.txt", 0, 1)],
        [("a.jsonl.gz", 0, 1)],
        *[[("a/b", index, 2)] for index in range(2)],
    ]
    assert len({piece.key for piece in pieces}) == len(pieces)
    changed = deal([*sources[:3], Source("3.txt", 25, "written anew"), *sources[4:]], piece_bytes=10)
    assert [a.key == b.key for a, b in zip(pieces, changed, strict=False)] == [*[True] * 2, *[False] * 3, *[True] * 3]


def test_a_piece_of_which_less_is_taken_is_another() -> None:
    """How much is taken under a limit hangs on the files before it, which may change while work is unfinished."""
    keys = {Piece((Part(Source("a.jsonl", 9, ""), take=take),)).key for take in (None, 1, 2)}
    assert len(keys) == 3


def test_pieces_of_a_text_end_where_lines_do() -> None:
    text = "one two\n  three\nfour\n" * 30
    pieces = list(cut(text, 50))
    assert "".join(pieces) == text
    assert all(50 < len(piece) <= 100 for piece in pieces[:-1])
    assert all(piece.endswith("\n") and not piece.startswith(" ") for piece in pieces[:-1])
    assert [len(piece) for piece in cut("x" * 301, 50)] == [100, 100, 100, 1]
    assert [len(piece) for piece in cut("x" * 220 + " y" * 30 + "\nz", 50)][:2] == [100, 100]  # no further is looked


def test_a_hub_dataset_without_its_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match=r"^DATA org/name: there is no such file or folder; for a dataset .*lesa-ray\[data"
    ):
        find("org/name")


@pytest.mark.parametrize(("name", "asked"), [("org/name", None), ("org/name@v1.0", "v1.0")])
def test_a_hub_dataset_is_that_of_the_revision_asked_for(
    name: str, asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose commit is noted, so that a branch that moves, or `main`, is another input."""
    library = SimpleNamespace(exceptions=SimpleNamespace(DatasetNotFoundError=KeyError))
    monkeypatch.setitem(sys.modules, "datasets", library)
    commits = {None: "c0ffee", "v1.0": "1abe1"}
    opened: list[tuple[object, ...]] = []
    answer: Any = SimpleNamespace(headers={}, request=None, status_code=404)

    def info(_: object, repository: str, revision: str | None) -> SimpleNamespace:
        if revision not in commits:
            raise RevisionNotFoundError("404", response=answer)
        return SimpleNamespace(sha=commits[revision])

    def opens(*given: object) -> SimpleNamespace:
        opened.append(given)
        return SimpleNamespace(num_shards=3)

    monkeypatch.setattr(HfApi, "dataset_info", info)
    monkeypatch.setattr("lesa_ray.training.sources.open_dataset", opens)
    assert find(name) == [Source("org/name", 0, commits[asked], name, shards=3)]
    assert opened == [("org/name", None, "train", commits[asked])]
    with pytest.raises(UserError, match=r"^DATA org/name@v2: the dataset org/name has no revision v2$"):
        find("org/name@v2")
