"""SOLAR: depth up-scaling by stacking (arXiv 2312.15166, section 2).

The result is layers [0, L-m) followed by [m, L), with m = L - T/2; everything is trained afterwards. A layer that
comes a second time counts as new. Nothing is computed: it costs the copying of the files."""

from __future__ import annotations

from lesa_ray.errors import UserError
from lesa_ray.expansion.method import Job, Method, Unit
from lesa_ray.expansion.plan import Plan, stacked


class Solar(Method):
    name = "solar"
    title = "SOLAR"
    paper = "https://arxiv.org/abs/2312.15166"
    position = "stacked"
    zero_init = False
    vectors = "lower"
    copies = True
    trains = "all"
    minimum_layers = 1
    draws = False

    def plan(self, base_layers: int, layers: int, position: str | None) -> Plan:
        if position is not None:
            raise UserError(f"--position {position}: solar stacks two runs of layers, so it takes no positions")
        return stacked(base_layers, layers)

    def units(self, job: Job) -> list[Unit]:
        return []
