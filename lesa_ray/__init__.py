"""Grow a pretrained language model deeper, on a Ray cluster.

from lesa_ray import ExpandConfig, expand
expand(ExpandConfig(base="meta-llama/Llama-3.1-8B", out="llama-12b", method="lesa", factor=1.5))
"""

__version__ = "0.1.0"  # before the imports: modules below read it while they are loaded

from lesa_ray.config import ExpandConfig, LesaSettings
from lesa_ray.distributed.expand import Expanded, expand
from lesa_ray.errors import MachineError, UserError

__all__ = ["ExpandConfig", "Expanded", "LesaSettings", "MachineError", "UserError", "expand"]
