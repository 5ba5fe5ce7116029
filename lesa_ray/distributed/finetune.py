"""`finetune`: conversations become token blocks, on which the checkpoint is trained as `pretrain` trains it.

    look at checkpoint and place ▸ tokenize (kind chat) into OUT/training/data ▸ pretrain

Token blocks made before (`lesa-ray tokenize --kind chat`) are taken as they are.
"""

from __future__ import annotations

from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.distributed.tokenize import tokenize
from lesa_ray.distributed.train import pretrain
from lesa_ray.errors import UserError
from lesa_ray.expansion.runner import Listener, Silent
from lesa_ray.training.data_settings import TokenizeConfig
from lesa_ray.training.finish import Trained
from lesa_ray.training.model import build
from lesa_ray.training.run import RUN_FILE, check_place, longest
from lesa_ray.training.tokens import MANIFEST, open_blocks
from lesa_ray.training.train_settings import FinetuneConfig

DATA_DIR = "training/data"


def finetune(config: FinetuneConfig, listener: Listener | None = None) -> Trained:
    """Fine-tune; go on with a run that was interrupted; or find that it is done.

    Raises: UserError for wrong input, MachineError for a fault, after which the same call goes on."""
    listener = listener or Silent()
    if _is_blocks(config.data):
        return pretrain(config.on_blocks(_chat_blocks(config.data)), listener)
    assert config.checkpoint is not None
    try:
        checkpoint = open_checkpoint(config.checkpoint)
    except UserError as error:
        raise UserError(str(error).replace("BASE ", "checkpoint ", 1)) from error
    positions = longest(build(checkpoint.config, f"checkpoint {config.checkpoint}").config.get_text_config())
    if positions is not None and config.seq_len > positions:
        raise UserError(f"seq_len {config.seq_len}: checkpoint {config.checkpoint} was made for {positions} tokens")
    storage = Storage(config.out)
    fresh = not storage.exists(RUN_FILE)
    if fresh:
        check_place(storage, config.out)
    blocks = storage.within(DATA_DIR).url
    try:
        tokenize(
            TokenizeConfig(
                data=(config.data,),
                tokenizer=config.tokenizer or config.checkpoint,
                out=blocks,
                kind="chat",
                seq_len=config.seq_len,
                holdout=config.holdout,
                too_long=config.too_long,
            ),
            listener,
        )
        return pretrain(config.on_blocks(blocks), listener)
    except UserError:
        if fresh and not storage.exists(RUN_FILE):
            storage.remove_tree(DATA_DIR)
            _remove_if_empty(storage.within("training"))
            _remove_if_empty(storage)
        raise


def _is_blocks(data: str) -> bool:
    """Whether DATA is a folder of token blocks rather than of files, a glob or the name of a data set."""
    if any(sign in data for sign in "*?["):
        return False
    return Storage(data).exists(MANIFEST)


def _chat_blocks(url: str) -> str:
    """`url`, if it holds conversations. Raises: UserError."""
    if open_blocks(url).kind != "chat":
        raise UserError(f"data {url}: holds text, not conversations; train on it with `lesa-ray pretrain`")
    return url


def _remove_if_empty(storage: Storage) -> None:
    if storage.is_local and storage.exists() and storage.is_empty():
        storage.remove_tree()
