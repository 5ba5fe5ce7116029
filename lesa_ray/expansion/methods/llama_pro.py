"""LLaMA Pro: block expansion (arXiv 2401.02415; github.com/TencentARC/LLaMA-Pro, scripts/block_expansion.py).

The layers fall into groups; after each group comes a copy of its last layer whose output projections are zero, so that
the function is kept. Only the copies are trained. Nothing is computed: it costs the copying of the files.
"""

from __future__ import annotations

from lesa_ray.expansion.method import Job, Method, Unit
from lesa_ray.expansion.plan import Plan, after_groups, between


class LlamaPro(Method):
    name = "llama-pro"
    title = "LLaMA Pro"
    paper = "https://arxiv.org/abs/2401.02415"
    position = "groups"
    zero_init = True
    vectors = "lower"
    copies = True
    minimum_layers = 1
    draws = False

    def plan(self, base_layers: int, layers: int, position: str | None) -> Plan:
        if position is None:
            return after_groups(base_layers, layers)
        return between(base_layers, layers, position)

    def units(self, job: Job) -> list[Unit]:
        return []
