"""Which tensors write into the residual stream, family by family, against the list each family's entry gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lesa_ray.checkpoint.anatomy import read_anatomy
from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.checkpoint.residual import residual_writers
from tests import families


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_the_writers_are_the_familys(family: str, bases: Callable[[str], str]) -> None:
    types = read_anatomy(open_checkpoint(bases(family))).types
    expected = {name for name in types if families.matches(name, families.FAMILIES[family].writes)}
    assert expected
    assert set(residual_writers(types)) == expected


def test_an_unknown_name_is_no_writer() -> None:
    assert residual_writers(["mlp.strange_proj.weight", "mlp.dense_h_to_4h.weight", "attn.c_attn.weight"]) == ()


def test_granites_experts_and_the_shared_one_write() -> None:
    writers = ("self_attn.o_proj.weight", "block_sparse_moe.output_linear.weight", "shared_mlp.output_linear.weight")
    readers = ("block_sparse_moe.input_linear.weight", "shared_mlp.input_linear.weight")
    assert residual_writers([*readers, *writers]) == writers
