"""A tokenizer from wherever it lies, and back to where its ids lie."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from functools import lru_cache

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lesa_ray.checkpoint.side_files import WEIGHTS
from lesa_ray.checkpoint.storage import Storage, resolve_base
from lesa_ray.errors import UserError
from lesa_ray.faults import reaching

_CONFIG = "tokenizer_config.json"
_HOW_LOADED = {"local_files_only", "is_local", "name_or_path", "cache_dir", "revision", "token", "_commit_hash"}


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a hub repository or a URL. Raises: UserError if there is none that works."""
    where = f"tokenizer {name}"
    url = resolve_base(name, where)
    with reaching(where, "cannot be loaded", hint=""):  # missing files surface in many ways
        if url.startswith("hf://"):
            repo, _, revision = url.removeprefix("hf://").partition("@")
            tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision or "main", trust_remote_code=False)
        elif "://" in url:
            tokenizer = _load_copy(Storage(url))
        else:
            tokenizer = AutoTokenizer.from_pretrained(url, trust_remote_code=False)
        works = bool(tokenizer("a b", add_special_tokens=False)["input_ids"])  # without files some are made, empty
    if not works:
        raise UserError(f"{where}: knows no token; is its tokenizer.json there?")
    return tokenizer


@lru_cache(maxsize=2)
def cached_tokenizer(url: str, digest: str) -> PreTrainedTokenizerBase:
    """A saved tokenizer, loaded once a process. digest: what `save_tokenizer` gave, so that another is not taken."""
    del digest
    return _load_copy(Storage(url))


def _load_copy(storage: Storage) -> PreTrainedTokenizerBase:
    names = [name for name in storage.list() if not name.endswith(WEIGHTS)]
    if not names:
        raise UserError(f"tokenizer {storage.url}: there is no such folder, or it is empty")
    with tempfile.TemporaryDirectory(prefix="lesa-ray-tokenizer-") as folder:
        for name in names:
            with open(os.path.join(folder, name), "wb") as file:
                file.write(storage.read(name))
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The tokenizer as the files that `from_pretrained` reads, by name."""
    files = {}
    with tempfile.TemporaryDirectory(prefix="lesa-ray-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        for where, _, names in os.walk(folder):
            for name in names:
                path = os.path.join(where, name)
                with open(path, "rb") as file:
                    data = file.read()
                files[os.path.relpath(path, folder).replace(os.sep, "/")] = _kept(data) if name == _CONFIG else data
    return dict(sorted(files.items()))


def _kept(data: bytes) -> bytes:
    """The tokenizer's settings without how it was loaded, which transformers notes among them."""
    settings = {key: value for key, value in json.loads(data).items() if key not in _HOW_LOADED}
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()


def files_digest(files: dict[str, bytes]) -> str:
    """SHA-256 of a tokenizer's files."""
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id the tokenizer can give, and one: at least its length, more where ids have gaps."""
    return int(max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1))
