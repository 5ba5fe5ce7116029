"""Step 2 of LESA: the predictor G, which sees the coefficients of two layers and learns those of the layer between.

G is an MLP 2·d2 → hidden → hidden → d2 with ReLU; a sample is one singular direction k of one layer triple,
that is, row k of V_{i−1} and V_{i+1} in and row k of V_i out (arXiv 2502.13794, section 3; the released
notebooks take rows as samples). Loss: (1−λ)·MSE + λ·(‖Ŷ‖_F − ‖Y‖_F)², the norms over the whole batch, as in
the released code. AdamW with torch's defaults besides the learning rate.

The network is small (0.5 to 10 million parameters) and its batches are 64 rows, so a step is a few
milliseconds and what surrounds it counts: rows are gathered straight out of V by index (no matrix X, which
would be twice V; no DataLoader, which collates row by row), forward and backward are written out (their
equality with autograd is tested), and all parameters lie in one flat vector that one fused AdamW call
updates; on a GPU a step is one CUDA graph. torch.optim's function is called and not its class, whose first use in a
process imports the compiler, a second for every worker. Measured at d2 = 1,024 on one core: 2.9 ms for forward and
backward, of which 2.2 are the products at the core's peak, 0.7 ms for AdamW, 0.1 ms for the gather; on two cores 2.2 ms
in all.

Predictors of one shape that share nothing, of the experts of a mixture, can be trained side by side: their parameters
lie in one vector, and a step takes a batch of each (products by `baddbmm`, one AdamW for all). The mathematics of each
are those of training it alone, with its own initial weights, order of rows and loss; sums may be added in another
order. One step of one small predictor leaves most of a GPU idle. Where that pays, `bounds.STACKED_ON` says.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.optim.adamw import adamw

from lesa_ray.config import LesaSettings
from lesa_ray.lesa.batches import Rows
from lesa_ray.lesa.streams import generator_for

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of the whole unit that is finished, 0 to 1."""
SETTLE = 128
"""Steps after which moments that have died away are set to zero."""
DIED_AWAY = 1e-32
"""Such a moment moves no weight (AdamW divides by √v + 1e-8), and 0.9^128 later it is still above 1.2e-38."""


class Predictor:
    """G, with its parameters in one flat vector: weights (out, in) and biases (out,) as views of it.

    Made by `stack`, n of them: weights (n, out, in), biases (n, out), and n of whatever is computed.
    """

    def __init__(self, d2: int, hidden: int, dtype: torch.dtype, device: str, seed: int) -> None:
        self.d2 = d2
        self.sizes = ((hidden, 2 * d2), (hidden, hidden), (d2, hidden))
        self.lead: tuple[int, ...] = ()
        self.flat = torch.empty(sum(o * i + o for o, i in self.sizes), dtype=dtype)
        generator = generator_for(seed, "init")
        for weight, bias in self.views(self.flat):
            bound = 1 / math.sqrt(weight.shape[1])  # nn.Linear's default: kaiming_uniform(a=√5) is U(±1/√fan_in)
            weight.uniform_(-bound, bound, generator=generator)
            bias.uniform_(-bound, bound, generator=generator)
        self.flat = self.flat.to(device)
        self.layers = self.views(self.flat)

    def views(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(weight, bias) of each layer as views of a vector laid out like the parameters."""
        views, at, n = [], 0, math.prod(self.lead)
        for out, into in self.sizes:
            weight = flat[at : at + n * out * into].view(*self.lead, out, into)
            at += n * out * into
            views.append((weight, flat[at : at + n * out].view(*self.lead, out)))
            at += n * out
        return views

    @staticmethod
    def stack(predictors: Sequence[Predictor]) -> Predictor:
        """Copies of predictors of one shape, as one that computes for each of them."""
        many = copy.copy(predictors[0])
        many.lead = (len(predictors),)
        many.flat = torch.cat([predictor.flat for predictor in predictors])
        many.layers = many.views(many.flat)
        for at, predictor in enumerate(predictors):
            _copy_layers(predictor.layers, many.part(at))
        return many

    def part(self, at: int) -> list[tuple[Tensor, Tensor]]:
        """(weight, bias) of each layer of one of a stack."""
        return [(weight[at], bias[at]) for weight, bias in self.layers]

    def __call__(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Coefficients of the layer between two: (rows, d2) each, on any device, to (rows, d2) on the predictor's."""
        x = torch.cat([lower.to(self.flat), upper.to(self.flat)], dim=1)
        (w1, b1), (w2, b2), (w3, b3) = self.layers
        x = linear(x, w1, b1).relu_()
        x = linear(x, w2, b2).relu_()
        return linear(x, w3, b3)


def _copy_layers(source: list[tuple[Tensor, Tensor]], target: list[tuple[Tensor, Tensor]]) -> None:
    for (weight, bias), (into_weight, into_bias) in zip(source, target, strict=True):
        into_weight.copy_(weight)
        into_bias.copy_(bias)


def loss_and_gradient(
    predictor: Predictor, x: Tensor, y: Tensor, norm_weight: float, gradient: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Loss of a batch x (rows, 2·d2), y (rows, d2); its gradient is written into `gradient`, laid out like
    the parameters. For a stack of n: x (n, rows, 2·d2), y (n, rows, d2), losses (n,)."""
    affine, product = (_affine_each, torch.bmm) if predictor.lead else (torch.addmm, torch.mm)
    (w1, b1), (w2, b2), (w3, b3) = predictor.layers
    (g_w1, g_b1), (g_w2, g_b2), (g_w3, g_b3) = gradient
    h1 = affine(b1, x, w1.mT).relu_()
    h2 = affine(b2, h1, w2.mT).relu_()
    output = affine(b3, h2, w3.mT)

    entries = output.shape[-2] * output.shape[-1]
    error = output - y
    norm = _norm(output)
    gap = norm - _norm(y)
    mse = _norm(error).square() / entries  # no temporary, unlike square().mean()
    loss: Tensor = (1 - norm_weight) * mse + norm_weight * gap.square()
    # d‖Ŷ‖/dŶ = Ŷ/‖Ŷ‖, taken as 0 at Ŷ = 0 as autograd does.
    d_out = error.mul_((1 - norm_weight) * 2 / entries)
    d_out.addcmul_(output, 2 * norm_weight * gap / norm.clamp_min(torch.finfo(norm.dtype).tiny))

    product(d_out.mT, h2, out=g_w3)
    torch.sum(d_out, -2, out=g_b3)
    d_h2 = torch.ops.aten.threshold_backward(product(d_out, w3), h2, 0)
    product(d_h2.mT, h1, out=g_w2)
    torch.sum(d_h2, -2, out=g_b2)
    d_h1 = torch.ops.aten.threshold_backward(product(d_h2, w2), h1, 0)
    product(d_h1.mT, x, out=g_w1)
    torch.sum(d_h1, -2, out=g_b1)
    return loss.view(predictor.lead)


def _affine_each(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`torch.addmm` of n: bias (n, out), x (n, rows, in), weight (n, in, out)."""
    return torch.baddbmm(bias.unsqueeze(1), x, weight)


def _norm(matrices: Tensor) -> Tensor:
    """Frobenius norm of (…, rows, columns): (…, 1, 1)."""
    norm: Tensor = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    return norm


def train(
    predictor: Predictor,
    coefficients: Tensor,
    middles: Sequence[int],
    settings: LesaSettings,
    seed: int,
    progress: Progress | None = None,
) -> list[float]:
    """Fit G to the triples (m−1, m, m+1), m in `middles`; return the mean batch loss of each epoch.

    coefficients: (layers, r, d2), on the CPU (in memory or mapped) or on the predictor's device. Rows of all
    triples are shuffled anew each epoch by a CPU generator of the seed's own, so that the order is the same
    on every device.
    """
    return train_together([predictor], [coefficients], [middles], settings, [seed], progress)[0]


def train_together(
    predictors: Sequence[Predictor],
    coefficients: Sequence[Tensor],
    middles: Sequence[Sequence[int]],
    settings: LesaSettings,
    seeds: Sequence[int],
    progress: Progress | None = None,
) -> list[list[float]]:
    """Fit predictors of one shape side by side, each as `train` does: to its own triples, by its own seed.

    coefficients: of each (layers, r, d2), all in one storage; as many triples of each. Returns the losses of each.
    """
    device = predictors[0].flat.device
    many = predictors[0] if len(predictors) == 1 else Predictor.stack(predictors)
    generators = [generator_for(seed, "shuffle") for seed in seeds]
    rows = Rows(coefficients, middles, settings.batch_size, device)
    losses: list[list[float]] = []
    with _own_stream(device):
        steps = _Steps(many, settings)
        step = _Replayed(steps, settings.batch_size) if device.type == "cuda" else steps
        for epoch in range(settings.epochs):
            steps.total.zero_()
            for at, batch in enumerate(rows.shuffled(generators)):
                step(batch)
                if at % SETTLE == 0:
                    steps.settle()
            losses.append((steps.total / math.ceil(rows.count / settings.batch_size)).view(-1).tolist())
            if progress is not None:
                progress("training the predictor", (epoch + 1) / settings.epochs)
    if many.lead:
        for at, predictor in enumerate(predictors):
            _copy_layers(many.part(at), predictor.layers)
    return [list(of_one) for of_one in zip(*losses, strict=True)]


class _Steps:
    """Optimisation steps of a predictor or a stack: loss, gradient, AdamW. Nothing in a step waits for the device."""

    def __init__(self, predictor: Predictor, settings: LesaSettings) -> None:
        self.predictor, self.settings = predictor, settings
        flat = predictor.flat
        self.total = torch.zeros(predictor.lead, dtype=torch.float64, device=flat.device)
        """Sum of the losses of the steps; of a stack each one's, (n,)."""
        self._slope = torch.zeros_like(flat)
        self._gradient = predictor.views(self._slope)
        self._first, self._second = torch.zeros_like(flat), torch.zeros_like(flat)  # AdamW's moments
        self._count = torch.zeros((), device=flat.device)

    def __call__(self, batch: Tensor) -> None:
        """One step on rows (rows, n, 3·d2) of [lower | upper | target]."""
        d2, settings = self.predictor.d2, self.settings
        batch = batch.transpose(0, 1) if self.predictor.lead else batch[:, 0]
        x, y = batch[..., : 2 * d2], batch[..., 2 * d2 :]
        self.total += loss_and_gradient(self.predictor, x, y, settings.norm_weight, self._gradient)
        adamw(
            [self.predictor.flat],
            [self._slope],
            [self._first],
            [self._second],
            [],
            [self._count],
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=settings.learning_rate,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0.01,
        )  # torch.optim.AdamW's defaults, as in the released code

    def settle(self) -> None:
        """Zero what has died away in AdamW's moments, where the CPU computes.

        Moments of units that ReLU has switched off fall below 1.2e-38 and stay there, and processors handle such
        numbers so slowly that AdamW takes five times as long (0.44 ms → 2.4 ms). `torch.set_flush_denormal` is no way
        out: it holds for the calling thread alone, and the others of its pool share the work.
        """
        if self.total.device.type == "cpu":
            for moment in (self._first, self._second):
                moment.masked_fill_(moment.abs() < DIED_AWAY, 0)


class _Replayed:
    """The same steps through a CUDA graph: some twenty small kernels that one call starts. Full batches only; smaller
    ones, and the first few, which let the libraries settle before they are captured, run as they are.

    Must be used within one stream that is not the default one.
    """

    WARM_UP = 3  # as pytorch.org/docs/stable/notes/cuda.html does

    def __init__(self, steps: _Steps, size: int) -> None:
        self._steps, self._size = steps, size
        self._batch: Tensor | None = None
        self._graph = torch.cuda.CUDAGraph()
        self._warmed = 0

    def __call__(self, batch: Tensor) -> None:
        if len(batch) < self._size or self._warmed < self.WARM_UP:
            self._steps(batch)
            self._warmed += 1
            return
        if self._batch is None:
            self._batch = batch.clone()
            # Threads that read ahead may use the device meanwhile.
            stream = torch.cuda.current_stream(batch.device)
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._steps(self._batch)
        self._batch.copy_(batch)
        self._graph.replay()


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """A stream of its own inside, as capture needs; work before and after it is in order. Nothing without a GPU."""
    if device.type != "cuda":
        yield
        return
    outside, inside = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    inside.wait_stream(outside)
    with torch.cuda.stream(inside):
        yield
    outside.wait_stream(inside)
