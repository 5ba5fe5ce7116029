"""Tied weights that a checkpoint holds under both names: are they one weight?

Many files hold a head beside the embedding though config.json ties them; it is the embedding again. Where it is another
matrix, transformers (5.17 and later) does not tie them, with a warning, so the model that is evaluated and served has
the head of the files. One that is trained tied would be another model, and its head be written over."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel

from lesa_ray.checkpoint.reader import Checkpoint
from lesa_ray.checkpoint.samples import samples
from lesa_ray.errors import UserError
from lesa_ray.faults import reaching
from lesa_ray.training.conversion import Conversion, held_twice


def check_tied(model: PreTrainedModel, checkpoint: Checkpoint, conversions: Iterable[Conversion], where: str) -> None:
    """Raises: UserError if a weight that config.json ties is two in the files; MachineError if they cannot be read.

    Samples tell: who untied a head trained it. conversions: as `plan_conversions` made them."""
    for name, conversion in held_twice(model, checkpoint.tensors, conversions).items():
        if not conversion.plain:
            continue
        with reaching(where):
            same = _sampled(checkpoint, name) == _sampled(checkpoint, conversion.sources[0])
        if not same:
            raise UserError(
                f"{where}: config.json ties {name} to {conversion.sources[0]}, but the files hold two different "
                'matrices, which transformers takes both; set "tie_word_embeddings": false in config.json to train '
                f"both, or remove {name} from the files"
            )


def _sampled(checkpoint: Checkpoint, name: str) -> tuple[str, tuple[int, ...], list[bytes]]:
    entry = checkpoint.tensors[name]
    ranges = samples(checkpoint.storage, entry.file, [entry])
    return entry.dtype, entry.shape, list(ranges)
