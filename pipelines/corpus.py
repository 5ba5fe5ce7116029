"""A corpus that every machine has: the source of Python's own standard library, with a tokenizer trained on it.

Other kinds, alone or together: the documentation inside that source and installed packages (`pipelines.prose`), and
the source of the packages.

Decides
- Which files of the standard library: every `.py` of the standard library except
  - tests (`test`, `tests`, `idle_test`): 17 of its 31 MB, repetitive, and a package of its own on Debian and Fedora;
  - `encodings`, `pydoc_data`: character tables and one 700 kB string, not prose or code;
  - `idlelib`, `turtledemo`, `tkinter`, `lib2to3`, `distutils`, `ensurepip`: missing on some systems or gone in newer
    Pythons; `site-packages` and `dist-packages`, which are not the standard library at all.
  What is left of Python 3.11 is 7.9 MB in 390 files, 2.2 million tokens: more than three minutes of training read,
  and far too little for a model that is meant to be useful.
- Whole files are held out, by `lesa-ray tokenize`'s own rule (a hash of how a file begins), and the tokenizer is
  trained on the others alone. It is the same project and the same authors, so held-out loss says nothing of other text.

The text depends on the Python version.
"""

from __future__ import annotations

import json
import os
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lesa_ray.config import Settings
from lesa_ray.errors import UserError
from lesa_ray.training.documents import document_key, is_heldout
from pipelines.prose import prose_documents, sources

END_OF_TEXT = "<|endoftext|>"
_TESTS = {"test", "tests", "idle_test"}
_TABLES = {"encodings", "pydoc_data"}
_NOT_EVERYWHERE = {"idlelib", "turtledemo", "tkinter", "lib2to3", "distutils", "ensurepip"}
LEFT_OUT = _TESTS | _TABLES | _NOT_EVERYWHERE | {"site-packages", "dist-packages", "__pycache__"}
FEWEST_FILES = 100  # below this the standard library is not there as source (zipped or stripped Python)
Kind = Literal["code", "prose", "packages"]
_READ_BY_TOKENIZER = 32_000_000
"""Bytes of text that the tokenizer is trained on: more teaches 4,096 merges nothing."""
_RECORD = "corpus.json"


class CorpusSettings(Settings):
    """A corpus and its tokenizer."""

    kinds: tuple[Kind, ...] = Field(default=("code",), min_length=1)
    """code: the standard library's source. prose: the documentation inside it and inside packages. packages: the source
    of packages."""
    vocab_size: int = Field(default=4096, ge=300)
    """Entries of the BPE vocabulary: 256 bytes, one end-of-text token, the rest merges. At 4096 a token is about 3.6
    characters of Python; doubling it would double the output head, already a fifth of the demo's parameters."""
    holdout: float = Field(default=0.05, gt=0, lt=1)
    """Share of the files held out of training, tokenizer included."""

    @model_validator(mode="after")
    def _apart(self) -> CorpusSettings:
        if "prose" in self.kinds and len(self.kinds) > 1:
            raise ValueError("kinds: prose stands alone: it is taken from the code, so files held out would be known")
        return self


@dataclass(frozen=True)
class Corpus:
    """A corpus on disk: files of text, and a tokenizer."""

    folder: str
    files: int
    holdout: float

    @property
    def text_folder(self) -> str:
        return os.path.join(self.folder, "text")

    @property
    def tokenizer_folder(self) -> str:
        return os.path.join(self.folder, "tokenizer")


def stdlib_files(root: str | None = None) -> list[str]:
    """Paths of the corpus's files relative to `root` (default: this Python's standard library), `/`-separated, sorted.

    Raises: UserError if so few are there that the library cannot be installed as source.
    """
    root = root or sysconfig.get_path("stdlib")
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]
        inside = os.path.relpath(folder, root)
        found += [os.path.normpath(os.path.join(inside, name)) for name in names if name.endswith(".py")]
    if len(found) < FEWEST_FILES:
        raise UserError(
            f"{root}: found {len(found)} Python source files, expected at least {FEWEST_FILES}: "
            "this Python comes without its standard library's source; use one that has it"
        )
    return sorted(path.replace(os.sep, "/") for path in found)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (GPT-2's kind: any text can be encoded and decodes to itself)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def build_corpus(folder: str, settings: CorpusSettings | None = None, root: str | None = None) -> Corpus:
    """Write the text and train the tokenizer, under `folder`; reused if there with the same settings. About 3 s.

    `folder` appears at one moment, complete. Raises: UserError if it holds something else, or a corpus of other
    settings."""
    settings = settings or CorpusSettings()
    if os.path.exists(folder):
        return load_corpus(folder, settings)
    partial = f"{folder}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    files, read, train = 0, 0, []
    for name, data in _documents(settings.kinds, root):
        files += 1
        target = os.path.join(partial, "text", name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb") as copy:
            copy.write(data)
        if read < _READ_BY_TOKENIZER and not is_heldout(document_key(data), settings.holdout):
            read += len(data)
            train.append(data.decode("utf-8", errors="replace"))  # a few old sources are Latin-1
    train_tokenizer(train, settings.vocab_size).save_pretrained(os.path.join(partial, "tokenizer"))
    with open(os.path.join(partial, _RECORD), "w", encoding="utf-8") as file:
        json.dump({"settings": settings.model_dump(mode="json"), "files": files}, file, indent=1)
    os.rename(partial, folder)
    return load_corpus(folder, settings)


def _documents(kinds: tuple[Kind, ...], root: str | None) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each file of the text."""
    library, root = stdlib_files(root), root or sysconfig.get_path("stdlib")
    for kind in kinds:
        if kind == "prose":
            yield from ((f"prose/{name}", text.encode()) for name, text in prose_documents(library, root))
            continue
        for package, folder, names in sources(library, root):
            if (package == "python") == (kind == "code"):
                for name in names:
                    with open(os.path.join(folder, name), "rb") as source:
                        yield name if kind == "code" else f"packages/{package}/{name}", source.read()


def load_corpus(folder: str, settings: CorpusSettings) -> Corpus:
    """A corpus saved by `build_corpus`. Raises: UserError if it is not one, or was made with other settings."""
    try:
        with open(os.path.join(folder, _RECORD), encoding="utf-8") as file:
            record = json.load(file)
    except OSError as error:
        raise UserError(f"{folder}: exists but is not a corpus (no {_RECORD}); remove it or name another") from error
    if CorpusSettings.model_validate(record["settings"]) != settings:
        raise UserError(
            f"{folder}: made with {record['settings']}, asked for {settings.model_dump(mode='json')}; "
            "remove it or name another folder"
        )
    return Corpus(folder, record["files"], settings.holdout)
