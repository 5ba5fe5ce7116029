"""Fits of one shape done at once, against each done alone. CPUs do them one by one; here they are made to stack."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from lesa_ray.config import LesaSettings
from lesa_ray.errors import MachineError, UserError
from lesa_ray.lesa.batches import Rows
from lesa_ray.lesa.fit import Fit, fit_each
from lesa_ray.lesa.predictor import Predictor, loss_and_gradient, train, train_together
from lesa_ray.lesa.report import FitReport
from lesa_ray.lesa.room import Rooms
from lesa_ray.lesa.streams import generator_for
from tests.lesa.layers import related_layers

QUICK = LesaSettings(hidden=16, epochs=3, batch_size=16, norm_weight=0.01)
SEEDS = [5, 6, 7]
MIDDLES = [[1, 3, 4], [1, 2, 3], [2, 3, 4]]


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lesa_ray.lesa.task.STACKED_ON", ("cpu", "cuda"))


def side_by_side(dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    """Coefficients (6, 9, 5) of three fits in one storage, the second's energy far from the others'."""
    place = torch.randn(3, 6, 9, 5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    place[1] *= 4
    return list(place.to(device))


def predictors(dtype: torch.dtype, device: str = "cpu") -> list[Predictor]:
    return [Predictor(5, 16, dtype, device, seed) for seed in SEEDS]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)], ids=str)
def test_each_of_a_stack_is_trained_as_alone(dtype: torch.dtype, tolerance: float) -> None:
    """27 rows in batches of 4, so that the last of each epoch is smaller."""
    settings = LesaSettings(hidden=16, epochs=6, batch_size=4, norm_weight=0.01)
    coefficients, together, alone = side_by_side(dtype), predictors(dtype), predictors(dtype)
    losses = train_together(together, coefficients, MIDDLES, settings, SEEDS)
    for at, one in enumerate(alone):
        expected = train(one, coefficients[at].clone(), MIDDLES[at], settings, SEEDS[at])
        assert losses[at] == pytest.approx(expected, rel=tolerance)
        torch.testing.assert_close(together[at].flat, one.flat, rtol=0, atol=tolerance)
        assert not torch.equal(one.flat, predictors(dtype)[at].flat)


def test_gradients_of_a_stack_are_those_of_each() -> None:
    alone = predictors(torch.float64)
    alone[2].flat.zero_()  # predicts zero, where the norm has no derivative
    stack = Predictor.stack(alone)
    batch = torch.randn(3, 7, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradient = torch.full_like(stack.flat, float("nan"))
    of_stack = stack.views(gradient)
    losses = loss_and_gradient(stack, batch[..., :10], batch[..., 10:], 0.3, of_stack)
    for at, one in enumerate(alone):
        own = one.views(torch.empty_like(one.flat))
        loss = loss_and_gradient(one, batch[at, :, :10], batch[at, :, 10:], 0.3, own)
        torch.testing.assert_close(losses[at], loss, rtol=1e-14, atol=0)
        for (weight, bias), (own_weight, own_bias) in zip(of_stack, own, strict=True):
            torch.testing.assert_close(weight[at], own_weight, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(bias[at], own_bias, rtol=1e-12, atol=1e-14)


def test_one_that_diverges_leaves_the_others_alone() -> None:
    coefficients, together, alone = (side_by_side(torch.float64), *(predictors(torch.float64) for _ in range(2)))
    coefficients[1][0, 0, 0] = float("inf")
    losses = train_together(together, coefficients, MIDDLES, QUICK, SEEDS)
    assert np.isnan(losses[1][-1])
    for at in (0, 2):
        assert losses[at] == pytest.approx(train(alone[at], coefficients[at], MIDDLES[at], QUICK, SEEDS[at]), rel=1e-11)


@pytest.mark.parametrize("rows", [7, 6], ids=["as taken", "with a direction dropped"])
def test_rows_of_several_are_gathered_as_those_of_one(rows: int) -> None:
    place = torch.randn(2, 5 * 7 * 3, generator=torch.Generator().manual_seed(0))
    coefficients = [one[: 5 * rows * 3].view(5, rows, 3) for one in place]
    middles = [[1, 3], [2, 3]]

    def shuffled(fits: list[int]) -> list[torch.Tensor]:
        some = Rows([coefficients[at] for at in fits], [middles[at] for at in fits], 4, torch.device("cpu"))
        return list(some.shuffled([generator_for(at, "shuffle") for at in fits]))

    for both, first, second in zip(shuffled([0, 1]), shuffled([0]), shuffled([1]), strict=True):
        assert torch.equal(both, torch.cat([first, second], dim=1))
    assert [batch.shape for batch in shuffled([0, 1])][-1] == (2 * rows % 4 or 4, 2, 9)


def test_rooms_of_several_fits_are_of_one_kind(tmp_path: Any) -> None:
    """Two of 480 bytes: neither goes to memory if both do not fit, and the file is refused to whom it will not do."""
    for budget, fit in ((1000, True), (600, False)):
        rooms = Rooms(2, "cpu", str(tmp_path), budget)
        first, second = (rooms.next((1, 2, 5, 12), torch.float32) for _ in range(2))
        assert first.take(0, or_file=False) == fit
        assert first.take(0, or_file=True)
        assert second.take(0, or_file=False) == fit
        assert second.take(0, or_file=True)
        assert first.tensor.untyped_storage().data_ptr() == second.tensor.untyped_storage().data_ptr()
        first.tensor.fill_(1)
        second.tensor.fill_(2)
        assert first.tensor.eq(1).all()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_for_all_fits_is_told_of_by_the_first(tmp_path: Any) -> None:
    """Each of them would fit in memory."""
    with pytest.raises(MachineError, match=r"/nowhere: cannot reserve 1\.0 kB of scratch space"):
        Rooms(2, "cpu", "/nowhere", 600).next((1, 2, 5, 12), torch.float32).reserve(0)
    assert Rooms(2, "cpu", None, 600).next((1, 2, 5, 12), torch.float32).take(0, or_file=False)  # no place for a file


def test_a_place_in_a_file_keeps_no_file_open(tmp_path: Any) -> None:
    before = len(os.listdir("/proc/self/fd"))
    kept = [Rooms(1, "cpu", str(tmp_path), 10).next((1, 2, 5, 12), torch.float32) for _ in range(5)]
    assert all(room.take(0, or_file=True) for room in kept)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_lies_on_the_gpu_already_is_not_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("lesa_ray.lesa.room.fits_device", lambda nbytes, device: bool(asked.append(nbytes)))
    room = Rooms(1, "cuda", None, None).next((1, 2, 5, 12), torch.float32)
    assert room.take(100, taken=30, or_file=False)
    assert asked == [480 + 100 - 30]
    assert room.tensor.device.type == "cpu"


def test_a_layer_waits_in_the_place_of_its_coefficients_if_it_fits_there() -> None:
    room = Rooms(1, "cpu", None, None).next((1, 2, 5, 12), torch.float32)
    assert room.take(0, or_file=False)
    assert (room.holds(240), room.holds(241)) == (True, False)
    room.layer(0, 1, (10, 12), torch.bfloat16).fill_(2)
    assert room.layer(0, 1, (10, 12), torch.bfloat16).eq(2).all()
    assert room.tensor[0, 0].untyped_storage().nbytes() == 480


def experts() -> list[list[torch.Tensor]]:
    """Three of six float64 layers (10, 8), the second with four directions alone."""
    made = [[layer.double() for layer in related_layers(6, 10, 8, seed=seed)] for seed in range(3)]
    made[1] = [torch.cat([layer[:4], layer[:4], layer[:2]]) for layer in made[1]]
    return made


def run(
    members: list[list[torch.Tensor]],
    settings: LesaSettings = QUICK,
    numbers: tuple[int, ...] = (0, 1, 2),
    **options: Any,
) -> tuple[list[FitReport], dict[tuple[int, int], np.ndarray]]:
    """Fit the experts `numbers`; the weights by (expert, slot)."""
    made: dict[tuple[int, int], np.ndarray] = {}

    def fit(number: int) -> Fit:
        def store(member: int, slot: int, weight: torch.Tensor) -> None:
            made[number, slot] = weight.numpy()

        return Fit([lambda i: members[number][i]], store, SEEDS[number])

    reports = fit_each([fit(number) for number in numbers], 6, [(6, 2, 3), (7, 2, 6)], settings, **options)
    return reports, made


@pytest.mark.parametrize("budget", [None, 2000], ids=["in memory", "mapped"])
@pytest.mark.parametrize("svd", ["gram", "randomized"])
def test_fits_side_by_side_are_those_one_by_one(stacked: None, tmp_path: Any, svd: str, budget: int | None) -> None:
    """An expert with fewer directions trains by itself."""
    members, settings = experts(), QUICK.model_copy(update={"svd": svd})
    reports, made = run(members, settings, scratch_dir=str(tmp_path), memory_budget=budget)
    assert [report.rank for report in reports] == [10, 4, 10]
    assert list(made) == [(number, slot) for number in range(3) for slot in (6, 7)]
    for number in range(3):
        (alone,), weights = run(members, settings, (number,))
        for slot in (6, 7):
            np.testing.assert_allclose(made[number, slot], weights[number, slot], rtol=1e-6, atol=1e-9)
        one, other = (report.to_dict() for report in (reports[number], alone))
        for scores in ("trained", "held_out"):
            for name, score in one.pop(scores).items():
                for figure, value in other[scores][name].items():
                    assert score[figure] == (value if value is None else pytest.approx(value, rel=1e-9))
            del other[scores]
        assert one.pop("train_loss") == pytest.approx(other.pop("train_loss"), rel=1e-10)
        assert one.pop("norm_ratio") == pytest.approx(other.pop("norm_ratio"), rel=1e-9)
        assert one == other


@pytest.mark.parametrize("predictor", ["mlp", "ridge"])
def test_on_a_cpu_several_have_the_bytes_of_each(predictor: str) -> None:
    members, settings = experts(), QUICK.model_copy(update={"predictor": predictor})
    calls: list[float] = []
    reports, made = run(members, settings, progress=lambda phase, share: calls.append(share))
    assert calls == sorted(calls)
    assert calls[-1] == pytest.approx(1)
    for number in range(3):
        (alone,), weights = run(members, settings, (number,))
        assert reports[number].to_dict() == alone.to_dict()
        for slot in (6, 7):
            assert made[number, slot].tobytes() == weights[number, slot].tobytes()


def test_progress_and_seconds_of_several_at_once(stacked: None) -> None:
    calls: list[float] = []
    reports, _ = run(experts(), progress=lambda phase, share: calls.append(share))
    assert calls == sorted(calls)
    assert calls[-1] == pytest.approx(1)
    assert len({report.seconds["train"] for report in reports}) == 1


def test_experts_of_another_shape_are_refused(stacked: None) -> None:
    members = experts()
    members[2] = [layer[:9] for layer in members[2]]
    with pytest.raises(AssertionError, match="fits of one shape"):
        run(members)
    members[2][3] = members[0][3]
    with pytest.raises(UserError, match="layer 3: found"):
        run(members, QUICK, (2,))


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_a_stack_on_a_gpu_is_that_of_the_cpu(where: str) -> None:
    """Steps captured; coefficients on the device, or fed from host memory."""
    settings = LesaSettings(hidden=16, epochs=6, batch_size=4, norm_weight=0.01)
    gpu, cpu = predictors(torch.float32, "cuda"), predictors(torch.float32)
    losses = train_together(gpu, side_by_side(torch.float32, where), MIDDLES, settings, SEEDS)
    expected = train_together(cpu, side_by_side(torch.float32), MIDDLES, settings, SEEDS)
    for at in range(3):
        assert losses[at] == pytest.approx(expected[at], rel=1e-4)
        torch.testing.assert_close(gpu[at].flat.cpu(), cpu[at].flat, rtol=0, atol=1e-4)


@pytest.mark.gpu
def test_fits_on_a_gpu_are_those_of_the_cpu() -> None:
    members = [[layer.float() for layer in layers] for layers in experts()]
    _, gpu = run(members, device="cuda")
    _, cpu = run(members)
    for key, weight in cpu.items():
        np.testing.assert_allclose(gpu[key], weight, rtol=0, atol=1e-3 * np.abs(weight).max())
