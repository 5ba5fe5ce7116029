"""What fits which GPUs, told without one; and a model over two, whose tensors PyTorch only pretends to have.

A fake tensor has a shape and a device, and no values; an operation on two that are on different devices is refused, as
on real ones. `cpu:0` and `cpu:1` stand for the GPUs: a PyTorch without CUDA cannot pretend to have that.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lesa_ray.analysis import stream
from lesa_ray.analysis.residual import contributions
from lesa_ray.errors import UserError
from lesa_ray.evaluation import measure, perplexity, placement
from lesa_ray.evaluation.checkpoints import Bounds, input_device, load_model, read_bounds
from lesa_ray.evaluation.perplexity import Row, score
from lesa_ray.evaluation.placement import choose_devices, plan
from lesa_ray.evaluation.settings import EvaluateConfig
from lesa_ray.training.model import layers_of
from tests.evaluation import tiny

spread = pytest.mark.skipif(
    not importlib.util.find_spec("accelerate"), reason="accelerate is an extra: pip install 'lesa-ray[gpus]'"
)
GB = 10**9


def large(layers: int = 80, dtype: str | None = "bfloat16", **changes: Any) -> Bounds:
    """A model of Llama 2 70B's shapes: 138 GB in bfloat16, of which a layer has 1.7."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    parameters = layers * 855_654_400 + 2 * 32000 * 8192 + 8192
    return replace(Bounds("big", "/big", 32000, 4096, parameters, 2 * parameters, True, config), **changes)


def test_what_cannot_fit_is_told_from_headers() -> None:
    assert plan(large(), "bfloat16", 2 * GB, [160 * GB]) is None
    for bound in (large(), large(parameters=0, nbytes=0)):  # a repo id has config.json alone
        with pytest.raises(
            UserError, match=r"^checkpoint big: its weights take 138.0 GB, .* 1 GPU of 80.0 GB"
        ) as error:
            plan(bound, None, 2 * GB, [80 * GB])
        assert "give --gpus-per-task 2, a smaller --batch-size or --window" in str(error.value)
    with pytest.raises(UserError, match=r"take 275.9 GB.*--gpus-per-task 4"):
        plan(large(), "float32", 2 * GB, [80 * GB])
    with pytest.raises(UserError, match=r"give a smaller --batch-size"):  # no number of GPUs would do
        plan(large(), None, 81 * GB, [80 * GB])
    assert large(dtype="float32").weights(None) == 2 * large().weights(None)  # config.json says what it is computed in
    assert large(dtype=None).weights(None) == large().nbytes


def test_a_gpu_has_to_hold_a_window_or_the_batch_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=140 * GB))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    bound = large()  # a window of 4,096 has 0.26 GB of logits
    assert placement.place(bound, None, 4096, None, ("cuda",)) is None
    with pytest.raises(UserError, match=r"logits 2.1 GB on a GPU"):
        placement.place(bound, None, 4096, 8, ("cuda",))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.5)  # --gpus-per-task 0.5
    with pytest.raises(UserError, match=r"1 GPU of 70.0 GB; give --gpus-per-task 2"):
        placement.place(bound, None, 4096, None, ("cuda",))
    assert placement.place(bound, "float32", 4096, 64, ("cpu",)) is None


@spread
def test_layers_go_whole_and_evenly() -> None:
    for count, memory, most in ((2, 80, 44), (8, 80, 12)):
        found = plan(large(), None, 2 * GB, [memory * GB] * count)
        assert isinstance(found, dict)
        layers = [found[f"model.layers.{index}"] for index in range(80)]
        assert layers == sorted(layers)
        assert sorted(set(found.values())) == list(range(count))
        assert max(layers.count(gpu) for gpu in range(count)) <= most
    # 138 GB would go into 2 × 69.6, but not whole layers: the number of GPUs into which they go is looked for
    with pytest.raises(UserError, match=r"given are 2 GPUs of 71.6 GB; give --gpus-per-task 3"):
        plan(large(), None, 2 * GB, [int(71.6 * GB)] * 2)


def test_several_gpus_need_accelerate_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_devices("cpu", 2) == choose_devices(None, 0) == ("cpu",)
    assert choose_devices(None, None) == choose_devices(None, 0.5)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "accelerate", None)
        with pytest.raises(UserError, match=r"^--gpus-per-task 2: .* needs accelerate .*'lesa-ray\[gpus\]'"):
            choose_devices(None, 2)
    if importlib.util.find_spec("accelerate"):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert choose_devices(None, 2) == ("cuda:0", "cuda:1")
        with pytest.raises(UserError, match=r"^--gpus-per-task 4: PyTorch sees 2 GPUs here"):
            choose_devices(None, 4)


def test_a_refused_model_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "choose_devices", lambda device, gpus: ("cuda:0",))
    monkeypatch.setattr(measure, "place", lambda *args: plan(large(), None, 0, [GB]))
    monkeypatch.setattr(measure, "local_folder", None)  # whoever calls it fails
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    bound = read_bounds(tiny.checkpoint(tmp_path / "one"))
    (tmp_path / "text.txt").write_text("text")
    config = EvaluateConfig(checkpoints=(bound.name,), data=(str(tmp_path / "text.txt"),))
    with pytest.raises(UserError, match="--gpus-per-task"):
        measure.measure(measure.Job(config, measure.TextData, 16, 16), bound)  # type: ignore[arg-type]


def two_gpus(mode: FakeTensorMode, *, logits_return: bool) -> PreTrainedModel:
    """A small Llama whose tensors pretend to be on two GPUs, behind accelerate's own hooks.

    logits_return: to where the inputs were, as accelerate has it."""
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_module

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny.llama(num_hidden_layers=4)).eval()
    found = placement._spread(model, [85_000, 85_000])
    assert found is not None
    placed = {name: f"cpu:{gpu}" for name, gpu in found.items()}
    for name, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for own, tensor in tensors.items():
                if tensor is not None:
                    gpu = next(gpu for part, gpu in placed.items() if f"{name}.{own}".startswith(f"{part}."))
                    fake = FakeTensor(mode, tensor.detach(), torch.device(gpu))
                    tensors[own] = torch.nn.Parameter(fake, False) if tensors is module._parameters else fake
    dispatched: PreTrainedModel = dispatch_model(model, placed, main_device="cpu:0")
    if not logits_return:
        remove_hook_from_module(dispatched)
    return dispatched


@spread
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("logits_return", [True, False])
def test_a_batch_goes_from_gpu_to_gpu(logits_return: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    piece = perplexity._Piece(np.arange(6), np.arange(1, 7), 0, 1.0)
    ends: list[torch.device] = []
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: np.zeros(tensor.shape))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: ends.append(tensor.device) or tensor)
    with mode, torch.no_grad():
        model = two_gpus(mode, logits_return=logits_return)
        assert {str(parameter.device) for parameter in model.parameters()} == {"cpu:0", "cpu:1"}
        assert str(input_device(model)) == "cpu:0"
        assert perplexity._losses(model, [piece, piece]).shape == (2,)
    assert [str(end) for end in ends] == ["cpu:0" if logits_return else "cpu:1"]
    model.model.embed_tokens._hf_hook.execution_device = "cpu:1"  # the pretence does see what is amiss
    with mode, torch.no_grad(), pytest.raises(RuntimeError, match="two devices, cpu:0 and cpu:1"):
        perplexity._losses(model, [piece])


@spread
def test_figures_do_not_depend_on_where_the_parts_are(tmp_path: Path) -> None:
    """Through transformers' own loading and accelerate's hooks, on the one real device there is and the disk."""
    folder = tiny.checkpoint(tmp_path / "one")
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    parts |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
    rows = [Row(np.arange(40) * 7 % 250)]
    whole, split = load_model(folder, None), load_model(folder, None, placed=parts)
    assert {str(parameter.device) for parameter in split.parameters()} == {"cpu", "meta"}
    one, other = (score(model, rows, 16, 8, 2) for model in (whole, split))
    assert one.nats.tolist() == other.nats.tolist()
    streams = [contributions(model, rows, 16, 1000, "model") for model in (whole, split)]
    assert streams[0] == streams[1]


@spread
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_the_stream_is_watched_from_gpu_to_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    seen: list[set[str]] = []
    monkeypatch.setattr(
        stream,
        "_add",
        lambda sums, before, after, writes: seen.append({str(one.device) for one in (before, after, *writes.values())}),
    )
    with mode, torch.no_grad():
        model = two_gpus(mode, logits_return=True)
        watch = stream.Watch(layers_of(model))
        watch.real = torch.from_numpy(np.array([0, 1])).to(input_device(model))  # a mask would need values
        model.base_model(
            input_ids=torch.from_numpy(np.zeros((2, 5), np.int64)).to(input_device(model)), use_cache=False
        )
    assert all(len(devices) == 1 for devices in seen)
    assert {device for devices in seen for device in devices} == {"cpu:0", "cpu:1"}
