"""Results that the papers published, as reference lines for studies of the same base and growth.

LESA's: arXiv 2502.13794, Llama-3-8B → 11.5 B, continual pre-training on Wikipedia 2024.11, perplexity on held-out
text of it. OpT-DeUS's: arXiv 2508.08011; the figures are recomputed from the evaluation files in the history of its
repository (voalmciaf/OpT-DeUS), at 100 % of training on FineWeb-Edu: word perplexity on wikitext, and the mean of the
seven other tasks, zero-shot. Its 1.72 B model is what 16 → 24 layers of Llama-3.2-1B come to (1.236 B + 8 × 60.8 M).

They hold for their own data, tokens and evaluation code. Beside a study of ours the order of the methods and the
size of the gaps can be compared; the values only where all of these are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

TASKS = ("logiqa", "piqa", "winogrande", "arc_easy", "mmlu", "commonsense_qa", "boolq")
"""The seven whose mean OpT-DeUS's evaluation gives; wikitext is apart."""
_NEAR = 0.03


@dataclass(frozen=True)
class Published:
    """One table. rows: figures by method, in the order of `columns`; None where the paper gives none."""

    title: str
    source: str
    base_layers: int
    base_parameters: float
    layers: int
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[float | None, ...]]
    tuned: bool = False
    """Whether the models were fine-tuned on instructions before they were measured."""

    def matches(self, family: str | None, layers: int | None, parameters: int | None, grown: set[int]) -> bool:
        """Whether a study has this base (a Llama of its depth and, within 3 %, its size) and grew it as far."""
        if family != "llama" or layers != self.base_layers or self.layers not in grown or parameters is None:
            return False
        return abs(parameters / self.base_parameters - 1) < _NEAR


_LESA_PAPER = "LESA, arXiv 2502.13794"
_DEUS_PAPER = "OpT-DeUS, arXiv 2508.08011, recomputed from its repository's evaluation files"
_DEUS_COLUMNS = ("wikitext word perplexity", "mean of 7 tasks (%)")

LESA_8B = Published(
    "Llama-3-8B → 11.5 B, Wikipedia 2024.11, 6,000 steps",
    _LESA_PAPER,
    32, 8.03e9, 48,
    ("perplexity at 3,000 steps", "perplexity at 6,000 steps", "average score at 6,000 steps", "hours"),
    {
        "lesa": (5.27, 5.13, 64.30, 45.6),
        "llama-pro": (None, 5.44, 62.67, 56.4),
        "solar": (None, 8.09, 47.86, 75.6),
    },
)  # fmt: skip
DEUS_8B = Published(
    "Llama-3-8B → 11.5 B, FineWeb-Edu, 12,100 steps",
    _DEUS_PAPER,
    32, 8.03e9, 48,
    _DEUS_COLUMNS,
    {
        "base": (8.35, 66.20),
        "solar": (9.90, 64.20),
        "llama-pro": (7.81, 68.56),
        "lesa": (7.73, 68.77),
        "avg-deus": (7.95, 68.39),
        "opt-deus": (7.73, 68.87),
    },
)  # fmt: skip
DEUS_8B_TUNED = Published(
    "Llama-3-8B → 11.5 B, FineWeb-Edu, then Alpaca-GPT4",
    _DEUS_PAPER,
    32, 8.03e9, 48,
    _DEUS_COLUMNS,
    {
        "base": (8.32, 66.73),
        "solar": (9.68, 64.80),
        "llama-pro": (7.81, 68.87),
        "lesa": (7.72, 69.46),
        "avg-deus": (7.91, 69.34),
        "opt-deus": (7.73, 69.67),
    },
    tuned=True,
)  # fmt: skip
DEUS_8B_POSITIONS = Published(
    "Llama-3-8B → 11.5 B, FineWeb-Edu, OpT-DeUS at four positions",
    _DEUS_PAPER,
    32, 8.03e9, 48,
    _DEUS_COLUMNS,
    {
        "top": (7.73, 68.87),
        "middle": (7.70, 68.29),
        "bottom": (7.83, 68.32),
        "top and bottom": (7.87, 68.42),
    },
)  # fmt: skip
DEUS_1B = Published(
    "Llama-3.2-1B → 1.72 B, FineWeb-Edu, 12,100 steps",
    _DEUS_PAPER,
    16, 1.236e9, 24,
    _DEUS_COLUMNS,
    {
        "base": (13.68, 48.45),
        "solar": (13.87, 47.91),
        "llama-pro": (12.43, 50.72),
        "lesa": (12.28, 51.51),
        "avg-deus": (12.62, 50.88),
        "opt-deus": (12.19, 52.02),
    },
)  # fmt: skip
PUBLISHED = (LESA_8B, DEUS_8B, DEUS_8B_TUNED, DEUS_8B_POSITIONS, DEUS_1B)


def matching(family: str | None, layers: int | None, parameters: int | None, grown: set[int]) -> list[Published]:
    """The published tables of a study's setting. grown: the numbers of layers its arms come to."""
    return [table for table in PUBLISHED if table.matches(family, layers, parameters, grown)]
