"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from lesa_ray.training.train_settings import TrainConfig


def warmup_steps(config: TrainConfig, steps: int) -> int:
    """Steps of linear rise: `warmup` below 1 is a share of all."""
    return round(config.warmup * steps) if config.warmup < 1 else min(int(config.warmup), steps)


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """The rate of step 0 … steps − 1.

    A linear rise that reaches the peak with the last step of the warm-up; then a fall that would reach `final_rate` one
    step after the last, so that no step is wasted on a rate of zero."""
    rise = warmup_steps(config, steps)
    if step < rise:
        return config.learning_rate * (step + 1) / rise
    if config.schedule == "constant":
        return config.learning_rate
    fall = steps - rise
    if config.schedule == "wsd":  # a run that is hardly longer than its warm-up has no room for the whole fall
        fall = min(fall, max(1, round(config.decay * steps)))
    done = max(0.0, (step - (steps - fall)) / fall)  # 0 … 1
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.learning_rate * (config.final_rate + (1 - config.final_rate) * left)
