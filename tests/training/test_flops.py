"""The FLOP count against PyTorch's own, which watches the products of a real forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lesa_ray.training.flops import peak_flops, step_flops
from tests import families

BATCH, SEQ = 3, 32
TOKENS = BATCH * SEQ
HEADS = ("lm_head.weight", "embed_out.weight")
NORMS = ("model.norm.weight", "gpt_neox.final_layer_norm.weight", "transformer.ln_f.weight")


def upper(name: str) -> bool:
    return ".2." in name or ".3." in name


TRAINED: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "upper half": upper,
    "upper half and head": lambda name: upper(name) or name in HEADS,
    "all but embeddings": lambda name: not any(part in name for part in ("embed_tokens", "embed_in", "wte", "wpe")),
    "embeddings": lambda name: any(part in name for part in ("embed_tokens", "embed_in", "wte")),
    "final norm": lambda name: name in NORMS,
    "head": lambda name: name in HEADS,
}


def make(family: str, **config: object) -> PreTrainedModel:
    """Four layers; attention and experts as plain products: the fused ones PyTorch's counter does not see on a CPU.
    Like PaLM's convention they compute also what the causal mask hides."""
    kind = families.FAMILIES[family]
    made = AutoConfig.for_model(
        kind.model_type, **{**kind.config, kind.depth_key: 4, **config}, attn_implementation="eager"
    )
    made._experts_implementation = "eager"
    model: PreTrainedModel = AutoModelForCausalLM.from_config(made)
    return model.train()


def train_only(model: PreTrainedModel, chosen: Callable[[str], bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))


def measured(model: PreTrainedModel) -> int:
    with FlopCounterMode(display=False) as counter:
        model(input_ids=families.tokens(BATCH, SEQ), use_cache=False).logits.float().sum().backward()
    return counter.get_total_flops()


def counted(model: torch.nn.Module, lowest_layer: int | None = None) -> float:
    return step_flops(model, tokens=TOKENS, seq_len=SEQ, lowest_layer=lowest_layer)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3", "gpt_neox", "gpt2", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("trained", TRAINED)
def test_it_counts_what_pytorch_counts(family: str, trained: str) -> None:
    model = make(family)
    train_only(model, TRAINED[trained])
    if not any(p.requires_grad for p in model.parameters()):
        pytest.skip("a tied head is trained as the embeddings are")
    assert counted(model) == measured(model)
    if trained == "head":
        assert counted(model, lowest_layer=4) == measured(model)  # all four layers lie below


def test_freezing_the_lower_half_saves_a_third() -> None:
    """Of a trained layer's 3 units a frozen one costs 1: (2·1 + 2·3) / (4·3) = 2/3; the frozen head costs 2 of 3."""
    model = make("llama")
    everything = counted(model)
    train_only(model, upper)
    assert counted(model) == pytest.approx(everything * 2 / 3)
    assert counted(model, lowest_layer=2) == counted(model, lowest_layer=3) == counted(model)


def test_backward_can_be_said_to_go_deeper() -> None:
    """As it does when gradients of the embeddings' output are asked for, though nothing below layer 2 is trained."""
    model = make("llama")
    train_only(model, upper)
    model.enable_input_require_grads()
    assert counted(model, lowest_layer=0) == measured(model) > counted(model)
    train_only(model, TRAINED["head"])
    assert counted(model, lowest_layer=0) == measured(model) > counted(model)


def test_the_lowest_layer_counts_whole() -> None:
    """Where only its last matrix is trained, backward stops there; the count goes on to the layer's beginning."""
    model = make("llama")
    train_only(model, lambda name: name == "model.layers.2.mlp.down_proj.weight")
    layer = model.get_submodule("model.layers.2")
    rest = sum(p.numel() for n, p in layer.named_parameters() if p.ndim == 2 and "down_proj" not in n)
    attention = 4 * 2 * SEQ * 64  # two products forward, each with two gradients
    down = model.get_parameter("model.layers.2.mlp.down_proj.weight").numel()
    assert counted(model) - measured(model) == TOKENS * (2 * rest + 2 * down + attention)


def test_a_window_bounds_what_attention_costs() -> None:
    full, sliding = make("gemma2", sliding_window=SEQ), make("gemma2", sliding_window=4)
    assert counted(full) == measured(full)
    assert counted(full) - counted(sliding) == TOKENS * 2 * 3 * 4 * (SEQ - 4) * 64  # every other of four layers


def test_experts_of_unknown_number_are_all_counted(caplog: pytest.LogCaptureFixture) -> None:
    known, unknown = make("mixtral"), make("mixtral")
    unknown.config.num_experts_per_tok = 0  # not told
    assert counted(unknown) > 1.2 * counted(known)
    assert "all experts counted" in caplog.text


def test_a_sharded_model_on_the_meta_device_counts_as_a_whole() -> None:
    with torch.device("meta"):
        model = make("llama")
    train_only(model, upper)
    whole = counted(model)
    with two_workers():
        for layer in model.get_submodule("model.layers").children():
            torch.distributed.fsdp.fully_shard(layer)
        torch.distributed.fsdp.fully_shard(model)
        parameter = model.get_parameter("model.layers.0.mlp.up_proj.weight")
        assert parameter.to_local().numel() == parameter.numel() / 2  # it is sharded
        assert counted(model) == whole


@contextmanager
def two_workers() -> Iterator[None]:
    """This process as the first of two workers, the other one only imagined."""
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("Tesla T4", None),
        ("AMD Instinct MI300X", None),
        ("Intel(R) Arc(TM) Pro A40 Graphics", None),
        ("cpu", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_flops(name, torch.bfloat16) == peak
    assert peak_flops(name, torch.float32) is None
