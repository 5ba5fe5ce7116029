"""What happens at which step of a run, what is said of it, and the held-out loss; by one worker, in this process."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lesa_ray.errors import UserError
from lesa_ray.training import loop
from lesa_ray.training.batches import spread
from lesa_ray.training.loop import Loop, Place, Progress, Trainer, make_optimizer, total_steps
from lesa_ray.training.tokens import Split, TokenBlocks, open_blocks
from lesa_ray.training.train_settings import TrainConfig
from tests.training.blocks import make_blocks

VOCAB, SEQ, BATCH = 128, 32, 4
CPU = torch.device("cpu")
ALONE = Place(0, 1, CPU)


class Bigrams(nn.Module):
    """Logits that depend on the last token alone. Its dropout must be off where it is measured."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCAB, VOCAB)
        self.dropout = nn.Dropout(0.5)
        self.shift = nn.Parameter(torch.zeros(1))
        self.steep = False

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        logits = self.dropout(self.table(input_ids))
        nothing = self.shift - self.shift.detach()  # of which a root has no gradient
        return SimpleNamespace(logits=logits + (nothing.abs().sqrt() if self.steep else nothing))


class Recorder:
    """In place of metrics and of what writes checkpoints."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.flushed: list[tuple[int, bool]] = []
        self.saved: list[tuple[int, int, float | None]] = []
        self.waited = False
        self.completed = self.polls = 0

    def row(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append({"step": step, **values})

    def flush(self, now: bool = False) -> None:
        self.flushed.append((self.rows[-1]["step"], now))

    def save(self, step: int, tokens: int, heldout_loss: float | None, *_: object) -> None:
        self.saved.append((step, tokens, heldout_loss))

    def poll(self) -> bool:
        """As if what was begun were there three steps later."""
        self.polls += 1
        if self.saved and self.polls == self.saved[-1][0] + 3:
            self.completed = self.saved[-1][0]
            return True
        return False

    def wait(self) -> None:
        self.waited = True


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> TokenBlocks:
    return open_blocks(make_blocks(str(tmp_path_factory.mktemp("blocks")), vocab=VOCAB, seq_len=SEQ, rows=24))


def config(**more: Any) -> TrainConfig:
    given = {"checkpoint": "c", "data": "d", "out": "o", "batch": BATCH, "steps": 5, "eval_every": 2, "log_every": 4,
             "checkpoint_every": 3, "learning_rate": 0.01}  # fmt: skip
    return TrainConfig.model_validate({**given, **more})


def trainer(settings: TrainConfig, model: Bigrams, place: Place = ALONE) -> Trainer:
    trained = dict(model.named_parameters())
    assert settings.steps is not None
    return Trainer(model, trained, make_optimizer(trained, settings), settings, place, settings.steps, SEQ)


def loss_of(model: Bigrams, ids: np.ndarray) -> float:
    """The reference, in float64: mean of -log p of every token but a row's first."""
    with torch.no_grad():
        logits = model.table.weight.double()[torch.from_numpy(ids).long()[:, :-1]]  # (rows, SEQ - 1, VOCAB)
        found = torch.log_softmax(logits, -1).gather(-1, torch.from_numpy(ids).long()[:, 1:, None])
    return -found.mean().item()


def run(settings: TrainConfig, blocks: TokenBlocks, model: Bigrams, first: int = 0) -> tuple[Recorder, list[Progress]]:
    record, told = Recorder(), list[Progress]()
    saver: Any = record
    Loop(trainer(settings, model), blocks, saver, record, told.append, 1000.0, 500.0).run(first)
    return record, told


def test_what_happens_at_which_step(blocks: TokenBlocks, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()  # a second passes from each look at it to the next
    # The loop's own name, not the module's function: a thread that another test left behind looks at that too.
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    model = Bigrams()
    before = loss_of(model, blocks.heldout.read(range(8))["input_ids"])
    record, told = run(config(), blocks, model)
    after = loss_of(model, blocks.heldout.read(range(8))["input_ids"])
    heldout = {row["step"]: row["heldout_loss"] for row in record.rows if "heldout_loss" in row}
    assert list(heldout) == [0, 2, 4, 5]
    assert (heldout[0], heldout[5]) == (pytest.approx(before, rel=1e-6), pytest.approx(after, rel=1e-6))
    assert after < before
    assert model.training
    assert record.saved == [(3, 3 * BATCH * SEQ, None), (5, 5 * BATCH * SEQ, heldout[5])]
    assert record.flushed == [(2, False), (3, True), (4, False), (5, True)]
    assert record.waited
    steps = [row for row in record.rows if "loss" in row]
    assert [(row["step"], row["tokens"]) for row in steps] == [(n, n * BATCH * SEQ) for n in range(1, 6)]
    rates = [0.01 * 0.5 * (1 + math.cos(math.pi * step / 5)) for step in range(5)]
    assert [row["learning_rate"] for row in steps] == pytest.approx(rates)
    paces = {row["step"]: row["tokens_per_second"] for row in steps if "tokens_per_second" in row}
    assert paces == {n: many * BATCH * SEQ for n, many in ((2, 2), (3, 1), (4, 1), (5, 1))}
    assert [row["model_flops_per_second"] for row in steps if "mfu" in row] == [2000, 1000, 1000, 1000]
    assert [row["mfu"] for row in steps if "mfu" in row] == [4, 2, 2, 2]
    assert [(one.step, one.heldout_loss) for one in told] == [(2, heldout[0]), (3, heldout[2]), (4, heldout[2]),
                                                              (5, heldout[4])]  # fmt: skip
    assert [one.seconds_left for one in told] == [1.5, 2, 1, 0]


def test_a_checkpoint_counts_as_soon_as_it_is_there(blocks: TokenBlocks) -> None:
    """And whoever waits for it hears of it then, not with the next row."""
    record, told = run(config(steps=20, log_every=10, eval_every=20, checkpoint_every=10), blocks, Bigrams())
    assert record.polls == 20
    assert [(one.step, one.saved) for one in told] == [(10, 0), (10, 10), (20, 10)]


def test_the_share_of_the_peak_is_of_all_workers(blocks: TokenBlocks) -> None:
    nothing: Any = None
    four = trainer(config(), Bigrams(), Place(0, 4, CPU))
    assert Loop(four, blocks, nothing, None, nothing, 1000.0, 500.0)._speed(2.0)["mfu"] == 1000 / 2 / (4 * 500)


def test_a_run_that_goes_on_measures_nothing_before_it(blocks: TokenBlocks) -> None:
    record, _ = run(config(), blocks, Bigrams(), first=3)
    assert [row["step"] for row in record.rows if "heldout_loss" in row] == [4, 5]
    assert [row["step"] for row in record.rows if "loss" in row] == [4, 5]
    record, _ = run(config(eval_rows=0), blocks, Bigrams())
    assert not any("heldout_loss" in row for row in record.rows)
    assert record.saved == [(3, 3 * BATCH * SEQ, None), (5, 5 * BATCH * SEQ, None)]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_step_that_is_no_number_is_named(what: str, blocks: TokenBlocks) -> None:
    """The third of four that are looked at together."""
    model, steps = Bigrams(), itertools.count()

    def spoil(*_: object) -> None:
        if next(steps) == 2:
            model.steep = what == "gradient"
            if what == "loss":
                with torch.no_grad():
                    model.table.weight.fill_(math.nan)

    model.register_forward_pre_hook(spoil)
    with pytest.raises(UserError, match=rf"^step 3: the {what} is nan; the last checkpoint is kept\."):
        run(config(eval_rows=0, checkpoint_every=9, weight_decay=0.0, clip=1e9), blocks, model)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_rows_that_fill_a_worker_up_are_not_measured(
    micro: int, blocks: TokenBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two workers has three of seven rows, and one that fills up."""
    monkeypatch.setattr(dist, "all_reduce", lambda *_: None)
    model = Bigrams()
    second = trainer(config(batch=8, micro_batch=micro), model, Place(1, 2, CPU))
    rows = blocks.heldout.read(spread(7, 8)[4:])["input_ids"]
    assert second.heldout_loss(blocks.heldout, 7) == pytest.approx(loss_of(model, rows), rel=1e-6)


def test_a_step_of_which_nothing_is_scored_is_refused() -> None:
    rows = {"input_ids": np.zeros((BATCH, SEQ), np.int32), "labels": np.full((BATCH, SEQ), -100, np.int32)}
    with pytest.raises(UserError, match=r"^step 8: no token of its 4 rows is scored; give a larger batch"):
        trainer(config(), Bigrams()).step(7, rows)


def test_weights_decay_and_biases_do_not() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    optimizer = make_optimizer(dict(model.named_parameters()), config(weight_decay=0.3))
    decays = {id(one): group["weight_decay"] for group in optimizer.param_groups for one in group["params"]}
    assert [decays[id(one)] for one in model.parameters()] == [0.3, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("given", "rows", "steps"),
    [
        ({"steps": 7}, 25, 7),
        ({"tokens": BATCH * SEQ * 3}, 25, 3),
        ({"tokens": BATCH * SEQ * 3 + 1}, 25, 4),
        ({"epochs": 2.0}, 25, 13),
        ({"epochs": 0.01}, 25, 1),
        ({}, 24, 6),
        ({}, 25, 7),
    ],
)
def test_how_many_steps_there_are(given: dict[str, Any], rows: int, steps: int) -> None:
    split = Split("unused", "train", "text", SEQ, 8, rows, rows * SEQ, ())
    assert total_steps(config(**{"steps": None, **given}), split, SEQ) == steps
