"""The standard-library corpus: which files, and what the tokenizer sees of them."""

import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from lesa_ray.errors import UserError
from lesa_ray.training.documents import document_key, is_heldout
from pipelines import corpus as module
from pipelines.corpus import END_OF_TEXT, CorpusSettings, build_corpus, stdlib_files, train_tokenizer

SETTINGS = CorpusSettings(vocab_size=320, holdout=0.2)
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


def test_a_library_without_source_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("")
    with pytest.raises(UserError, match=r"found 1 Python source files"):
        stdlib_files(str(tmp_path))


def heldout(path: Path) -> bool:
    return is_heldout(document_key(path.read_bytes()), SETTINGS.holdout)


def test_the_tokenizer_knows_nothing_of_files_held_out(library: Path, tmp_path: Path) -> None:
    rare = [path for path in stdlib_files(str(library)) if heldout(library / path)]
    assert 8 < len(rare) < 40
    for path in rare:
        text = (library / path).read_text(encoding="utf-8")
        number = 0
        while not heldout(library / path) or number == 0:
            (library / path).write_text(text + f"# {number} " + "heldout_word " * 50, encoding="utf-8")
            number += 1
    corpus = build_corpus(str(tmp_path / "corpus"), SETTINGS, str(library))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(corpus.tokenizer_folder)
    assert corpus.files == 110
    assert len(tokenizer("heldout_word")["input_ids"]) > 5  # no merge was learnt from it
    assert len(tokenizer("def add_1(left, right)")["input_ids"]) < 10
    assert len(tokenizer) == SETTINGS.vocab_size


def test_any_text_decodes_to_itself() -> None:
    texts = ["x = 'é'\n\tπ\n", "def f():\n    return 1\n"]
    tokenizer = train_tokenizer(texts, 300)
    for text in (*texts, "日本 \x00 🙂"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == END_OF_TEXT


def test_built_twice_the_same_and_reused_without_the_source(library: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        build_corpus(str(tmp_path / name), SETTINGS, str(library))
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file())
    assert len(files) > 110
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    shutil.rmtree(library)
    assert build_corpus(str(tmp_path / "first"), SETTINGS, str(library)).files == 110


def test_what_is_not_this_corpus_is_refused(library: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="not a corpus"):
        build_corpus(str(tmp_path / "mine"), SETTINGS, str(library))
    build_corpus(str(tmp_path / "corpus"), SETTINGS, str(library))
    with pytest.raises(UserError, match="made with"):
        build_corpus(str(tmp_path / "corpus"), SETTINGS.model_copy(update={"vocab_size": 400}), str(library))
