"""A layer-wise scaled model as a person sees it: a row and a bar for each layer, and the total."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from lesa_ray.layerwise.budget import Sizes, Solved

_BAR = 32


def layer_table(sizes: Sizes) -> Table:
    """The layers from the bottom to the top; the bar is as long as a layer has parameters, attention's first."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for name in ("layer", "FFN", "× d_model", "heads", "KV heads", "parameters"):
        table.add_column(name, justify="right")
    table.add_column("▒ attention █ FFN")
    most = max(sizes.layer_parameters(layer) for layer in range(sizes.layers))
    for layer, (width, heads, kv_heads) in enumerate(zip(sizes.widths, sizes.heads, sizes.kv_heads, strict=True)):
        total = sizes.layer_parameters(layer)
        attention = round(_BAR * sizes.attention_parameters(layer) / most)
        table.add_row(
            str(layer), f"{width:,}", f"{width / sizes.d_model:.2f}", str(heads), str(kv_heads), f"{total:,}",
            "▒" * attention + "█" * (round(_BAR * total / most) - attention),
        )  # fmt: skip
    return table


def total_line(solved: Solved, wanted: int | None) -> str:
    """The total, against the budget if there is one."""
    sizes, total = solved.sizes, solved.sizes.parameters
    line = f"{total:,} parameters in {sizes.layers} layers of d_model {sizes.d_model}, {sizes.embedding_parameters:,} "
    line += f"of them embeddings; FFN widths in multiples of {solved.multiple}"
    if wanted is not None:
        line += f"; {100 * (total / wanted - 1):+.2f} % of the budget's {wanted:,}, β scaled by {solved.scale:.4g}"
    return line


def describe(solved: Solved, wanted: int | None) -> dict[str, Any]:
    """The same as plain JSON values."""
    sizes = solved.sizes
    return {
        "parameters": sizes.parameters,
        "embedding_parameters": sizes.embedding_parameters,
        "budget": wanted,
        "scale": solved.scale,
        "multiple": solved.multiple,
        "layers": [
            {
                "ffn": sizes.widths[layer],
                "heads": sizes.heads[layer],
                "kv_heads": sizes.kv_heads[layer],
                "parameters": sizes.layer_parameters(layer),
            }
            for layer in range(sizes.layers)
        ],
    }
