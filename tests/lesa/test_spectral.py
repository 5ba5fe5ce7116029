"""The basis and the coefficients, against numpy's SVD of the concatenation in float64."""

import errno
import os
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lesa_ray.errors import MachineError, UserError
from lesa_ray.lesa import eigen
from lesa_ray.lesa.route import GRAM_ALWAYS, choose_route
from lesa_ray.lesa.spectral import _range, decompose
from lesa_ray.lesa.streams import BLOCK_ROWS, square_norm
from tests.lesa.layers import reference_svd, related_layers

ROUTES = ["exact", "gram", "randomized"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def loader(layers: list[torch.Tensor]) -> Callable[[int], torch.Tensor]:
    return lambda i: layers[i]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [(5, 40, 24), (3, 64, 20)], ids=["wide", "d1 > L·d2"])
def test_full_rank_is_the_svd(route, dtype, shape):
    layers = [layer.to(dtype) for layer in related_layers(*shape, decay=0.3)]
    u, s, _ = reference_svd(layers)
    parts = decompose([loader(layers)], len(layers), svd=route)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    precision = 1e-12 if dtype == torch.float64 else 2e-6
    # The Gram matrix of halves is summed in float32: small directions may turn a little among themselves.
    span = 1e-3 if route == "gram" and dtype.itemsize == 2 else 20 * precision

    assert parts.route == route
    assert parts.left.dtype == parts.coefficients.dtype == working
    assert parts.coefficients.shape == (1, shape[0], len(s), shape[2])
    np.testing.assert_allclose(parts.sigma.numpy(), s, rtol=0, atol=min(precision, 1e-6) * s[0])
    left = parts.left.double().numpy()
    np.testing.assert_allclose(left.T @ left, np.eye(len(s)), atol=4 * precision)
    for k in (1, 5, len(s)):
        np.testing.assert_allclose(left[:, :k] @ left[:, :k].T, u[:, :k] @ u[:, :k].T, atol=span)
    for i, layer in enumerate(layers):
        rebuilt = parts.compose(parts.coefficients[0, i]).double().numpy()
        np.testing.assert_allclose(rebuilt, layer.double().numpy(), atol=precision * s[0])
    rows = parts.coefficients[0].double().numpy().transpose(1, 0, 2).reshape(len(s), -1)
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(s)), atol=5 * span)
    assert parts.captured == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("route", ROUTES)
def test_a_rank_keeps_the_leading_directions(route):
    layers = related_layers(6, 120, 60, decay=1.5)
    u, s, _ = reference_svd(layers)
    k = 12
    parts = decompose([loader(layers)], 6, svd=route, rank=k, power_iterations=4)
    left = parts.left.double().numpy()
    np.testing.assert_allclose(parts.sigma.numpy(), s[:k], rtol=0, atol=1e-6 * s[0])
    np.testing.assert_allclose(left @ left.T, u[:, :k] @ u[:, :k].T, atol=1e-4)
    assert parts.captured == pytest.approx((s[:k] ** 2).sum() / (s**2).sum(), abs=1e-6)


def test_power_iterations_sharpen_a_slowly_decaying_spectrum():
    layers = related_layers(6, 120, 60, decay=0.3)
    best = (reference_svd(layers)[1][:12] ** 2).sum() / sum(float(w.double().square().sum()) for w in layers)
    captured = [
        decompose([loader(layers)], 6, svd="randomized", rank=12, power_iterations=q).captured for q in (0, 2, 8)
    ]
    assert captured[0] < captured[1] < captured[2] <= best + 1e-7
    assert captured[1] > 0.97 * best


def test_more_rows_than_one_block_of_the_gram_matrix():
    layers = related_layers(3, 530, 300, decay=0.5)
    parts = decompose([loader(layers)], 3, svd="gram")
    s = reference_svd(layers)[1]
    np.testing.assert_allclose(parts.sigma.numpy(), s, rtol=0, atol=1e-6 * s[0])


@pytest.mark.parametrize("route", ROUTES)
def test_largest_entry_of_every_direction_is_positive(route):
    layers = related_layers(4, 30, 20, decay=0.5)
    left = decompose([loader(layers)], 4, svd=route).left
    assert bool((left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all())


@pytest.mark.parametrize("route", ROUTES)
def test_directions_at_rounding_level_are_dropped(route):
    base = related_layers(1, 48, 32, decay=0.2)[0]
    base[:, 20:] = base[:, :12]  # rank 20
    layers = [base, base, torch.zeros(48, 32), base]
    parts = decompose([loader(layers)], 4, svd=route)
    assert len(parts.sigma) == 20
    assert bool((parts.coefficients.abs() <= 1).all())
    for i, layer in enumerate(layers):
        torch.testing.assert_close(parts.compose(parts.coefficients[0, i]), layer, atol=1e-6, rtol=0)


@pytest.mark.parametrize("route", ROUTES)
def test_all_zero_weights_have_zero_coefficients(route):
    parts = decompose([lambda i: torch.zeros(12, 8)], 3, svd=route)
    assert bool((parts.coefficients == 0).all())
    assert parts.captured == 1


def test_without_svd_the_weights_are_the_coefficients():
    layers = [layer.bfloat16() for layer in related_layers(3, 10, 8)]
    parts = decompose([loader(layers)], 3, svd="none")
    assert torch.equal(parts.coefficients[0], torch.stack(layers).float())
    assert torch.equal(parts.compose(parts.coefficients[0, 1]), layers[1].float())
    assert parts.captured == 1
    with pytest.raises(UserError, match="rank 4 with svd none"):
        decompose([loader(layers)], 3, svd="none", rank=4)


@pytest.mark.parametrize("route", ["exact", "gram", "randomized", "none"])
def test_another_checkpoint_is_taken_in_the_base_basis(route):
    base, other = related_layers(4, 20, 16, seed=1, decay=0.5), related_layers(4, 20, 16, seed=2)
    parts = decompose([loader(base), loader(other)], 4, svd=route)
    left = np.eye(20) if parts.left is None else parts.left.double().numpy()
    for i, layer in enumerate(other):
        expected = (left.T @ layer.double().numpy()) / parts.sigma.numpy()[:, None]
        np.testing.assert_allclose(parts.coefficients[1, i].numpy(), expected, atol=1e-4 * np.abs(expected).max())
        assert float(parts.squares[1, i]) == pytest.approx(float(layer.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("route", ROUTES)
def test_other_checkpoints_leave_the_basis_as_it_is(route):
    """However much larger they are."""
    base, other = related_layers(4, 30, 16, seed=1, decay=0.5), related_layers(4, 30, 16, seed=2)
    loads = [loader(base), loader([100 * layer for layer in other])]
    alone, joined = (decompose(some, 4, svd=route, rank=6) for some in (loads[:1], loads))
    assert torch.equal(alone.left, joined.left)
    assert torch.equal(alone.sigma, joined.sigma)
    assert torch.equal(alone.coefficients[0], joined.coefficients[0])
    assert alone.captured == joined.captured


def test_small_directions_are_kept_down_to_rounding():
    """Of 2,000 columns in float32, of which rounding is 5e-6 of the largest."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 12, generator=generator).double()).Q for n in (40, 2000))
    sizes = torch.logspace(0, -4, 12, dtype=torch.float64)
    layers = list(((left * sizes) @ right.T).float().split(500, dim=1))
    parts = decompose([loader(layers)], 4, svd="gram")
    np.testing.assert_allclose(parts.sigma.numpy(), sizes.numpy(), rtol=1e-3)


def test_layers_that_cancel_are_found_without_power_iterations():
    one, two = related_layers(2, 60, 20, decay=1.0)
    parts = decompose([loader([one, -one, two, -two])], 4, svd="randomized", rank=30, power_iterations=0)
    assert parts.captured > 0.9


@pytest.mark.parametrize("route", ["exact", "gram", "randomized", "none"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 2])
def test_a_layer_that_is_not_finite_is_named(route, bad, where):
    layers = related_layers(4, 12, 10)
    layers[where][3, 4] = bad
    with pytest.raises(UserError, match=rf"^layer {where}: holds NaN or Inf[^\n]*$"):
        decompose([loader(layers)], 4, svd=route)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (
            torch.ones(12, 11),
            r"layer 1: found torch.float32 of shape \(12, 11\), expected torch.float32 of shape \(12, 10\)",
        ),
        (torch.ones(12, 10).half(), "layer 1: found torch.float16"),
        (torch.ones(12), r"layer 1: found torch.float32 of shape \(12,\)"),
    ],
)
def test_layers_that_differ_are_named(odd, message):
    layers = related_layers(3, 12, 10)
    layers[1] = odd
    with pytest.raises(UserError, match=message):
        decompose([loader(layers)], 3)


def test_a_first_layer_that_is_no_float_matrix_is_named():
    with pytest.raises(UserError, match="layer 0: expected a float matrix"):
        decompose([lambda i: torch.ones(3, 3, dtype=torch.int64)], 3)


def test_a_checkpoint_of_another_shape_is_refused():
    base, other = related_layers(3, 12, 10), related_layers(3, 12, 9)
    with pytest.raises(UserError, match="layer 0: found"):
        decompose([loader(base), loader(other)], 3)


@pytest.mark.parametrize("route", ["gram", "randomized", "none"])
def test_layers_are_streamed(route):
    """Layer 0, the current one and at most two that a loop variable still names are alive, of 12."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def load(i: int) -> torch.Tensor:
        nonlocal most
        weight = torch.randn(16, 12, generator=torch.Generator().manual_seed(i))
        alive.add(weight)
        most = max(most, len(alive))
        return weight

    decompose([load], 12, svd=route, rank=None if route == "none" else 4)
    assert most <= 4


def test_coefficients_above_the_budget_are_mapped_from_a_file_that_is_gone(tmp_path):
    layers = related_layers(6, 24, 16)
    in_memory = decompose([loader(layers)], 6)
    mapped = decompose([loader(layers)], 6, scratch_dir=str(tmp_path), memory_budget=1000)
    assert torch.equal(in_memory.coefficients, mapped.coefficients)
    assert os.listdir(tmp_path) == []
    with open("/proc/self/maps", encoding="utf-8") as maps:
        assert str(tmp_path) in maps.read()


def test_a_budget_that_suffices_uses_no_file():
    layers = related_layers(6, 24, 16)
    parts = decompose([loader(layers)], 6, scratch_dir="/nowhere", memory_budget=10**6)
    assert parts.coefficients.shape == (1, 6, 24, 16)


@pytest.mark.parametrize("route", ROUTES)
def test_a_disk_without_room_is_told_of_before_the_layers_are_read(route):
    layers, read = related_layers(6, 24, 16), []

    def load(i):
        read.append(i)
        return layers[i]

    with pytest.raises(MachineError, match="cannot reserve"):
        decompose([load], 6, svd=route, rank=8, scratch_dir="/nowhere", memory_budget=1000)
    assert read == [0]  # for its shape


def test_scratch_space_that_cannot_be_had_is_a_fault_of_the_machine(tmp_path, monkeypatch):
    layers = related_layers(6, 24, 16)
    named = r"^/nowhere: cannot reserve 9\.2 kB of scratch space: No such file.*; set LESA_RAY_SCRATCH to a folder on"
    with pytest.raises(MachineError, match=named):
        decompose([loader(layers)], 6, scratch_dir="/nowhere", memory_budget=1000)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MachineError, match="No space left on device"):
        decompose([loader(layers)], 6, scratch_dir=str(tmp_path), memory_budget=1000)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("route", ROUTES)
def test_same_inputs_same_bytes(route):
    layers = related_layers(4, 40, 24)
    torch.manual_seed(1)
    first = decompose([loader(layers)], 4, svd=route, rank=10, seed=3)
    torch.manual_seed(2)
    second = decompose([loader(layers)], 4, svd=route, rank=10, seed=3)
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.coefficients, second.coefficients)


@pytest.mark.parametrize(
    ("d1", "d2", "layers", "rank", "route"),
    [
        (4096, 4096, 32, None, "gram"),
        (28672, 8192, 80, None, "gram"),
        (14336, 4096, 32, 256, "randomized"),
        (14336, 4096, 32, 8192, "gram"),
        (53248, 16384, 126, 20000, "randomized"),
        (GRAM_ALWAYS, 2048, 24, 16, "gram"),
        (4096, 16, 3, 16, "gram"),
        (53248, 16384, 126, 53248, "gram"),
        (53248, 16, 3, 48, "gram"),
        (4096, 1024, 2, 600, "gram"),
    ],
)
def test_auto_depends_on_sizes_alone(d1, d2, layers, rank, route):
    assert choose_route(d1, d2, layers, rank) == route


def test_auto_is_taken():
    layers = related_layers(3, 12, 10)
    assert decompose([loader(layers)], 3, svd="auto").route == "gram"


@pytest.mark.parametrize("rank", [None, 9])
def test_above_the_rows_that_syevd_takes_another_solver_finds_the_same(rank, monkeypatch):
    """32,766 rows would take hours: here the bound is lower."""
    layers = related_layers(4, 60, 24, decay=0.5)
    before = decompose([loader(layers)], 4, svd="gram", rank=rank)
    monkeypatch.setattr(eigen, "SYEVD_ROWS", 59)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    after = decompose([loader(layers)], 4, svd="gram", rank=rank)
    np.testing.assert_allclose(after.left.numpy(), before.left.numpy(), atol=1e-5)
    np.testing.assert_allclose(after.coefficients.numpy(), before.coefficients.numpy(), atol=1e-5)
    np.testing.assert_allclose(after.sigma.numpy(), before.sigma.numpy(), rtol=1e-6)


def test_the_norm_of_a_layer_takes_no_second_one(monkeypatch):
    """torch converts what it is given, and the norm is taken as a layer is read, beside the one in use."""
    weight = torch.randn(2 * BLOCK_ROWS + 5, 30).bfloat16()
    norm, given = torch.linalg.vector_norm, []
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda rows, **how: given.append(len(rows)) or norm(rows, **how))
    assert square_norm(weight) == pytest.approx(float(weight.double().square().sum()), rel=1e-6)
    assert given == [BLOCK_ROWS, BLOCK_ROWS, 5]


def test_the_range_finder_holds_one_converted_layer_at_a_time():
    """A layer in float32 takes twice what it has in bfloat16: a second one is not reckoned with."""
    converted: list[weakref.ref[torch.Tensor]] = []

    class Weight:
        def to(self, dtype):
            assert not any(one() is not None for one in converted)
            made = torch.randn(12, 8).to(dtype)
            converted.append(weakref.ref(made))
            return made

    class Source:
        shape, dtype, device, count = (12, 8), torch.bfloat16, torch.device("cpu"), 3

        def stream(self, own):
            for layer in range(self.count):
                yield 0, layer, Weight()

    found = _range(Source(), range(1), rows=4, iterations=2, seed=0)
    assert found.shape == (12, 4)
    assert len(converted) == 9
