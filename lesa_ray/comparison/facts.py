"""What an arm is before anything runs: its layers and parameters, what is trained, and the FLOPs of a token.

Read off headers and a model without weights (on the meta device), so an arm that cannot be grown, or names parameters
that are not there, is found in seconds. The FLOPs decide how long the control of equal compute is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lesa_ray.checkpoint.manifest import Manifest
from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.config import ExpandConfig
from lesa_ray.errors import UserError
from lesa_ray.store.identity import canonical
from lesa_ray.training.train_settings import TrainConfig


@dataclass(frozen=True)
class Facts:
    """flops_per_token: of training, forward and backward (`lesa_ray.training.flops`)."""

    family: str
    layers: int
    parameters: int
    trained_parameters: int
    flops_per_token: float


class FactFinder:
    """Looks at arms of one base."""

    def __init__(self, base: str, seq_len: int) -> None:
        """Raises: UserError if there is no such base; MachineError."""
        self._base, self._seq_len = open_checkpoint(base), seq_len
        self._known: dict[bytes, Facts] = {}

    def of_base(self, train: tuple[str, ...]) -> Facts:
        """The base as it is. Raises: UserError if `train` names nothing of it."""
        return self._of(self._base.config, train, None, f"base {self._base.base}")

    def of_expansion(self, config: ExpandConfig, training: TrainConfig, where: str) -> Facts:
        """The base grown. Raises: UserError, which begins with `where`, for settings that do not suit the base."""
        from lesa_ray.expansion.out import make_manifest
        from lesa_ray.expansion.prepare import prepare
        from lesa_ray.training.insertion import plan_insertion

        try:
            expansion = prepare(config)
            manifest = make_manifest(expansion, {unit.name: {} for unit in expansion.units})
            plan_insertion(training, manifest, 1, "the grown base")
            return self._of(expansion.config, training.train, manifest, "the grown base")
        except UserError as error:
            raise UserError(f"{where}: {error}") from error

    def _of(
        self, architecture: Mapping[str, Any], train: tuple[str, ...], manifest: Manifest | None, where: str
    ) -> Facts:
        from lesa_ray.checkpoint.settings import longest_window
        from lesa_ray.training.flops import step_flops
        from lesa_ray.training.freeze import default_choice, freeze, trained_names
        from lesa_ray.training.model import build

        chosen = train or default_choice(manifest, where)
        key = canonical([architecture, chosen, manifest and manifest["new_layers"]])
        if key in self._known:
            return self._known[key]
        model = build(dict(architecture), where)
        text_config = model.config.get_text_config()
        positions = longest_window(text_config)
        if positions is not None and positions < self._seq_len:
            raise UserError(f"{where}: was made for {positions} tokens, the rows of the data have {self._seq_len}")
        trained = trained_names(model, chosen, manifest, where)
        lowest = freeze(model, trained)
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        facts = Facts(
            family=str(architecture.get("model_type")),
            layers=int(text_config.num_hidden_layers),
            parameters=sum(sizes.values()),
            trained_parameters=sum(sizes[name] for name in trained),
            flops_per_token=step_flops(model, tokens=1, seq_len=self._seq_len, lowest_layer=lowest),
        )
        self._known[key] = facts
        return facts
