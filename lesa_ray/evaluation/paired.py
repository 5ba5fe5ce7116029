"""How sure a loss, or the difference of two, is: standard errors over windows or documents.

The losses of two checkpoints on the same windows go up and down together, since some text is harder than other; their
difference, taken window by window, is far surer than the two losses are. It is a ratio of sums, Σ(a − b) / Σ n with n
tokens (or bytes) in a window, and its error that of a ratio estimator (Cochran, Sampling Techniques, section 2.11):

    √(m / (m − 1) · Σ (a − b − r·n)²) / Σ n      over m windows, r the ratio

which for windows of equal length is the standard error of a mean. Windows count as independent here. Neighbours in one
text are not quite, so that true errors are somewhat larger.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lesa_ray.errors import UserError
from lesa_ray.evaluation.perplexity import Scores


def ratio(sums: NDArray[np.float64], sizes: NDArray[np.int64]) -> tuple[float, float | None]:
    """Σ sums / Σ sizes and its standard error; None for one window, which says nothing of the spread."""
    total, many = int(sizes.sum()), len(sizes)
    value = float(sums.sum() / total)
    if many < 2:
        return value, None
    spread = float(((sums - value * sizes) ** 2).sum())
    return value, math.sqrt(many / (many - 1) * spread) / total


def difference(mine: Scores, first: Scores, name: str) -> dict[str, Any]:
    """How `mine` differs from `first` (called `name`), as JSON values.

    By windows, in nats a token, where both read the same tokens; else (other tokenizers on the same text) by documents,
    in bits a byte. Raises: UserError if what they read was not the same text."""
    if mine.digest == first.digest:
        value, error = ratio(mine.nats - first.nats, first.tokens)
        return {"to": name, "of": "loss", "value": value, "stderr": error, "over": "windows", "count": len(mine.nats)}
    if not np.array_equal(mine.nbytes, first.nbytes) or not first.nbytes.any():
        raise UserError("the data changed while it was read, so that the checkpoints were measured on different text")
    value, error = ratio(document_bits(mine) - document_bits(first), first.nbytes)
    return {
        "to": name,
        "of": "bits_per_byte",
        "value": value,
        "stderr": error,
        "over": "documents",
        "count": len(first.nbytes),
    }


def document_bits(scores: Scores) -> NDArray[np.float64]:
    """The loss of each document in bits: (rows,)."""
    return np.bincount(scores.rows, scores.nats, minlength=len(scores.nbytes)) / math.log(2)
