"""What a predictor has to beat: predicting zero, and the mean of the two neighbours. The third yardstick, ridge
regression, has a file of its own (`lesa_ray.lesa.ridge`).

On small models G fits worse than predicting zero, and ridge better than G, so every fit is reported beside them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def zero(lower: Tensor, upper: Tensor) -> Tensor:
    return torch.zeros_like(lower)


def mean(lower: Tensor, upper: Tensor) -> Tensor:
    return (lower + upper) / 2
