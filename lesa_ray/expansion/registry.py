"""The methods, by name. A new method is a file in `methods/` and a line here; the tests walk this registry."""

from __future__ import annotations

from lesa_ray.errors import UserError
from lesa_ray.expansion.auto import AUTO
from lesa_ray.expansion.method import Method
from lesa_ray.expansion.methods.aligned_lesa import AlignedLesa
from lesa_ray.expansion.methods.avg_deus import AvgDeus
from lesa_ray.expansion.methods.copy_lower import CopyLower
from lesa_ray.expansion.methods.lesa import Lesa
from lesa_ray.expansion.methods.llama_pro import LlamaPro
from lesa_ray.expansion.methods.mean_aligned import MeanAligned
from lesa_ray.expansion.methods.opt_deus import OptDeus
from lesa_ray.expansion.methods.random_layers import RandomLayers
from lesa_ray.expansion.methods.solar import Solar

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Lesa(),
        LlamaPro(),
        Solar(),
        AvgDeus(),
        OptDeus(),
        AlignedLesa(),
        MeanAligned(),
        RandomLayers(),
        CopyLower(),
    )
}


def get_method(name: str) -> Method:
    """The method of that name. Raises: UserError that lists the names there are."""
    if name not in METHODS:
        raise UserError(f"--method {name}: unknown; use one of {', '.join(METHODS)}, or {AUTO}")
    return METHODS[name]
