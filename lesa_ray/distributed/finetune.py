"""`finetune`: conversations become token blocks, on which the checkpoint is trained as `pretrain` trains it.

    look at checkpoint and place ▸ tokenize (kind chat) into OUT/training/data ▸ pretrain

Token blocks made before (`lesa-ray tokenize --kind chat`) are taken as they are. So are those in OUT/training/data once
they are finished: a run goes on with what it began with, whatever has become of the conversations since.
"""

from __future__ import annotations

import logging

from lesa_ray.checkpoint.manifest import own_manifest
from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.checkpoint.search import is_pattern
from lesa_ray.checkpoint.settings import longest_window
from lesa_ray.checkpoint.storage import WORK_DIR, Storage
from lesa_ray.distributed.tenancy import Guarded, Tenant, tenancy
from lesa_ray.distributed.tokenize import tokenize
from lesa_ray.distributed.train import pretrain
from lesa_ray.errors import KeptError, MachineError, UserError
from lesa_ray.expansion.runner import Listener, Silent
from lesa_ray.faults import reaching
from lesa_ray.places import shown
from lesa_ray.training.block_folder import made_with, prepare
from lesa_ray.training.chat import ChatEncoder
from lesa_ray.training.data_settings import TokenizeConfig
from lesa_ray.training.finish import Trained
from lesa_ray.training.freeze import trained_names
from lesa_ray.training.metrics import check_loggers
from lesa_ray.training.model import build, layers_of
from lesa_ray.training.packing_check import check_packing
from lesa_ray.training.run import LEASE_DIR, RUN_FILE, check_place, is_done
from lesa_ray.training.tokenizer import load_tokenizer
from lesa_ray.training.tokens import MANIFEST, open_blocks
from lesa_ray.training.tokens import read_manifest as read_blocks_manifest
from lesa_ray.training.train_settings import FinetuneConfig

DATA_DIR = "training/data"
log = logging.getLogger(__name__)


def finetune(config: FinetuneConfig, listener: Listener | None = None, *, tenant: Tenant | None = None) -> Trained:
    """Fine-tune; go on with a run that was interrupted; or find that it is done.

    tenant: who may work at OUT, if the caller has seen to it; by default this call does.
    Raises: UserError for wrong input, with nothing left behind; KeptError for rows that are wrong, found when others
    were done: those stay; MachineError for a fault. After both the same call goes on."""
    listener = listener or Silent()
    if _is_blocks(config.data):
        _check_blocks(config)
        return pretrain(config.on_blocks(config.data), listener, tenant=tenant)
    storage = Storage(config.out)
    blocks = storage.within(DATA_DIR)
    with reaching(f"OUT {config.out}"):
        claimed, made = storage.exists(RUN_FILE), blocks.is_empty()
        if not claimed:
            check_place(storage, config.out)
    listener.phase("reading the headers", 0)
    _check_model(config)
    try:
        if tenant is None and is_done(storage):  # then what is asked for is only compared with what is there
            tenant = Guarded()
        with tenancy(config.out, LEASE_DIR, listener, tenant) as tenant:
            asked = config.to_tokenize(blocks.url)
            if not _are_made(asked):
                manifest = tokenize(asked, listener, tenant=tenant).blocks.manifest
                if bad := manifest["bad_rows"]:
                    log.warning(
                        "%s rows left out, as they are wrong; the first: %s", bad, manifest["first_bad_rows"][0]
                    )
            return pretrain(config.on_blocks(blocks.url), listener, tenant=tenant)
    except KeptError:
        raise
    except UserError:
        if made and storage.exists(RUN_FILE) == claimed:  # what was found wrong is not of the training itself
            storage.remove_tree(DATA_DIR)
            storage.remove_tree(LEASE_DIR)
            storage.within("training").remove_if_empty()
            storage.remove_if_empty()
        raise


def _check_model(config: FinetuneConfig) -> None:
    """What tokenizing or training would find wrong with the checkpoint, before the data are read. Raises: UserError."""
    check_loggers(config.loggers)
    assert config.checkpoint is not None
    where = f"checkpoint {config.checkpoint}"
    checkpoint = open_checkpoint(config.checkpoint, where)
    model = build(checkpoint.config, where)
    text_config = model.config.get_text_config()
    positions = longest_window(text_config)
    if positions is not None and config.seq_len > positions:
        raise UserError(
            f"seq_len {config.seq_len}: {where} was made for {positions} tokens; give --seq-len {positions} or less"
        )
    with reaching(where):
        needed = "new" in config.train or bool(config.insert_over)
        manifest = own_manifest(checkpoint.storage, len(layers_of(model)), where, needed=needed)
    trained_names(model, config.train or ("all",), manifest, where)
    check_packing(checkpoint.config, where, config.seq_len)
    name = config.tokenizer or config.checkpoint
    tokenizer = load_tokenizer(name)
    stop = ChatEncoder(tokenizer, name).stop()
    if stop >= text_config.vocab_size:  # other tokens may be such as the conversations never hold
        raise UserError(
            f"tokenizer {name}: the token that ends an answer is {stop}, the vocabulary of {where} has "
            f"{text_config.vocab_size}; give another tokenizer, or a checkpoint with room for it"
        )


def _are_made(asked: TokenizeConfig) -> bool:
    """Whether the token blocks are finished, made as asked. Says so where the conversations are no longer the same."""
    storage = Storage(asked.out)
    manifest = read_blocks_manifest(storage)
    if manifest is None or not made_with(manifest, asked):
        return False
    try:
        same = prepare(asked).fingerprint == manifest.get("fingerprint")
    except (UserError, MachineError):
        same = False
    if not same:
        log.warning(
            "data %s: changed, moved or gone since token blocks were made of it; the run goes on with those, another "
            "OUT begins with what is there now",
            " ".join(map(shown, asked.data)),
        )
    storage.remove_tree(WORK_DIR)
    return True


def _is_blocks(data: str) -> bool:
    """Whether DATA is a folder of token blocks rather than of files, a glob or the name of a data set."""
    if is_pattern(data):
        return False
    with reaching(f"data {data}"):
        return Storage(data).exists(MANIFEST)


def _check_blocks(config: FinetuneConfig) -> None:
    """Raises: UserError if the token blocks hold text, or are asked to be others than they are."""
    blocks = open_blocks(config.data)
    if blocks.kind != "chat":
        raise UserError(f"data {config.data}: holds text, not conversations; train on it with `lesa-ray pretrain`")
    for name in sorted(config.of_data & config.model_fields_set):
        made = blocks.manifest.get("settings", {}).get(name)
        if getattr(config, name) != made:
            raise UserError(
                f"{name} {getattr(config, name)}: data {config.data} are token blocks already, made with {made}; leave "
                "it out, or give the conversations themselves"
            )
