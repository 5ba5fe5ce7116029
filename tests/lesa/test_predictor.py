"""The predictor against autograd, nn.Linear and torch.optim.AdamW, and its training against a plain loop."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lesa_ray.config import LesaSettings
from lesa_ray.lesa.predictor import SETTLE, Predictor, _Steps, loss_and_gradient, train
from lesa_ray.lesa.streams import generator_for


def network(predictor: Predictor) -> nn.Sequential:
    """The same network in torch's own modules, with the predictor's present parameters."""
    layers: list[nn.Module] = []
    for weight, bias in predictor.layers:
        layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        layer.weight = nn.Parameter(weight.clone())
        layer.bias = nn.Parameter(bias.clone())
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def plain_loss(output: torch.Tensor, target: torch.Tensor, weight: float) -> torch.Tensor:
    """As the released notebook has it: two criteria of the same kind, one on the entries, one on the norms."""
    mse = nn.functional.mse_loss(output, target)
    norm = nn.functional.mse_loss(torch.norm(output, p=2), torch.norm(target, p=2))
    return (1 - weight) * mse + weight * norm


def flatten(net: nn.Sequential, grad: bool = False) -> torch.Tensor:
    return torch.cat([(p.grad if grad else p.detach()).flatten() for p in net.parameters()])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)], ids=str)
@pytest.mark.parametrize("weight", [0.0, 5e-4, 0.3, 1.0])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_loss_and_gradient_equal_autograd(dtype, tolerance, weight, rows):
    predictor = Predictor(d2=12, hidden=32, dtype=dtype, device="cpu", seed=1)
    generator = torch.Generator().manual_seed(rows)
    batch = torch.randn(rows, 36, dtype=dtype, generator=generator)
    x, y = batch[:, :24], batch[:, 24:]
    gradient = torch.full_like(predictor.flat, float("nan"))
    loss = loss_and_gradient(predictor, x, y, weight, predictor.views(gradient))

    net = network(predictor)
    expected = plain_loss(net(x), y, weight)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=tolerance, atol=0)
    scale = float(flatten(net, grad=True).abs().max())
    torch.testing.assert_close(gradient, flatten(net, grad=True), rtol=0, atol=10 * tolerance * scale)
    torch.testing.assert_close(predictor(x[:, :12], x[:, 12:]), net(x).detach(), rtol=tolerance * 10, atol=tolerance)


def test_gradient_is_finite_where_the_prediction_is_zero():
    predictor = Predictor(d2=4, hidden=8, dtype=torch.float32, device="cpu", seed=1)
    predictor.flat.zero_()
    gradient = torch.empty_like(predictor.flat)
    loss = loss_and_gradient(predictor, torch.ones(3, 8), torch.ones(3, 4), 0.5, predictor.views(gradient))
    assert float(loss) == pytest.approx(0.5 + 0.5 * 12)
    assert bool(gradient.isfinite().all())


def test_initial_weights_follow_nn_linear_and_leave_the_global_state_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    predictor = Predictor(d2=200, hidden=256, dtype=torch.float32, device="cpu", seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert [tuple(w.shape) for w, _ in predictor.layers] == [(256, 400), (256, 256), (200, 256)]
    for weight, bias in predictor.layers:
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        for mine, theirs in ((weight, linear.weight), (bias, linear.bias)):
            assert float(mine.abs().max()) <= 1 / math.sqrt(weight.shape[1])
            assert float(mine.std()) == pytest.approx(float(theirs.detach().std()), rel=0.15)
    other = Predictor(d2=200, hidden=256, dtype=torch.float32, device="cpu", seed=4)
    assert not torch.equal(predictor.flat, other.flat)


def numpy_rows(coefficients: torch.Tensor, middles: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """X (rows, 2·d2) and Y (rows, d2), built by concatenation as in the paper."""
    v = coefficients.numpy()
    x = np.concatenate([np.concatenate([v[m - 1], v[m + 1]], axis=1) for m in middles])
    return torch.from_numpy(x), torch.from_numpy(np.concatenate([v[m] for m in middles]))


def test_training_on_whole_batches_equals_torch_adamw():
    """With all rows in one batch their order does not matter, so a plain loop must end at the same parameters."""
    coefficients = torch.randn(6, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    middles = [1, 3, 4]
    settings = LesaSettings(hidden=16, epochs=30, batch_size=1000, norm_weight=0.01, learning_rate=3e-3)
    predictor = Predictor(d2=5, hidden=16, dtype=torch.float64, device="cpu", seed=7)
    net = network(predictor)
    losses = train(predictor, coefficients, middles, settings, seed=7)

    x, y = numpy_rows(coefficients, middles)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    expected = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = plain_loss(net(x), y, 0.01)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(predictor.flat, flatten(net), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.float64, 1e-10)], ids=str)
def test_training_in_batches_equals_a_plain_loop(dtype, tolerance):
    """The released notebook's loop, with torch's modules, autograd and AdamW, over the same batches, in float64."""
    coefficients = torch.randn(6, 9, 5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    middles = [1, 3, 4]
    settings = LesaSettings(hidden=16, epochs=6, batch_size=4, norm_weight=0.01)
    predictor = Predictor(d2=5, hidden=16, dtype=dtype, device="cpu", seed=7)
    net = network(predictor).double()
    losses = train(predictor, coefficients, middles, settings, seed=7)

    x, y = (part.double() for part in numpy_rows(coefficients, middles))
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.learning_rate)
    generator, expected = generator_for(7, "shuffle"), []
    for _ in range(6):
        batch_losses = []
        for chosen in torch.randperm(27, generator=generator).split(4):
            optimizer.zero_grad()
            loss = plain_loss(net(x[chosen]), y[chosen], 0.01)
            loss.backward()
            optimizer.step()
            batch_losses.append(loss.item())
        expected.append(np.mean(batch_losses))
    assert losses == pytest.approx(expected, rel=tolerance)
    torch.testing.assert_close(predictor.flat.double(), flatten(net), rtol=0, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cuda", "cpu"])
@pytest.mark.parametrize("rows", [41, 3], ids=["full batches and a smaller one", "too few to capture"])
def test_on_a_gpu_a_captured_step_is_the_step(monkeypatch, where, rows):
    """Against steps that are not captured, and against the CPU; coefficients on the device, or fed from host memory."""
    coefficients = torch.randn(9, rows, 24, generator=torch.Generator().manual_seed(0))
    settings = LesaSettings(hidden=32, epochs=3, batch_size=16, norm_weight=0.01)
    results = []
    for device, place, warm_up in (("cuda", where, 3), ("cuda", "cuda", 10**9), ("cpu", "cpu", 3)):
        monkeypatch.setattr("lesa_ray.lesa.predictor._Replayed.WARM_UP", warm_up)
        predictor = Predictor(24, 32, torch.float32, device, 7)
        losses = train(predictor, coefficients.to(place), [1, 3, 4, 7], settings, seed=7)
        results.append((losses, predictor.flat.cpu()))
    for losses, flat in results[1:]:
        assert results[0][0] == pytest.approx(losses, rel=1e-4)
        torch.testing.assert_close(results[0][1], flat, rtol=0, atol=1e-4)


def test_every_row_is_seen_once_per_epoch_in_batches(monkeypatch):
    coefficients = torch.arange(5 * 7 * 2, dtype=torch.float32).view(5, 7, 2) / 70
    seen: list[torch.Tensor] = []

    def spy(predictor, x, y, weight, gradient):
        seen.append(torch.cat([x, y], dim=1).clone())
        return loss_and_gradient(predictor, x, y, weight, gradient)

    monkeypatch.setattr("lesa_ray.lesa.predictor.loss_and_gradient", spy)
    settings = LesaSettings(hidden=4, epochs=2, batch_size=4)
    train(Predictor(2, 4, torch.float32, "cpu", 0), coefficients, [1, 3], settings, seed=0)
    assert [len(batch) for batch in seen] == [4, 4, 4, 2] * 2
    x, y = numpy_rows(coefficients, [1, 3])
    expected = torch.cat([x, y], dim=1)
    epochs = torch.cat(seen).view(2, 14, 6)
    for epoch in epochs:
        assert torch.equal(epoch[epoch[:, 0].argsort()], expected[expected[:, 0].argsort()])
        assert not torch.equal(epoch, expected)
    assert not torch.equal(epochs[0], epochs[1])


def test_reported_losses_are_means_over_batches():
    coefficients = torch.randn(5, 10, 3, generator=torch.Generator().manual_seed(0))
    # With no learning to speak of, each epoch's loss is the initial network's, up to how rows fall into batches.
    settings = LesaSettings(hidden=4, epochs=3, batch_size=5, learning_rate=1e-12, norm_weight=0.0)
    predictor = Predictor(3, 4, torch.float32, "cpu", 0)
    x, y = numpy_rows(coefficients, [1, 2, 3])
    expected = float((predictor(x[:, :3], x[:, 3:]) - y).square().mean())
    assert train(predictor, coefficients, [1, 2, 3], settings, seed=0) == pytest.approx([expected] * 3, rel=1e-5)


def test_it_learns_what_can_be_learnt():
    generator = torch.Generator().manual_seed(0)
    start, end = torch.randn(400, 6, generator=generator), torch.randn(400, 6, generator=generator)
    middle = 0.5 * start - 0.25 * end.roll(1, dims=1)
    settings = LesaSettings(epochs=60, norm_weight=5e-5)
    predictor = Predictor(6, 256, torch.float32, "cpu", 0)
    losses = train(predictor, torch.stack([start, middle, end]), [1], settings, seed=0)
    assert losses[-1] < 0.02 * losses[0]
    assert float((predictor(start, end) - middle).square().mean()) < 0.01 * float(middle.square().mean())


def test_same_seed_same_bytes_other_seed_other_bytes():
    coefficients = torch.randn(6, 40, 8, generator=torch.Generator().manual_seed(0))
    settings = LesaSettings(hidden=32, epochs=3)
    results = []
    for seed, noise in ((1, 10), (1, 11), (2, 10)):
        torch.manual_seed(noise)
        predictor = Predictor(8, 32, torch.float32, "cpu", seed)
        losses = train(predictor, coefficients, [1, 2, 4], settings, seed)
        results.append((losses, predictor.flat.numpy().tobytes()))
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_moments_of_units_that_died_become_zero():
    """Numbers below 1.2e-38 would stay there, and slow every step that follows."""
    predictor = Predictor(2, 8, torch.float32, "cpu", 0)
    steps = _Steps(predictor, LesaSettings(hidden=8))
    batch = torch.randn(64, 1, 6, generator=torch.Generator().manual_seed(0))
    for at in range(1200):
        steps(batch)
        if at == 0:
            predictor.layers[0][1][:4] = -100.0  # the bias: half of the units are never active again
        if at % SETTLE == 0:
            steps.settle()
    for moment in (steps._first, steps._second):
        assert float(moment.abs().max()) > 0
        assert not bool(((moment != 0) & (moment.abs() < torch.finfo(torch.float32).tiny)).any())


def test_progress_is_told():
    calls: list[tuple[str, float]] = []
    coefficients = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    settings = LesaSettings(hidden=4, epochs=2)
    train(Predictor(2, 4, torch.float32, "cpu", 0), coefficients, [1], settings, 0, lambda *call: calls.append(call))
    assert [share for _, share in calls] == [0.5, 1.0]
