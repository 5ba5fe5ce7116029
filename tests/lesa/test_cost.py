"""The cost model: operations against counts by hand and by torch, memory against a real run, the choice of a route."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lesa_ray.config import LesaSettings
from lesa_ray.errors import RoomError, UserError
from lesa_ray.gpu import DEVICE_SHARE
from lesa_ray.lesa import ridge, room, spectral
from lesa_ray.lesa.bounds import EIGH_MATRICES, RIDGE_FEATURES, SPLIT_MATRICES
from lesa_ray.lesa.cost import Phase, UnitCost, require_device_memory, require_host_memory, stack_size, unit_cost
from lesa_ray.lesa.fit import fit_weight_type
from lesa_ray.lesa.needs import bytes_beside, choose_place, needs_of, why_no_room_for_ridge
from lesa_ray.lesa.predictor import Predictor, train, train_together
from lesa_ray.lesa.rates import CPU_CORE, GPU_MEMORY, GPUS, LOOKED, unit_seconds
from lesa_ray.lesa.route import choose_route, sizes_of
from lesa_ray.lesa.task import Task, layers_in_flight
from tests.lesa.layers import related_layers


def phase(cost: UnitCost, name: str) -> Phase:
    return next(phase for phase in cost.phases if phase.name == name)


class Products(TorchDispatchMode):
    """Counts the operations of matrix products, those into a given tensor among them, which FlopCounterMode leaves
    out."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
            left, right = args[-2:]
            self.flops += 2 * left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


def counted(call: Callable[[], object]) -> int:
    with Products() as products:
        call()
    return products.flops


def test_every_gpu_whose_rates_are_known_has_a_memory():
    assert GPUS.keys() == GPU_MEMORY.keys()


@pytest.mark.parametrize("d1", [512, 600, 100])
def test_gram_is_what_torch_counts(d1):
    layers = related_layers(3, d1, 80, decay=0.5)
    gram = torch.zeros(d1, d1, dtype=torch.float64)
    real = counted(lambda: [spectral.add_gram(gram, layer) for layer in layers])
    cost = unit_cost(Task(d1, 80, 3, 1, element_bytes=4))
    assert phase(cost, "gram").flops == {"fp64": real}
    halves = unit_cost(Task(d1, 80, 3, 1, element_bytes=2))
    assert phase(halves, "gram").flops == {"half": real}


def test_a_training_step_is_what_torch_counts():
    """Full batches only, so that rows are a multiple of the batch."""
    coefficients = torch.randn(6, 64, 24)
    settings = LesaSettings(hidden=16, epochs=2, batch_size=32, holdout=0)
    predictor = Predictor(24, 16, torch.float32, "cpu", 0)
    real = counted(lambda: train(predictor, coefficients, [1, 2, 3, 4], settings, 0))
    trained = phase(unit_cost(Task(64, 24, 6, 1, settings)), "train")
    assert trained.flops == {"narrow": real}
    assert trained.steps == 2 * 4 * 64 / 32


def test_a_stacked_training_step_is_what_torch_counts():
    place = torch.randn(3, 6, 64, 24)
    settings = LesaSettings(hidden=16, epochs=2, batch_size=32, holdout=0)
    several = [Predictor(24, 16, torch.float32, "cpu", seed) for seed in range(3)]
    real = counted(lambda: train_together(several, list(place), [[1, 2, 3, 4]] * 3, settings, range(3)))
    unit = Task(64, 24, 6, 3, settings, fits=3, device="cuda", device_memory=2**30)
    trained = phase(unit_cost(unit), "train")
    assert trained.flops == {"fp32": real}
    assert trained.steps == 2 * 4 * 64 / 32


def test_several_fits_are_several_times_one_and_a_stack_holds_all_of_them():
    """Experts of Qwen3-30B-A3B: 768 × 2048, 48 layers."""
    one = Task(768, 2048, 48, 24, device_memory=GPU_MEMORY["h100"])
    many = replace(one, fits=16, slots=16 * 24)
    alone, each = unit_cost(one), unit_cost(many)
    assert each.host_memory == alone.host_memory
    assert each.coefficient_bytes == alone.coefficient_bytes
    assert each.flops == pytest.approx(16 * alone.flops)
    assert (each.read_bytes, each.write_bytes) == (16 * alone.read_bytes, 16 * alone.write_bytes)
    assert phase(each, "train").steps == 16 * phase(alone, "train").steps

    single, stack = (unit_cost(replace(task, device="cuda")) for task in (one, many))
    assert stack.coefficient_bytes == 16 * single.coefficient_bytes == 16 * 48 * 768 * 2048 * 4
    assert 16 * single.coefficient_bytes < stack.device_memory < 16 * single.device_memory
    assert phase(stack, "train").steps == phase(single, "train").steps
    assert phase(stack, "predict").flops == pytest.approx({"fp32": 16 * phase(single, "predict").flops["fp32"]})
    seconds = [unit_seconds(cost, GPUS["h100"], 5e9, 1e9)["train"] for cost in (single, stack)]
    assert seconds[1] < 16 * seconds[0] / 2


@pytest.mark.parametrize(
    ("d1", "d2", "layers", "settings", "size"),
    [
        (768, 2048, 48, {}, 16),
        (2048, 768, 48, {}, 16),
        (2048, 7168, 58, {}, 2),  # DeepSeek-V3: 3.4 GB of coefficients each
        (14336, 4096, 32, {}, 1),  # Mixtral: 7.5 GB
        (768, 2048, 48, {"predictor": "ridge"}, 1),
        (14336, 4096, 32, {"svd": "gram", "rank": 1024}, 13),
    ],
)
def test_as_many_experts_as_are_worth_it_make_a_unit(d1, d2, layers, settings, size):
    task = Task(d1, d2, layers, 16, LesaSettings(**settings))
    assert stack_size(task) == size
    assert stack_size(replace(task, device="cuda", device_memory=10**9, fits=7, slots=7 * 16)) == size


def test_project_and_predict_by_hand():
    """2·n·d1·d2·r for 5 layers; 3 slots of a forward pass, 2·r·h·(3·d2 + h), and a product, 2·d1·r·d2."""
    settings = LesaSettings(rank=10, svd="gram", hidden=8)
    cost = unit_cost(Task(40, 24, 5, 3, settings))
    assert cost.rank == 10
    assert phase(cost, "project").flops == {"fp32": 2 * 5 * 40 * 24 * 10}
    assert phase(cost, "predict").flops == {"fp32": 3 * (2 * 10 * 8 * (3 * 24 + 8) + 2 * 40 * 10 * 24)}
    assert phase(cost, "predict").write_bytes == 3 * 40 * 24 * 2
    assert phase(cost, "eigh").flops == {"eigh": 9 * 40**3}


def test_ridge_within_a_tenth_of_what_torch_counts():
    """The triples held out are not known in advance, so the number of products is nearly right, not exactly."""
    coefficients = torch.randn(12, 300, 400)
    settings = LesaSettings(predictor="ridge", holdout=0)
    real = counted(lambda: ridge.normal_equations(coefficients, range(1, 11), "cpu"))
    told = phase(unit_cost(Task(300, 400, 12, 1, settings)), "train").flops["fp32"]
    assert told - 800**3 / 3 - 8 * 400**3 == pytest.approx(real, rel=0.1)


def test_layers_are_read_once_where_they_can_wait_else_twice():
    once = unit_cost(Task(64, 32, 5, 2))
    assert once.read_bytes == 5 * 64 * 32 * 2
    small = replace(Task(64, 32, 5, 2), settings=LesaSettings(rank=8))  # no layer fits in the place of 8 rows
    assert unit_cost(small).read_bytes == 2 * 5 * 64 * 32 * 2
    scratch = unit_cost(Task(64, 32, 5, 2, memory_budget=20_000))
    assert scratch.coefficients == "scratch"
    assert scratch.read_bytes == 2 * 5 * 64 * 32 * 2
    assert scratch.host_memory < once.host_memory


def test_70b_gate_proj_on_gpus():
    """28672 × 8192, 80 layers: 75 GB of coefficients fit an H200 beside eigh, not an H100."""
    unit = Task(28672, 8192, 80, 40, device="cuda")
    h100 = unit_cost(replace(unit, device_memory=GPU_MEMORY["h100"]))
    h200 = unit_cost(replace(unit, device_memory=GPU_MEMORY["h200"]))
    assert h100.coefficient_bytes == 80 * 28672 * 8192 * 4
    assert (h100.coefficients, h200.coefficients) == ("memory", "device")
    assert h100.host_memory > h100.coefficient_bytes > h200.host_memory
    for cost, kind in ((h100, "h100"), (h200, "h200")):
        assert cost.device_memory < GPU_MEMORY[kind]
        assert cost.read_bytes == 80 * 28672 * 8192 * 2
    slow, fast = (sum(unit_seconds(cost, GPUS["h100"], 5e9, 1e9).values()) for cost in (h100, h200))
    # A spectrum that CUDA 12 has to split still has room on both.
    assert {phase(cost, "eigh").flops.keys() == {"eigh"} for cost in (h100, h200)} == {True}
    assert phase(h100, "eigh").device == SPLIT_MATRICES * 8 * 28672**2
    half = unit_cost(replace(unit, device_memory=GPU_MEMORY["h100"] // 2))
    assert (phase(half, "gram").device > 8 * 28672**2, phase(half, "eigh").device) == (True, 0)
    assert slow > fast  # coefficients cross the bus in each epoch


DOWN = Task(4096, 14336, 32, 16, device="cuda")
"""Llama-3-8B's down_proj: 7.5 GB of coefficients, and a system of 7 GB for ridge."""


def test_coefficients_leave_a_gpu_that_has_no_room_for_what_follows():
    tight, wide = (unit_cost(replace(DOWN, device_memory=int(share * 80e9))) for share in (0.125, 0.25))
    assert (tight.coefficients, wide.coefficients) == ("memory", "device")
    for cost, share in ((tight, 0.125), (wide, 0.25)):
        assert cost.device_memory <= DEVICE_SHARE * share * 80e9
        assert phase(cost, "yardsticks").device > 32 * 14336**2  # with ridge
    early, late = bytes_beside(DOWN)
    assert (
        tight.coefficient_bytes + EIGH_MATRICES * 8 * 4096**2
        < 0.85 * 10e9
        < tight.coefficient_bytes + late
        <= (tight.coefficient_bytes + early)
    )


def test_a_share_without_room_for_ridge_does_without_the_yardstick_or_refuses():
    small = replace(DOWN, device_memory=6 * 10**9)
    assert why_no_room_for_ridge(small) == "takes 7.29 GB of a GPU; there are 5.10 GB for it"
    assert why_no_room_for_ridge(replace(small, device="cpu")) is None
    assert why_no_room_for_ridge(replace(small, device_memory=10**10)) is None
    assert phase(unit_cost(small), "yardsticks").device < 5.1e9
    require_device_memory(small, "down_proj")
    with pytest.raises(RoomError, match=r"^down_proj needs 7\.\d+ GB of a GPU, its share is 6\.00 GB; give"):
        require_device_memory(replace(small, settings=LesaSettings(predictor="ridge")), "down_proj")


def test_where_coefficients_lie_is_decided_as_it_is_reckoned(tmp_path, monkeypatch):
    """In budgets around what eigh, and what ridge afterwards, takes beside them."""
    layers, settings = related_layers(5, 12, 64), LesaSettings(hidden=4, epochs=1)
    early, _ = bytes_beside(Task(12, 64, 5, 1, settings, element_bytes=4))
    size = 5 * 12 * 64 * 4
    assert early > EIGH_MATRICES * 8 * 12**2
    for budget in (size + EIGH_MATRICES * 8 * 12**2, size + early - 1, size + early):
        placed = []
        monkeypatch.setattr(room, "choose_place", lambda *given, to=placed: to.append(choose_place(*given)) or to[-1])
        fit_weight_type(
            layers.__getitem__, 5, [(5, 1, 2)], lambda *_: None, settings, 0, scratch_dir=str(tmp_path),
            memory_budget=budget,
        )  # fmt: skip
        assert placed[-1] == unit_cost(Task(12, 64, 5, 1, settings, element_bytes=4, memory_budget=budget)).coefficients
    assert placed == ["memory"]


def test_eigh_goes_to_the_host_where_the_gpu_is_too_small():
    cost = unit_cost(Task(53248, 16384, 126, 63, device="cuda", device_memory=70 * 10**9))
    assert phase(cost, "eigh").flops.keys() == {"eigh_host"}
    assert phase(cost, "eigh").host >= 24 * 53248**2


def test_seconds_wait_for_what_reading_takes_longer_than_work():
    cost = unit_cost(Task(256, 128, 4, 0, LesaSettings(epochs=1), element_bytes=4))
    layer = 256 * 128 * 4
    still = LOOKED / CPU_CORE.memory
    slow = unit_seconds(cost, CPU_CORE, 1e4, 1e9)
    assert slow["load"] == pytest.approx(4 * layer * (1e-4 + still) - slow["gram"])
    fast = unit_seconds(cost, CPU_CORE, 1e15, 1e9)
    assert fast["load"] >= layer * still
    assert {name: s for name, s in fast.items() if name != "load"} == {
        name: pytest.approx(s) for name, s in slow.items() if name != "load"
    }


@pytest.mark.parametrize(
    ("d1", "d2", "layers", "rank", "budget", "route"),
    [
        (28672, 8192, 80, None, None, "gram"),
        (53248, 16384, 126, None, None, "gram"),
        (14336, 4096, 32, 256, None, "randomized"),
        (14336, 4096, 32, 8192, None, "gram"),
        (53248, 16384, 126, 20000, None, "randomized"),
        (28672, 8192, 80, 8000, 64 * 10**9, "gram"),
        (28672, 8192, 80, 8000, 16 * 10**9, "randomized"),
        (2048, 2048, 24, 16, None, "gram"),
    ],
)
def test_a_route_is_the_cheapest_that_fits(d1, d2, layers, rank, budget, route):
    assert choose_route(d1, d2, layers, rank, memory_budget=budget) == route


def test_what_the_gram_route_needs_beside_the_matrix_counts():
    layer, matrices = 4096 * 1024, EIGH_MATRICES * 8 * 4096**2
    needed = layer * (3 * 2 + 4) + matrices
    routes = [choose_route(4096, 1024, 2, 600, memory_budget=needed - less) for less in (0, 1)]
    assert routes == ["gram", "randomized"]


@pytest.mark.parametrize(
    ("task", "sizes"),
    [
        (Task(40, 4, 5, 2), ("gram", 20, 20)),
        (Task(40, 4, 5, 2, checkpoints=2, basis=2), ("gram", 40, 40)),
        (Task(40, 4, 5, 2, checkpoints=2, basis=1), ("gram", 20, 20)),
        (Task(40, 4, 5, 2, LesaSettings(svd="randomized", rank=6)), ("randomized", 6, 16)),
        (Task(40, 4, 5, 2, LesaSettings(svd="randomized", rank=15)), ("randomized", 15, 20)),
        (Task(40, 4, 5, 2, LesaSettings(svd="none")), ("none", 40, 40)),
        (Task(53248, 16, 3, 2, LesaSettings(rank=48), checkpoints=4, basis=4), ("randomized", 48, 58)),
        (Task(28672, 8192, 80, 40, LesaSettings(rank=8000), memory_budget=64 * 10**9), ("gram", 8000, 8000)),
        (Task(28672, 8192, 80, 40, LesaSettings(rank=8000), memory_budget=16 * 10**9), ("randomized", 8000, 8010)),
    ],
)
def test_a_unit_holds_the_directions_that_its_checkpoints_and_route_give(task, sizes):
    assert sizes_of(task) == sizes


def test_layers_that_are_read_again_lie_beside_the_projection():
    """Of a checkpoint beside the basis they are read again wherever the coefficients lie."""
    one = Task(1024, 16384, 32, 16, LesaSettings(rank=8, svd="gram", hidden=4, batch_size=1))
    alone, joined = (needs_of(task, *sizes_of(task)) for task in (one, replace(one, checkpoints=2)))
    assert alone.late == joined.late == alone.project + layers_in_flight(1024, 16384, 2)
    assert alone.early < joined.early == joined.late


def test_ridge_is_a_yardstick_only_beside_what_the_other_fits_keep():
    stack = replace(DOWN, fits=3, slots=48)
    alone, several = (needs_of(task, *sizes_of(task)) for task in (DOWN, stack))
    assert several.ridge == alone.ridge + several.others > alone.ridge
    between = int((alone.ridge + several.ridge) / 2 / DEVICE_SHARE)
    assert why_no_room_for_ridge(replace(DOWN, device_memory=between)) is None
    for task, rival in ((DOWN, True), (stack, False)):
        small = replace(task, device_memory=between)
        assert needs_of(small, *sizes_of(small)).rival is rival


def test_predicting_counts_where_it_takes_the_most():
    task = Task(1024, 4096, 32, 16, LesaSettings(rank=256, svd="gram", hidden=4, batch_size=1, ridge_yardstick=False))
    needs = needs_of(task, *sizes_of(task))
    assert needs.early == needs.late == needs.predict


def test_ridge_is_a_yardstick_up_to_a_number_of_features():
    for d2, rival in ((RIDGE_FEATURES["cpu"] // 2, True), (RIDGE_FEATURES["cpu"] // 2 + 1, False)):
        task = Task(64, d2, 5, 1)
        assert needs_of(task, *sizes_of(task)).rival is rival


def test_what_lies_beside_coefficients_counts_where_the_unit_computes():
    assert choose_place(10, 100, 110, None) == "memory"
    assert choose_place(10, 100, 109, None) == "scratch"
    assert choose_place(10, 100, 10, lambda nbytes: nbytes < 110) == "memory"
    assert choose_place(10, 100, 9, lambda nbytes: nbytes < 110) == "scratch"
    assert choose_place(10, 100, 9, lambda nbytes: nbytes <= 110) == "device"


def test_a_budget_that_is_too_small_is_said_with_advice():
    with pytest.raises(UserError, match=r"^--memory-budget 1.00 GB: gate_proj needs .* GB; .*--rank"):
        require_host_memory(Task(28672, 8192, 80, 40, memory_budget=10**9), "gate_proj")
    require_host_memory(Task(1024, 1024, 24, 12, memory_budget=10**9), "q_proj")


@pytest.mark.parametrize(
    ("route", "predictor"),
    [
        ("gram", "mlp"),
        ("gram", "ridge"),
        ("randomized", "mlp"),
        pytest.param("exact", "mlp", marks=pytest.mark.thorough),
        pytest.param("none", "mlp", marks=pytest.mark.thorough),
    ],
)
def test_memory_is_an_upper_bound_of_a_real_run_and_not_a_wild_one(route, predictor):
    """In a process of its own, whose first products and eigh are behind it. Small enough for a few seconds."""
    script = f"""
from tests.lesa.test_cost import measure_growth
measure_growth({route!r}, {predictor!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    grown, told = map(int, done.stdout.split())
    assert grown <= told + 2**25  # what torch's libraries take beside: 15 to 20 MB in eigh at any size
    assert told <= 3 * grown


def measure_growth(route: str, predictor: str) -> None:
    """Print by how many bytes a fit makes this process grow, and how many are predicted."""
    torch.set_num_threads(1)
    layers = [layer.bfloat16() for layer in related_layers(6, 1536, 960, decay=0.5)]
    settings = LesaSettings(
        svd=route, predictor=predictor, epochs=1, rank=600 if route in ("randomized", "gram") else None
    )

    def run(these: list[torch.Tensor], settings: LesaSettings) -> None:
        slots = [(len(these), 1, 2), (len(these) + 1, 2, 3)]
        fit_weight_type(lambda i: these[i].clone(), len(these), slots, lambda *_: None, settings, 0)

    run([layer[:64, :64].contiguous() for layer in layers], settings.model_copy(update={"rank": None}))
    gc.collect()
    ctypes.CDLL("libc.so.6").mallopt(-3, 2**20)  # freed tensors go back to the system
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS:")
    run(layers, settings)
    grown = _resident("VmHWM:") - before
    print(grown, unit_cost(Task(1536, 960, 6, 2, settings)).host_memory)


def _resident(what: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(what))


def test_the_model_imports_no_torch():
    script = "import sys; import lesa_ray.lesa.rates; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], timeout=180, check=True)
