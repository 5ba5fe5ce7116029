"""Which ids of the pieces go into which rows, where there is hardly enough for a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import MachineError, UserError
from lesa_ray.training.data_settings import TokenizeConfig
from lesa_ray.training.layout import Layout, Stretch, plan_chat, plan_text, write_file
from lesa_ray.training.pieces import Job, PieceRecord, piece_file

SEQ = 8


def job(out: str = "out", **settings: Any) -> Job:
    given = {"data": ["a"], "tokenizer": "b", "out": out, "seq_len": SEQ, **settings}
    return Job(TokenizeConfig.model_validate(given), "", rows_per_group=4, groups_per_file=100)


def record(train: int = 0, heldout: int = 0, lengths: tuple[int, ...] = ()) -> PieceRecord:
    """Of a piece with so many tokens of text, or with conversations of such lengths to train on."""
    return PieceRecord(
        key="piece",
        counts={},
        bad=[],
        tokens={"train": train, "heldout": heldout},
        largest_id=0,
        lengths={"train": list(lengths), "heldout": []},
        digests=[],
    )


def stretches(plan: Layout, split: str) -> list[Stretch]:
    return [stretch for file in plan.files if file.name.startswith(f"{split}/") for stretch in file.stretches]


def test_held_out_documents_that_fill_no_row_are_filled_up_from_the_end() -> None:
    plan = plan_text(job(holdout=0.01), [record(train=1000, heldout=5)])
    train, heldout = piece_file("piece", "train"), piece_file("piece", "heldout")
    assert stretches(plan, "heldout") == [Stretch(train, 997, 3), Stretch(heldout, 0, 5)]
    assert stretches(plan, "train") == [Stretch(train, 0, 992)]
    assert plan.heldout_from_end == 3
    assert plan.tokens == {"train": 992, "heldout": 8}
    assert plan.dropped == {"train": 5, "heldout": 0}


def test_a_row_to_train_on_comes_before_one_that_is_held_out() -> None:
    for tokens in (SEQ, 2 * SEQ - 1):
        plan = plan_text(job(holdout=0.5), [record(train=tokens)])
        assert plan.tokens == {"train": SEQ, "heldout": 0}
        assert plan.heldout_from_end == 0
    assert plan_text(job(holdout=0.5), [record(train=2 * SEQ)]).tokens == {"train": SEQ, "heldout": SEQ}
    with pytest.raises(UserError, match="gives 7 tokens to train on, less than one row of 8"):
        plan_text(job(holdout=0.5), [record(train=SEQ - 1)])


def test_the_only_conversation_is_trained_on() -> None:
    plan = plan_chat(job(kind="chat", holdout=0.5), [record(lengths=(6,))], pad=0)
    assert (plan.tokens, plan.heldout_from_end) == ({"train": 6, "heldout": 0}, 0)


@pytest.mark.parametrize("left", [0, 4 * SEQ, 4 * 2 * SEQ - 1])
def test_ids_that_were_cut_off_in_scratch_are_a_fault_of_the_machine(tmp_path: Path, left: int) -> None:
    of = job(str(tmp_path), holdout=0)
    (plan,) = plan_text(of, [record(train=2 * SEQ)]).files
    data = np.arange(2 * SEQ, dtype="<i4").tobytes()
    Storage(str(tmp_path)).write(piece_file("piece", "train"), data[:left])
    with pytest.raises(MachineError, match=r"piece\.train\.bin is shorter than it was; empty OUT and begin anew"):
        write_file(of, plan)
    Storage(str(tmp_path)).write(piece_file("piece", "train"), data)
    assert write_file(of, plan).file["rows"] == 2
