"""The standard-library corpus: which files, which side, which ids."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from lesa_ray.errors import UserError
from lesa_ray.training import corpus as module
from lesa_ray.training.corpus import END_OF_TEXT, build_corpus, is_heldout, pack, stdlib_files, train_tokenizer
from lesa_ray.training.settings import CorpusSettings

SETTINGS = CorpusSettings(vocab_size=320, holdout_every=5)
CONTENT = "def add_{0}(left, right):\n    return left + right + {0}  # naïve\n"


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small stand-in for a standard library: 110 sources, and what must not be read."""
    root = tmp_path / "library"
    for number in range(110):
        path = root / ("." if number % 2 else "package") / f"module_{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(CONTENT.format(number), encoding="utf-8")
    for left_out in ("test/test_a.py", "package/tests/test_b.py", "site-packages/c.py", "package/d.txt"):
        path = root / left_out
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("left_out = True\n")
    return root


def test_files_are_the_sources_that_belong_in_sorted_order(library: Path) -> None:
    expected = sorted(f"package/module_{n}.py" if n % 2 == 0 else f"module_{n}.py" for n in range(110))
    assert stdlib_files(str(library)) == expected


def test_this_python_has_the_corpus() -> None:
    paths = stdlib_files()
    assert {"json/decoder.py", "argparse.py"} <= set(paths)
    assert not module.LEFT_OUT & {part for path in paths for part in path.split("/")[:-1]}
    assert 0 < sum(is_heldout(path, 20) for path in paths) < len(paths) / 10


def test_a_library_without_source_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("")
    with pytest.raises(UserError, match=r"found 1 Python source files"):
        stdlib_files(str(tmp_path))


def test_one_path_in_n_is_held_out_whatever_the_others() -> None:
    held = [is_heldout(f"package/module_{n}.py", 20) for n in range(20_000)]
    assert 900 < sum(held) < 1100  # 1000 ± 3 standard deviations (31)
    assert is_heldout("operator.py", 20)  # a file must not change sides between machines or releases
    assert not is_heldout("argparse.py", 20)


def test_packing_keeps_every_text_and_marks_its_ends() -> None:
    texts = ["x = 'é'\n\tπ\n", "", "def f():\n    return 1\n"]
    tokenizer = train_tokenizer(texts, 300)
    ids = pack(tokenizer, texts)
    end = tokenizer.eos_token_id
    assert ids[0] == ids[-1] == end
    assert (ids == end).sum() == len(texts) + 1
    assert tokenizer.decode(ids.tolist()).split(END_OF_TEXT)[1:-1] == texts


def test_the_sides_share_no_file_and_the_tokenizer_saw_one_side_only(library: Path, tmp_path: Path) -> None:
    for path in stdlib_files(str(library)):
        if is_heldout(path, SETTINGS.holdout_every):
            (library / path).write_text("heldout_word " * 50)
    corpus = build_corpus(str(tmp_path / "corpus"), SETTINGS, str(library))
    tokenizer = corpus.tokenizer()
    assert corpus.train_files + corpus.heldout_files == 110
    assert "heldout_word" not in tokenizer.decode(corpus.train.tolist())
    heldout = tokenizer.decode(corpus.heldout.tolist())
    assert heldout.count("heldout_word") == 50 * corpus.heldout_files
    assert len(tokenizer("heldout_word")["input_ids"]) > 5  # no merge was learnt from it
    assert len(tokenizer) == SETTINGS.vocab_size


def test_built_twice_the_same_and_reused_without_the_source(library: Path, tmp_path: Path) -> None:
    first = build_corpus(str(tmp_path / "first"), SETTINGS, str(library))
    second = build_corpus(str(tmp_path / "second"), SETTINGS, str(library))
    assert first.digest == second.digest
    for name in ("train.npy", "heldout.npy", "tokenizer/tokenizer.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    shutil.rmtree(library)
    again = build_corpus(str(tmp_path / "first"), SETTINGS, str(library))
    assert again.digest == first.digest
    assert np.array_equal(again.train, first.train)


def test_what_is_not_this_corpus_is_refused(library: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="not a corpus"):
        build_corpus(str(tmp_path / "mine"), SETTINGS, str(library))
    build_corpus(str(tmp_path / "corpus"), SETTINGS, str(library))
    with pytest.raises(UserError, match="made with"):
        build_corpus(str(tmp_path / "corpus"), SETTINGS.model_copy(update={"vocab_size": 400}), str(library))
