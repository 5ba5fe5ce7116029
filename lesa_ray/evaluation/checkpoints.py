"""A checkpoint to measure, from wherever it lies: its bounds, its tokenizer, its model.

Decides
- transformers reads folders, so a checkpoint behind a URL is copied to a scratch folder of this machine
  (LESA_RAY_SCRATCH), which goes when the measuring ends, or before the next copy if its process was killed; nothing is
  ever written where the checkpoint lies. Repo ids go through the hub's own cache.
- What its predictions would be worthless without is checked: all tensors are there, none is made up, and the model
  cannot see the token it is to predict (an encoder such as BERT can, and would seem to be nearly perfect).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from lesa_ray.checkpoint.brought_code import for_transformers, forget_code
from lesa_ray.checkpoint.language_model import KEY_MAPPING, language_config
from lesa_ray.checkpoint.reader import Checkpoint, open_checkpoint
from lesa_ray.checkpoint.settings import longest_window
from lesa_ray.checkpoint.storage import ON_THE_HUB, Storage, resolve_base
from lesa_ray.config import DtypeName
from lesa_ray.errors import MachineError, UserError
from lesa_ray.faults import explain, reaching
from lesa_ray.gpu import is_full
from lesa_ray.layerwise.register import register
from lesa_ray.scratch import SCRATCH_VARIABLE, held_folder
from lesa_ray.sizes import size

_COPIED_KINDS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""What a tokenizer and the settings are made of; weights are copied by the checkpoint's own list."""
_PART = 32 * 2**20
_COPIES = "lesa-ray-evaluate-"
_TOKENIZER_FILES = re.compile(r"tokenizer|vocab|tekken|\.(model|tiktoken)$")


@dataclass(frozen=True)
class Bounds:
    """What a checkpoint can be asked for, from its config.json. `positions`: its longest window, if it has a bound."""

    name: str
    url: str
    """Where it is, whatever the working folder: an absolute path or a URL."""
    vocab_size: int
    positions: int | None
    parameters: int
    nbytes: int
    """Of its weights as stored; both 0 where that is not known before they are fetched (a repo id)."""
    has_tokenizer: bool | None
    """None where that is not known yet."""
    config: Any
    """As transformers reads its config.json."""

    @property
    def is_quantized(self) -> bool:
        return getattr(self.config, "quantization_config", None) is not None

    def dtype_of(self, dtype: DtypeName | None) -> torch.dtype:
        """What it is computed in if `dtype` is asked for: by default what config.json says, else as stored."""
        if dtype is not None:
            named: torch.dtype = getattr(torch, dtype)
            return named
        if isinstance(own := self.config.dtype, torch.dtype):
            return own
        return torch.bfloat16 if 0 < self.nbytes < 3 * self.parameters else torch.float32

    def weights(self, dtype: DtypeName | None) -> int:
        """Bytes of its weights as they are computed with; 0 where that is not known yet."""
        return self.nbytes if self.is_quantized else self.parameters * self.dtype_of(dtype).itemsize


def read_bounds(name: str) -> Bounds:
    """A checkpoint's bounds, without its weights. Raises: UserError if it is not a whole checkpoint of a language
    model that transformers knows."""
    url = resolve_base(name, f"checkpoint {name}")
    if url.startswith("hf://"):
        raw = _read_config(name, _fetch(name, url, ["config.json"]))
        config = _parsed(name, language_config(raw, f"checkpoint {name}") or raw)
        text = config.get_text_config()
        return Bounds(name, url, int(text.vocab_size), longest_window(text), 0, 0, None, config)
    checkpoint = open_checkpoint(url, f"checkpoint {name}")
    config = _parsed(name, checkpoint.config)
    text = config.get_text_config()
    has_tokenizer = any(_TOKENIZER_FILES.search(file) for file in checkpoint.files)
    vocab_size, positions = int(text.vocab_size), longest_window(text)
    return Bounds(name, url, vocab_size, positions, checkpoint.parameters, checkpoint.nbytes, has_tokenizer, config)


def _parsed(name: str, raw: dict[str, Any]) -> Any:
    """The configuration, as transformers has it for its family."""
    register()
    family = raw.get("model_type")
    if family not in CONFIG_MAPPING:
        raise UserError(f"checkpoint {name}: transformers does not know the family {family!r} of its config.json")
    try:
        config = CONFIG_MAPPING[family].from_dict(for_transformers(raw))
        config.get_text_config()
        return config
    except Exception as error:  # each family validates in its own way
        raise UserError(f"checkpoint {name}: config.json: transformers refuses it ({explain(error)[:200]})") from error


def _read_config(name: str, folder: str) -> dict[str, Any]:
    with reaching(f"checkpoint {name}", "config.json cannot be read", hint=""):
        raw = json.loads(Storage(folder).read("config.json"))
    if not isinstance(raw, dict):
        raise UserError(f"checkpoint {name}: config.json is not a JSON object")
    return raw


@contextmanager
def local_folder(name: str, url: str) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """A folder of this machine with the checkpoint in it, and the digests of its weights.

    Raises: UserError; MachineError if the scratch disk has no room or the store fails."""
    if url.startswith("hf://"):
        folder = _fetch(name, url, ["*.safetensors", *(f"*{kind}" for kind in _COPIED_KINDS), "model*.index.json"])
        yield folder, open_checkpoint(folder, f"checkpoint {name}").digests()
        return
    checkpoint = open_checkpoint(url, f"checkpoint {name}")
    digests = checkpoint.digests()
    if checkpoint.storage.is_local:
        yield checkpoint.storage.root, digests
        return
    with held_folder(_COPIES) as scratch:
        _copy(name, checkpoint, Storage(scratch))
        yield scratch, digests


def _copy(name: str, checkpoint: Checkpoint, scratch: Storage) -> None:
    """Weights, configuration and tokenizer into a scratch folder, in parts of 32 MiB."""
    files = {*checkpoint.shards, *(file for file in checkpoint.files if file.endswith(_COPIED_KINDS))}
    needed, free = sum(checkpoint.files[file] for file in files), scratch.free_bytes() or 0
    if needed > free:
        raise MachineError(
            f"checkpoint {name}: a copy needs {size(needed)}, {scratch.root} has {size(free)} free; "
            f"set {SCRATCH_VARIABLE} to a folder on a larger disk"
        )

    def copy(file: str) -> None:
        nbytes = checkpoint.files[file]
        with scratch.create(file) as target:
            for start in range(0, nbytes, _PART):
                target.write(checkpoint.storage.read(file, start, min(start + _PART, nbytes)))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(copy, sorted(files)))


def _fetch(name: str, url: str, patterns: list[str]) -> str:
    """A folder of the hub's cache with those files of a repository; fetched where they are not there yet."""
    from huggingface_hub import snapshot_download

    repo, _, revision = url.removeprefix("hf://").partition("@")
    with reaching(f"checkpoint {name}", "cannot be fetched from the hub", ON_THE_HUB):
        # "*/*": some repositories keep the same weights again in folders or as consolidated.*
        folder: str = snapshot_download(
            repo, revision=revision or None, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]
        )
    return folder


def load_tokenizer(name: str, folder: str) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. Raises: UserError if it has none."""
    with reaching(f"checkpoint {name}", "its tokenizer cannot be loaded", hint=""):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        works = bool(tokenizer("a b", add_special_tokens=False)["input_ids"])  # without files some are made, empty
    if not works:
        raise no_tokenizer(name)
    return tokenizer


def no_tokenizer(name: str) -> UserError:
    """The error for text or tasks on a checkpoint without a tokenizer."""
    return UserError(
        f"checkpoint {name}: has no tokenizer, which text and tasks need; copy its tokenizer.json there, or measure on "
        "token blocks"
    )


def load_model(
    checkpoint: str,
    dtype: DtypeName | None,
    *,
    name: str | None = None,
    device: str = "cpu",
    placed: Mapping[str, int | str] | str | None = None,
) -> PreTrainedModel:
    """The model of a folder or repo id, ready to evaluate. `name`: what errors call it.

    device: where all of it goes; or placed, as `evaluation.placement` says, which part goes where.
    Raises: UserError also where weights are missing, which would be random, and where it sees what it predicts."""
    name = name or checkpoint
    register()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        forget_code(config)
        mapping: dict[str, Any] = {}
        if config.get_text_config() is not config:
            raw = open_checkpoint(checkpoint, name).config
            if raw["model_type"] != config.model_type:  # its language model alone
                config = CONFIG_MAPPING[raw["model_type"]].from_dict(for_transformers(raw))
                mapping["key_mapping"] = KEY_MAPPING
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            config=config,
            dtype=dtype or "auto",
            output_loading_info=True,
            trust_remote_code=False,
            **mapping,
            **({} if placed is None else {"device_map": placed}),
        )
    except Exception as error:  # shapes that differ, files that are not there: each surfaces in its own way
        if isinstance(error, MemoryError) or is_full(error):
            raise
        raise UserError(f"{name}: cannot be loaded: {explain(error)[:300]}") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise UserError(f"{name}: {len(names)} tensors are missing, the first {names[0]}")
    ready: PreTrainedModel = model.eval()
    if placed is None:
        ready = ready.to(device)
    if not is_causal(ready):
        raise UserError(
            f"{name}: its predictions depend on the tokens they are to predict ({type(model).__name__}, an encoder?), "
            "so they have no perplexity"
        )
    return ready


@torch.inference_mode()
def is_causal(model: PreTrainedModel) -> bool:
    """Whether a token leaves what the model computes before it unchanged, but for rounding."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(6).remainder(vocabulary).repeat(2, 1).to(input_device(model))  # (2, 6)
    ids[1, -1] = (ids[1, -1] + 1) % vocabulary
    one, two = model(input_ids=ids, use_cache=False).logits.float()[:, :-1]  # (5, vocabulary) each
    scale = float(one.std())
    # NaN is not for this check to judge
    return not bool((one - two).abs().max() > 0.05 * scale)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where its token ids belong: a model over several GPUs begins with its embedding."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def choose_device(device: str | None = None) -> str:
    """`device`, or a GPU where there is one. Raises: UserError if a GPU is asked for and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")
