"""What a person sees at the end of a training run."""

from __future__ import annotations

from lesa_ray.report.terminal import count
from lesa_ray.training.finish import Trained


def training_lines(result: Trained) -> str:
    """Where the result is, what it cost, what it changed."""
    how = " (it was there already)" if result.reused else " (an interrupted run was taken up)" if result.resumed else ""
    lines = [
        f"{result.out}: {count(result.trained_parameters)} of {count(result.parameters)} parameters trained, "
        f"{result.steps:,} steps, {result.tokens:,} tokens, {result.tokens_per_second:,.0f} tokens/s{how}"
    ]
    if result.heldout_before is not None and result.heldout_after is not None:
        change = result.heldout_after - result.heldout_before
        without = "" if result.inserted_over is None else " (without the new layers)"
        lines.append(f"held-out loss {result.heldout_before:.4f}{without} → {result.heldout_after:.4f} ({change:+.4f})")
    return "\n".join(lines)
