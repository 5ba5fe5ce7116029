"""What goes along with new weights, and what is of the old ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from lesa_ray import Expanded
from lesa_ray.checkpoint.side_files import side_files


def test_weights_of_other_frameworks_stay_behind() -> None:
    kept = ["tokenizer.json", "chat_template.jinja", "modeling_x.py", "LICENSE", "tokenizer.model"]
    weights = ["rust_model.ot", "64.tflite", "model.onnx", "model.onnx_data", "m.nemo", "model.pdparams", "imatrix.dat"]
    assert side_files([*kept, *weights]) == kept


def test_templates_in_their_folder_go_along(
    bases: Callable[[str], str], grow: Callable[..., Expanded], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(bases("llama"), tmp_path / "base"))
    (base / "additional_chat_templates").mkdir()
    for name in ("tool_use.jinja", "notes.txt"):
        (base / "additional_chat_templates" / name).write_text(name)
    out = Path(grow(str(base), method="solar").out)
    copied = list((out / "additional_chat_templates").iterdir())
    assert [(file.name, file.read_text()) for file in copied] == [("tool_use.jinja", "tool_use.jinja")]
