"""A fleet's stages as a graph, each with its place in the store before anything runs.

    tokenize(family) ───────────────────┬──────────────────────────────┐
    expand(family, method, factor) ──▶ pretrain ──▶ finetune ──▶ evaluate, beside the base

What is wrong with a stage's settings is found here, for all stages, before anything runs. What is wrong with a family's
inputs (a checkpoint that is not there) is noted with its stages: the other families do not wait for it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lesa_ray.fleet.settings import Family, FleetConfig
from lesa_ray.fleet.stages import Options, Source, Stage, StageBuilder, for_method, merged


def build(config: FleetConfig, where: str) -> list[Stage]:
    """All stages, each after those it needs.

    where: what messages call the fleet's file. Raises: UserError naming the first setting that is wrong."""
    with ThreadPoolExecutor(8) as pool:
        fleet = _Fleet(config, where, StageBuilder(config.what, pool))
        for family in config.families:
            fleet.add(family)
        return fleet.builder.finished()


class _Fleet:
    """Adds a family's stages to the graph."""

    def __init__(self, config: FleetConfig, where: str, builder: StageBuilder) -> None:
        self._config, self._where, self.builder = config, where, builder

    def add(self, family: Family) -> None:
        config, base, blocks = self._config, self.builder.checkpoint(family.checkpoint), None
        if "tokenize" in config.stages:
            tokenizer = family.tokenizer or family.checkpoint
            blocks = self.builder.tokenize(family.name, self._options(family, "tokenize"), family.data, tokenizer)
        if "expand" not in config.stages:
            self._add_chain(family, family.name, [base], blocks)
            return
        for method in config.methods:
            options = self._options(family, "expand")
            fitting = Options(for_method(options.settings, method), options.where, options.resources)
            for factor in config.factors:
                label = f"{family.name}-{method}-x{factor:g}"
                deeper = self.builder.expand(label, fitting, base, method=method, factor=factor)
                self._add_chain(family, label, [base, deeper], blocks)

    def _add_chain(self, family: Family, label: str, checkpoints: list[Source], blocks: Source | None) -> None:
        """What is done with a checkpoint, the last of `checkpoints`."""
        stages, builder = self._config.stages, self.builder
        if "pretrain" in stages:
            assert blocks is not None
            options = self._options(family, "pretrain")
            checkpoints.append(builder.pretrain(label, options, checkpoints[-1], blocks))
        if "finetune" in stages:
            checkpoints.append(builder.finetune(label, self._options(family, "finetune"), checkpoints[-1]))
        if "evaluate" in stages:
            builder.evaluate(label, self._options(family, "evaluate"), checkpoints, blocks)

    def _options(self, family: Family, kind: Any) -> Options:
        """A stage's settings from the file: the fleet's, the family's on top."""
        more = merged(self._config.stages[kind], family.stages.get(kind, {}))
        resources = family.resources.get(kind) or self._config.resources.get(kind)
        return Options(more, f"{self._where}: stages.{kind}", resources)
