"""Long rows, whose logits are made a piece at a time: the losses and gradients of whole ones, in a piece's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.training import loop
from lesa_ray.training.conversion import plan_conversions
from lesa_ray.training.freeze import freeze, trained_names
from lesa_ray.training.gates import Gates
from lesa_ray.training.insertion import Insertion
from lesa_ray.training.long_rows import losses_in_pieces
from lesa_ray.training.loop import Place, Trainer, make_optimizer, token_losses
from lesa_ray.training.model import build, layers_of, load, shard, stored_types, trained_parameters
from lesa_ray.training.tokens import UNSCORED
from lesa_ray.training.train_settings import TrainConfig
from tests import families
from tests.training.workers import run_workers

WHOLE, PIECE = 4096, 7
ROWS, LENGTH = 2, 24
CPU = torch.device("cpu")
Found = tuple[tuple[float, float], dict[str, np.ndarray], list[int]]


def rows(rank: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(rank).integers(3, families.VOCAB, (ROWS, LENGTH), dtype=np.int32)
    labels = ids.copy()
    labels[0, : 5 + rank] = UNSCORED
    labels[1, 9:17] = UNSCORED  # all of one piece
    return {"input_ids": ids, "labels": labels}


def worker_losses(base: str, tokens: int, train: str, gated: bool, settings: dict[str, Any]) -> Found:
    """The sum of this worker's losses and a step's norm, the gradients (means over workers), and of how many tokens
    the head made logits at a time."""
    given = {"checkpoint": base, "data": "unused", "out": "unused", "batch": 4, "micro_batch": ROWS, "steps": 1}
    config = TrainConfig.model_validate({**given, **settings})
    checkpoint = open_checkpoint(base)
    model = build(checkpoint.config, base)
    names = trained_names(model, (train,), None, base)
    lowest = freeze(model, names)
    gates = Gates(layers_of(model), Insertion((1, 3), 4, "together"), CPU) if gated else None
    conversions = plan_conversions(model, checkpoint.tensors, base)
    shard(
        model, init_device_mesh("cpu", (dist.get_world_size(),)), bf16=config.precision == "bf16",
        stored=stored_types(checkpoint, conversions), lowest=lowest, compiled=False,
        activation_checkpointing=config.activation_checkpointing, cpu_offload=config.cpu_offload,
    )  # fmt: skip
    load(model, checkpoint, conversions)
    trained = trained_parameters(model, names)
    place = Place(dist.get_rank(), dist.get_world_size(), CPU)
    loop._MICRO_TOKENS = tokens
    trainer = Trainer(model, trained, make_optimizer(trained, config), config, place, 1, LENGTH, None, gates)
    if gates is not None:
        gates.set(1)
    made: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, __: made.append(args[0][..., 0].numel()))
    loss = trainer.losses(rows(place.rank))
    loss.backward()
    gradients = {name: p.grad.full_tensor().float().numpy() for name, p in trained.items() if p.grad is not None}
    with torch.no_grad():
        measured = trainer.losses(rows(place.rank))
    assert np.isclose(measured.item(), loss.item(), rtol=1e-6)
    step = trainer.step(0, rows(place.rank))  # a pass after a pass, clipped, with an optimizer's step
    return (loss.item(), float(step[1])), gradients, made


def several(cases: list[tuple[Any, ...]]) -> list[Found]:
    return [worker_losses(*case) for case in cases]


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Gemma 2 with a cap that its logits feel."""
    return families.make("gemma2", tmp_path_factory.mktemp("capped") / "base", final_logit_softcapping=0.5)


def double(base: str) -> tuple[list[float], dict[str, np.ndarray]]:
    """Of a plain pass over each worker's rows in float64: the losses, and the gradients, a mean over the workers."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, use_cache=False)
    model.set_experts_implementation("eager")  # the others take no float64
    losses = []
    for rank in range(2):
        ids, labels = (torch.from_numpy(rows(rank)[name]).long() for name in ("input_ids", "labels"))
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        loss.backward()
        losses.append(loss.item())
    return losses, {name: p.grad.numpy() / 2 for name, p in model.named_parameters()}


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert found.keys() == expected.keys() != set()
    for name, gradient in found.items():
        apart = np.linalg.norm(gradient - expected[name]) / np.linalg.norm(expected[name])
        assert apart < tolerance, (name, apart)


@pytest.mark.timeout(600)
def test_losses_and_gradients_are_a_plain_pass_s(bases: Callable[[str], str], capped: str) -> None:
    """Of whole rows in float64: an untied head and tied ones, a cap on logits, a mixture of experts."""
    models = [bases("llama"), bases("llama_tied"), capped, bases("qwen3_moe")]
    found = run_workers(several, 2, [(base, PIECE, "all", False, {"precision": "fp32"}) for base in models])
    for number, base in enumerate(models):
        losses, gradients = double(base)
        for rank in range(2):
            (loss, _), pieces, made = found[rank][number]
            assert np.isclose(loss, losses[rank], rtol=1e-6, atol=0), base
            assert_close(pieces, gradients, 1e-5)
            assert max(made) <= PIECE + ROWS, "a piece predicts so many tokens, and has each row's last one beside"


@pytest.mark.timeout(600)
def test_pieces_give_what_whole_rows_do(bases: Callable[[str], str]) -> None:
    """Whatever is trained and however: with gates, offloaded, checkpointed, in bf16."""
    kinds: list[tuple[str, bool, dict[str, Any]]] = [
        ("*.layers.3.*", True, {"precision": "fp32", "activation_checkpointing": True, "cpu_offload": True}),
        ("lm_head", False, {"precision": "fp32"}),
        ("all", True, {"precision": "bf16"}),
    ]
    found = run_workers(several, 2, [(bases("llama"), tokens, *kind) for kind in kinds for tokens in (WHOLE, PIECE)])[0]
    for number, kind in enumerate(kinds):
        (values, gradients, made), (in_pieces, by_pieces, _) = found[2 * number : 2 * number + 2]
        tolerance = 2e-2 if kind[2]["precision"] == "bf16" else 1e-5
        assert max(made) == ROWS * LENGTH
        assert np.allclose(values, in_pieces, rtol=tolerance / 2, atol=0), kind
        assert_close(by_pieces, gradients, tolerance)


@pytest.mark.timeout(600)
def test_with_a_compiled_loss(bases: Callable[[str], str]) -> None:
    """Twice, as the second time finds graphs for pieces of both lengths. `test_options` compiles layers."""
    base, fp32 = bases("llama"), {"precision": "fp32"}
    cases = [(base, WHOLE, "lm_head", False, fp32), (base, PIECE, "lm_head", False, {**fp32, "compile": True})]
    plain, pieces = run_workers(several, 1, cases)[0]
    assert np.allclose(plain[0], pieces[0], rtol=1e-5, atol=0)
    assert_close(pieces[1], plain[1], 1e-5)


class Peak(TorchDispatchMode):
    """The most bytes that results of operations have taken at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self._live.values()))
        return result


def test_memory_is_a_piece_s() -> None:
    vocabulary, length, piece = 4096, 512, 64
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1)  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, vocabulary, (1, length))
    whole, pieces = Peak(), Peak()
    with whole:
        token_losses(model(input_ids=ids, use_cache=False).logits, ids).backward()
    with pieces:
        losses_in_pieces(model, {"input_ids": ids}, ids, token_losses, piece).backward()
    logits = 4 * length * vocabulary
    assert whole.bytes > 2 * logits
    assert pieces.bytes < 5 * logits * piece / length, (pieces.bytes, whole.bytes)
    assert "forward" not in vars(model) | vars(model.model)


def test_small_micro_batches_go_the_short_way(bases: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "losses_in_pieces", None)  # called, it would raise
    small = run_workers(several, 1, [(bases("llama"), ROWS * LENGTH, "all", False, {"precision": "fp32"})])[0]
    assert max(small[0][2]) == ROWS * LENGTH
