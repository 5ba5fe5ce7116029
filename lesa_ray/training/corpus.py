"""A corpus that every machine has: the source of Python's own standard library, with a tokenizer trained on it.

Decides
- Which files: every `.py` of the standard library except
  - tests (`test`, `tests`, `idle_test`): 17 of its 31 MB, repetitive, and a package of its own on Debian and Fedora;
  - `encodings`, `pydoc_data`: character tables and one 700 kB string, not prose or code;
  - `idlelib`, `turtledemo`, `tkinter`, `lib2to3`, `distutils`, `ensurepip`: missing on some systems or gone in newer
    Pythons; `site-packages` and `dist-packages`, which are not the standard library at all.
  What is left of Python 3.11 is 7.9 MB in 390 files, 2.2 million tokens: more than three minutes of training read,
  and far too little for a model that is meant to be useful.
- The split: by a hash of the file's relative path, so that it depends neither on the order of a directory listing nor
  on the other files, and a file never changes sides. Whole files are held out, so the held-out text is unseen.
  What that costs: it is the same project and the same authors; held-out loss here says nothing of other text.
- Packing: `<|endoftext|>` before every file and after the last, in order of path, in one array of ids. Sequences cut
  from it may start in mid-file and run into the next one; nothing is padded and nothing dropped.

The text depends on the Python version. Its digest is recorded, and whatever is made from it can carry that digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sysconfig
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lesa_ray.errors import UserError
from lesa_ray.training.settings import CorpusSettings

END_OF_TEXT = "<|endoftext|>"
_TESTS = {"test", "tests", "idle_test"}
_TABLES = {"encodings", "pydoc_data"}
_NOT_EVERYWHERE = {"idlelib", "turtledemo", "tkinter", "lib2to3", "distutils", "ensurepip"}
LEFT_OUT = _TESTS | _TABLES | _NOT_EVERYWHERE | {"site-packages", "dist-packages", "__pycache__"}
FEWEST_FILES = 100  # below this the standard library is not there as source (zipped or stripped Python)

Ids = NDArray[np.uint16]


@dataclass(frozen=True)
class Corpus:
    """A corpus on disk, loaded. `digest` names the text, the split and the tokenizer."""

    folder: str
    train: Ids  # (tokens,)
    heldout: Ids  # (tokens,)
    train_files: int
    heldout_files: int
    digest: str

    @property
    def tokenizer_folder(self) -> str:
        return os.path.join(self.folder, "tokenizer")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.tokenizer_folder)


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


def is_heldout(path: str, every: int) -> bool:
    """Whether the file of this relative path belongs to the held-out side: one path in `every`, by its hash."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % every == 0


def read_texts(root: str, paths: list[str]) -> list[str]:
    """The files' texts. Bytes that are not UTF-8 (a few old Latin-1 sources) become replacement characters."""
    texts = []
    for path in paths:
        with open(os.path.join(root, path), encoding="utf-8", errors="replace") as file:
            texts.append(file.read())
    return texts


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


def pack(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Ids:
    """All texts in one row of ids (tokens,): end-of-text, text, end-of-text, text, …, end-of-text.

    The first token of each text can so be predicted from an end-of-text, and its end is to be predicted too.
    """
    end = tokenizer.eos_token_id
    ids = [end]
    for encoding in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        ids += encoding
        ids.append(end)
    return np.array(ids, dtype=np.uint16)


def build_corpus(folder: str, settings: CorpusSettings | None = None, root: str | None = None) -> Corpus:
    """Read, split, train the tokenizer, encode and save under `folder`; reused if there with the same settings.

    About 6 s on two cores. `folder` appears at one moment, complete.
    Raises: UserError if `folder` holds something else, or a corpus of other settings.
    """
    settings = settings or CorpusSettings()
    if os.path.exists(folder):
        return load_corpus(folder, settings)
    root = root or sysconfig.get_path("stdlib")
    paths = stdlib_files(root)
    sides = {
        "train": [path for path in paths if not is_heldout(path, settings.holdout_every)],
        "heldout": [path for path in paths if is_heldout(path, settings.holdout_every)],
    }
    texts = {side: read_texts(root, files) for side, files in sides.items()}
    tokenizer = train_tokenizer(texts["train"], settings.vocab_size)
    ids = {side: pack(tokenizer, side_texts) for side, side_texts in texts.items()}

    partial = f"{folder}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    tokenizer.save_pretrained(os.path.join(partial, "tokenizer"))
    for side, row in ids.items():
        np.save(os.path.join(partial, f"{side}.npy"), row)
    record = {
        "settings": settings.model_dump(),
        "files": sides,
        "digest": hashlib.sha256(ids["train"].tobytes() + b"|" + ids["heldout"].tobytes()).hexdigest(),
    }
    with open(os.path.join(partial, "corpus.json"), "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
    os.rename(partial, folder)
    return load_corpus(folder, settings)


def load_corpus(folder: str, settings: CorpusSettings) -> Corpus:
    """A corpus saved by `build_corpus`. Raises: UserError if it is not one, or was made with other settings."""
    try:
        with open(os.path.join(folder, "corpus.json"), encoding="utf-8") as file:
            record = json.load(file)
    except OSError as error:
        raise UserError(f"{folder}: exists but is not a corpus (no corpus.json); remove it or name another") from error
    if record["settings"] != settings.model_dump():
        raise UserError(
            f"{folder}: made with {record['settings']}, asked for {settings.model_dump()}; "
            "remove it or name another folder"
        )
    return Corpus(
        folder=folder,
        train=np.load(os.path.join(folder, "train.npy")),
        heldout=np.load(os.path.join(folder, "heldout.npy")),
        train_files=len(record["files"]["train"]),
        heldout_files=len(record["files"]["heldout"]),
        digest=record["digest"],
    )
