"""The card of a trained checkpoint."""

from __future__ import annotations

from typing import Any

from lesa_ray.report.training_card import training_card


def test_a_card_takes_no_words_of_its_own_from_an_expansion() -> None:
    manifest: Any = {
        "base": "hf://me/model\nlicense: mit\n---\n# Buy",
        "method": "lesa\n- best",
        "paper": "https://host) [this](https://other",
        "layers": [{}, {}],
        "new_layers": [1, "![](https://host/pixel)"],
    }
    card = training_card(None, manifest, {"model_type": "llama"}, {})
    front = "---\nlibrary_name: transformers\ntags:\n- depth-up-scaling\n---\n"
    assert card.startswith(front)
    assert not any(word in card for word in ("license: mit", "# Buy", "best", "https://"))
    assert "New layers: 1; " in card
