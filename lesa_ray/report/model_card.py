"""The model card (README.md) of an expanded checkpoint: what it is, how it was made, how to load and train it."""

from __future__ import annotations

from lesa_ray.checkpoint.manifest import Manifest
from lesa_ray.expansion.layout import Expansion


def model_card(expansion: Expansion, manifest: Manifest) -> str:
    """Markdown with the metadata block of the Hugging Face hub."""
    job = expansion.job
    hub = manifest["base"] if expansion.checkpoint.storage.url.startswith("hf://") else None
    base = hub or expansion.checkpoint.storage.url.rsplit("/", 1)[-1]  # where its folder lies is nobody's business
    trained = "its new layers" if manifest["train"] == "new" else "all layers"
    kept = job.zero_init
    named = f"[{job.method.title}]({job.method.paper})" if job.method.paper else job.method.title
    then = "the method's paper goes on to train" if job.method.paper else "what is meant to be trained now is"
    lines = ["---"]
    if hub:
        lines += [f"base_model: {hub.removeprefix('hf://').split('@')[0]}", "base_model_relation: finetune"]
    lines += ["library_name: transformers", "tags:", "- depth-up-scaling", f"- {job.method.name}", "---", ""]
    lines += [
        f"# {base.rsplit('/', 1)[-1]}, {job.whole_plan.base_layers} → {job.whole_plan.layers} layers",
        "",
        f"`{base}` ({job.anatomy.family}) grown deeper with {named}: "
        f"{manifest['parameters']['base'] / 1e6:,.1f} M → {manifest['parameters']['result'] / 1e6:,.1f} M parameters. "
        f"**It has not been trained since**; {then} {trained}.",
        "",
        "The output projections of the new layers are zero, so it computes exactly what its base computes."
        if kept
        else "The new layers change what the model computes: measure it before you use it."
        + ("" if job.output_scale == 1 else f" Their output projections are multiplied by {job.output_scale:g}."),
        "",
        *_left_out(expansion),
        *_widths(expansion),
        f"New layers: {', '.join(map(str, manifest['new_layers']))}. `expansion.json` says where each layer comes from"
        + (" and how well each weight type was predicted." if manifest["fit"] else "."),
        "",
    ]
    return "\n".join(lines)


def _left_out(expansion: Expansion) -> list[str]:
    """What the base has and this has not."""
    parts = expansion.checkpoint.left_out
    return [f"It is the language model of its base alone, without {', '.join(parts)}.", ""] if parts else []


def _widths(expansion: Expansion) -> list[str]:
    """What to know of a model whose new layers have widths of their own."""
    family, now = expansion.job.anatomy.family, expansion.config.get("model_type")
    if expansion.job.widths is None:
        return []
    told = (
        "Its layers differ in width: `config.json` has the FFN width and the query heads of each, `expansion.json` "
        "what was kept of the new ones."
    )
    if family != now:
        told += (
            f" Such layers need a class of their own, so it is no longer {family} but {now}. The code is beside the "
            "weights: load it with `trust_remote_code=True`."
        )
    return [told, ""]
