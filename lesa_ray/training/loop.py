"""The training loop of one worker: rows → micro-batches → gradients → one optimizer step; what is said of it, and when.

Decides
- The loss of a step is the mean over all scored tokens of its rows, whatever worker or micro-batch they fell to.
- A row of metrics for every step (loss before the step, norm of the gradient, learning rate), looked at every
  `log_every` steps, so that the device is not waited for in between. If the loss is not a number there, the run stops;
  checkpoints are only begun after looking, so the last one is good.
- The loss is that of the next token alone: a mixture of experts' auxiliary loss, which balances experts from scratch,
  is not added.
- Held-out loss, checkpoints and the rest happen between steps, at step numbers alone, so that all workers agree.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from lesa_ray.errors import UserError
from lesa_ray.expansion.runner import own_peak_memory
from lesa_ray.training.batches import Rows, cut, labelled, scored_tokens, spread, step_rows, worker_share
from lesa_ray.training.checkpoints import Saver
from lesa_ray.training.gates import Gates
from lesa_ray.training.long_rows import losses_in_pieces
from lesa_ray.training.schedule import learning_rate
from lesa_ray.training.tokens import UNSCORED, Split, TokenBlocks
from lesa_ray.training.train_settings import TrainConfig

_MICRO_TOKENS = 4096
"""Logits and their gradient take 12 bytes a token and entry of the vocabulary: 6 GB at 128,256. So a micro-batch has no
more unless it is one row, or asked for; and one that has more gets its logits a piece of so many tokens at a time."""


class Metrics(Protocol):
    """Where rows of metrics go (rank 0 alone has one)."""

    def row(self, step: int, values: Mapping[str, float]) -> None: ...

    def flush(self, now: bool = False) -> None: ...


@dataclass(frozen=True)
class Progress:
    """What a person wants to know now and then."""

    step: int
    steps: int
    loss: float
    heldout_loss: float | None
    tokens_per_second: float
    mfu: float | None
    seconds_left: float
    inserted: float
    """How far new layers are in (mean of their gates); below 1 losses are the gated model's."""
    saved: int
    """Step of the last complete checkpoint; 0 before the first."""


@dataclass(frozen=True)
class Place:
    """This worker among the others."""

    rank: int
    workers: int
    device: torch.device


def make_optimizer(trained: Mapping[str, nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices, not on norms and biases."""
    decayed = [parameter for parameter in trained.values() if parameter.ndim > 1]
    others = [parameter for parameter in trained.values() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.learning_rate, betas=config.betas, fused=True
    )


def total_steps(config: TrainConfig, split: Split, seq_len: int) -> int:
    """Optimizer steps of the run."""
    if config.steps is not None:
        return config.steps
    if config.tokens is not None:
        return -(-config.tokens // (seq_len * config.batch))
    return math.ceil(split.rows * (config.epochs or 1.0) / config.batch)


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of cross-entropies, in nats. logits: (B, T, vocabulary), of which [:, t] predicts labels (B, T)[:, t + 1]."""
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=UNSCORED, reduction="sum"
    )


class Trainer:
    """One worker's model and optimizer, and the step."""

    def __init__(
        self,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        place: Place,
        steps: int,
        seq_len: int,
        scored: int | None = None,
        gates: Gates | None = None,
    ) -> None:
        """scored: tokens that are predicted in a step, over all workers, where it is always the same number. gates:
        of new layers that come in gradually."""
        self.model, self.optimizer, self.trained = model, optimizer, trained
        self.config, self.place, self.steps = config, place, steps
        share = -(-config.batch // place.workers)
        self.micro = min(config.micro_batch or max(1, _MICRO_TOKENS // seq_len), share)
        self._scored = scored
        self.gates = gates
        self._loss_sum = torch.compile(token_losses) if config.compile else token_losses
        # A graph for each shape: with one for all, made when the second comes, pieces of the first would be made anew
        # by another graph than they were made by, which saves other tensors.
        self._piece_loss = torch.compile(token_losses, dynamic=False) if config.compile else token_losses

    def losses(self, rows: Rows) -> torch.Tensor:
        """Sum of the losses of some rows, in nats."""
        inputs = self._tensors(rows)
        labels = inputs.pop("labels")
        if labels.numel() > _MICRO_TOKENS:
            return losses_in_pieces(self.model, inputs, labels, self._piece_loss, _MICRO_TOKENS)
        logits = self.model(**inputs, use_cache=False).logits
        loss: torch.Tensor = self._loss_sum(logits, labels)
        return loss

    def _tensors(self, rows: Rows) -> dict[str, torch.Tensor]:
        return {
            name: torch.from_numpy(column.astype(np.int64)).to(self.place.device, non_blocking=True)
            for name, column in rows.items()
        }

    def step(self, step: int, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step on this worker's rows.

        Returns the loss it began with, summed over this worker's tokens and divided by everybody's, and the norm of the
        gradient before clipping."""
        if self.gates is not None:
            self.gates.set(step + 1)
        count = self._scored or self._count(step, rows)
        total = torch.zeros((), dtype=torch.float64 if self.place.device.type == "cpu" else torch.float32,
                            device=self.place.device)  # fmt: skip
        for micro in cut(rows, self.micro):
            loss = self.losses(micro) / count
            # FSDP2 takes the mean of the workers' gradients; what is wanted is their sum.
            torch.autograd.backward(loss * self.place.workers)
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.config.clip)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.steps, self.config)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm.to(self.place.device)

    def _count(self, step: int, rows: Rows) -> int:
        """The scored tokens of all workers. Counted on the CPU, so that a GPU is not waited for."""
        count = torch.tensor(scored_tokens(rows["labels"]))
        dist.all_reduce(count)
        if not count.item():
            raise UserError(f"step {step + 1}: no token of its {self.config.batch} rows is scored; give a larger batch")
        return int(count.item())

    @torch.no_grad()
    def heldout_loss(self, split: Split, rows: int) -> float:
        """Mean loss over `rows` rows, shared among the workers."""
        sums = torch.zeros(2, dtype=torch.float64)
        own, filler = worker_share(spread(rows, split.rows), self.place.rank, self.place.workers)
        self.model.eval()
        for first in range(0, len(own), self.micro):
            part = own[first : first + self.micro]
            padding = max(0, first + len(part) - (len(own) - filler))
            found = labelled(split.read(part), min(padding, len(part)))
            sums += torch.tensor([float(self.losses(found)), scored_tokens(found["labels"])], dtype=torch.float64)
        self.model.train()
        sums = sums.to(self.place.device, torch.float64)
        dist.all_reduce(sums)
        return float(sums[0] / sums[1])


class Feed:
    """The rows of this worker for step after step, the next ones read while a step is computed."""

    def __init__(self, blocks: TokenBlocks, config: TrainConfig, place: Place) -> None:
        self._blocks, self._config, self._place = blocks, config, place

    def rows(self, step: int) -> Rows:
        split = self._blocks.train
        indices = step_rows(step, self._config.batch, split.rows, self._blocks.rows_per_group, self._config.seed)
        own, filler = worker_share(indices, self._place.rank, self._place.workers)
        return labelled(split.read(own), filler)

    def __call__(self, first: int, steps: int) -> Iterator[tuple[int, Rows]]:
        with ThreadPoolExecutor(1, thread_name_prefix="rows") as ahead:
            coming = ahead.submit(self.rows, first) if first < steps else None
            for step in range(first, steps):
                assert coming is not None
                rows = coming.result()
                coming = ahead.submit(self.rows, step + 1) if step + 1 < steps else None
                yield step, rows


@dataclass
class Loop:
    """A run from some step to its end. `tell` is called on rank 0 with progress."""

    trainer: Trainer
    blocks: TokenBlocks
    saver: Saver
    metrics: Metrics | None
    tell: Callable[[Progress], None]
    flops_per_step: float
    peak_flops: float | None
    """Of one worker's device; None where it is not known."""
    _told: Progress | None = None

    def run(self, first: int) -> None:
        """Train from step `first` to the end. Raises: UserError if the loss is not a number."""
        trainer, config = self.trainer, self.trainer.config
        steps, seq_len, gates = trainer.steps, self.blocks.seq_len, trainer.gates
        rows = min(config.eval_rows, self.blocks.heldout.rows)
        heldout = None
        if rows and first == 0:
            heldout = trainer.heldout_loss(self.blocks.heldout, rows)
            self._write(0, {"heldout_loss": heldout, **self._inserted(0)})
        window: list[tuple[torch.Tensor, torch.Tensor]] = []
        begun = time.monotonic()
        for step, batch in Feed(self.blocks, config, trainer.place)(first, steps):
            window.append(trainer.step(step, batch))
            done = step + 1
            if self.saver.poll():
                self._tell_saved()
            evaluate = rows and (done % config.eval_every == 0 or done == steps)
            save = done % config.checkpoint_every == 0 or done == steps
            if not (done % config.log_every == 0 or evaluate or save):
                continue
            losses, norms = self._look(window, done)
            seconds = (time.monotonic() - begun) / len(window)
            window = []
            self._tell_rows(done, losses, norms, seconds, heldout)
            if evaluate:
                heldout = trainer.heldout_loss(self.blocks.heldout, rows)
                self._write(done, {"heldout_loss": heldout, **self._inserted(done)})
            if self.metrics is not None:
                self.metrics.flush(now=save)  # no row before a checkpoint can be lost
            if save:
                tokens = done * config.batch * seq_len
                measured = evaluate and (gates is None or gates.are_open(done))  # of what is saved
                self.saver.save(done, tokens, heldout if measured else None, trainer.trained, trainer.optimizer)
            begun = time.monotonic()
        self.saver.wait()

    def _look(self, window: list[tuple[torch.Tensor, torch.Tensor]], done: int) -> tuple[list[float], list[float]]:
        """The losses and gradient norms since the last look, over all workers."""
        losses = torch.stack([loss for loss, _ in window])
        dist.all_reduce(losses)
        values = losses.tolist()
        norms = torch.stack([norm for _, norm in window]).tolist()
        for index, (loss, norm) in enumerate(zip(values, norms, strict=True)):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                step, config = done - len(window) + index + 1, self.trainer.config
                what = "loss" if not math.isfinite(loss) else "gradient"
                raise UserError(
                    f"step {step}: the {what} is {loss if what == 'loss' else norm}; the last checkpoint is kept. "
                    f"Lower learning_rate ({config.learning_rate:g}), or look at the data of this step"
                )
        return values, norms

    def _speed(self, seconds: float) -> dict[str, float]:
        """seconds: of one step."""
        place, config = self.trainer.place, self.trainer.config
        values = {
            "tokens_per_second": config.batch * self.blocks.seq_len / seconds,
            "model_flops_per_second": self.flops_per_step / seconds,
        }
        if self.peak_flops is not None:
            values["mfu"] = values["model_flops_per_second"] / (self.peak_flops * place.workers)
        cuda = place.device.type == "cuda"
        values["peak_memory"] = float(torch.cuda.max_memory_allocated(place.device) if cuda else own_peak_memory())
        return values

    def _tell_rows(
        self, done: int, losses: list[float], norms: list[float], seconds: float, heldout: float | None
    ) -> None:
        """Rows of metrics for the steps that end with step number `done`, and a line of progress."""
        trainer = self.trainer
        if trainer.place.rank:
            return
        first, speed = done - len(losses), self._speed(seconds)
        for index, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            values = {
                "loss": loss,
                "gradient_norm": norm,
                "learning_rate": learning_rate(first + index, trainer.steps, trainer.config),
                "tokens": float((first + index + 1) * trainer.config.batch * self.blocks.seq_len),
                **self._inserted(first + index + 1),
            }
            self._write(first + index + 1, values | (speed if first + index + 1 == done else {}))
        left = seconds * (trainer.steps - done)
        rate = speed["tokens_per_second"]
        inserted = self._inserted(done).get("inserted", 1.0)
        mfu, saved = speed.get("mfu"), self.saver.completed
        self._told = Progress(done, trainer.steps, losses[-1], heldout, rate, mfu, left, inserted, saved)
        self.tell(self._told)

    def _tell_saved(self) -> None:
        """The same progress again, once a checkpoint is complete: who waits for one need not wait for the next line."""
        if self._told is not None:
            self._told = replace(self._told, saved=self.saver.completed)
            self.tell(self._told)

    def _inserted(self, done: int) -> dict[str, float]:
        """How far new layers are in, where they come in gradually: a loss of that row is the gated model's."""
        gates = self.trainer.gates
        return {} if gates is None else {"inserted": gates.insertion.share(done)}

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.row(step, values)
