"""Pre-training: it learns, a killed run ends in the same bits, what it saves is a Hugging Face folder."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lesa_ray.errors import UserError
from lesa_ray.training.corpus import train_tokenizer
from lesa_ray.training.pretrain import Progress, batch_at, learning_rate_at, make_model, pretrain
from lesa_ray.training.settings import PretrainSettings

TINY = PretrainSettings(
    layers=2,
    width=32,
    mlp_width=64,
    heads=2,
    kv_heads=1,
    context=16,
    batch_size=4,
    steps=12,
    warmup=2,
    checkpoint_every=5,
    threads=1,
)
IDS = (np.arange(1000) * np.arange(1000) % 97 + 3).astype(np.uint16)  # (1000,)

KILLED_AT_8 = """
import os, signal, sys
from tests.training.test_pretrain import IDS, TINY, make_tokenizer
from lesa_ray.training.pretrain import pretrain

def kill(progress):
    if progress.step == 8:
        os.kill(os.getpid(), signal.SIGKILL)

pretrain(sys.argv[1], IDS, make_tokenizer(), TINY, kill)
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["a b c"], 300)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_killed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    straight: list[Progress] = []
    pretrain(str(tmp_path / "straight"), IDS, make_tokenizer(), TINY, straight.append)

    resumed: list[Progress] = []
    command = [sys.executable, "-c", KILLED_AT_8, str(tmp_path / "killed")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    pretrain(str(tmp_path / "killed"), IDS, make_tokenizer(), TINY, resumed.append)

    assert [progress.step for progress in resumed] == list(range(6, 13))  # from the checkpoint of step 5
    assert [progress.loss for progress in resumed] == [progress.loss for progress in straight[5:]]
    expected, found = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not (tmp_path / "killed.partial").exists()


def test_it_learns_a_text_with_a_rule(tmp_path: Path) -> None:
    seen: list[Progress] = []
    cycle = np.tile(np.array([5, 17, 5, 42, 99, 5, 7], dtype=np.uint16), 100)
    settings = TINY.model_copy(update={"steps": 150, "learning_rate": 1e-2})
    pretrain(str(tmp_path / "base"), cycle, make_tokenizer(), settings, seen.append)
    assert seen[0].loss == pytest.approx(np.log(300), abs=0.3)  # knows nothing: uniform over the vocabulary
    assert seen[-1].loss < 0.3  # what follows a 5 is known from what went before; only a sequence's start is not


def test_the_result_is_a_hugging_face_folder_and_is_reused(tmp_path: Path) -> None:
    out = tmp_path / "base"
    made = pretrain(str(out), IDS, make_tokenizer(), TINY)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float32
    assert model.num_parameters() == made.parameters
    assert made.tokens == 12 * 4 * 16
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id

    seen: list[Progress] = []
    again = pretrain(str(out), IDS, make_tokenizer(), TINY, seen.append)
    assert again.reused
    assert not seen
    assert (again.parameters, again.seconds) == (made.parameters, made.seconds)


def test_another_run_s_work_is_refused_or_begun_again(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.step == 6:
            raise Stop

    with pytest.raises(Stop):
        pretrain(str(tmp_path / "base"), IDS, make_tokenizer(), TINY, stop)
    assert (tmp_path / "base.partial" / "state.pt").exists()
    seen: list[Progress] = []
    other = TINY.model_copy(update={"seed": 1})
    pretrain(str(tmp_path / "base"), IDS, make_tokenizer(), other, seen.append)
    assert seen[0].step == 1  # not 6: the checkpoint was of seed 0
    with pytest.raises(UserError, match="other settings or other text"):
        pretrain(str(tmp_path / "base"), IDS, make_tokenizer(), TINY)
    with pytest.raises(UserError, match="other settings or other text"):
        pretrain(str(tmp_path / "base"), IDS[:-1], make_tokenizer(), other)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"no pretrain\.json"):
        pretrain(str(tmp_path / "mine"), IDS, make_tokenizer(), TINY)


def test_an_epoch_reads_every_sequence_once() -> None:
    ids = np.arange(10 * 16 + 5, dtype=np.uint16)  # 10 sequences of 16, and a rest
    settings = TINY.model_copy(update={"batch_size": 5})
    first = torch.cat([batch_at(ids, step, settings) for step in (0, 1)])  # (10, 17)
    second = torch.cat([batch_at(ids, step, settings) for step in (2, 3)])
    for epoch in (first, second):
        assert sorted(epoch[:, 0].tolist()) == list(range(0, 160, 16))
        assert torch.equal(epoch, epoch[:, :1] + torch.arange(17))
    assert not torch.equal(first, second)
    assert torch.equal(first[5:], batch_at(ids, 1, settings))  # a pure function of the step


def test_the_rate_rises_stays_and_falls() -> None:
    settings = TINY.model_copy(update={"steps": 100, "warmup": 10, "decay_share": 0.2, "learning_rate": 1.0})
    rates = [learning_rate_at(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:81] == [1.0] * 72
    assert rates[81] == pytest.approx(0.95)
    assert rates[99] == pytest.approx(0.05)


def test_the_caller_s_random_state_and_threads_stay(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    pretrain(str(tmp_path / "base"), IDS, make_tokenizer(), TINY.model_copy(update={"steps": 1}))
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_num_threads() == threads


def test_a_text_shorter_than_a_sequence_and_a_diverged_loss_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="16 token ids"):
        pretrain(str(tmp_path / "base"), IDS[:16], make_tokenizer(), TINY)
    with pytest.raises(UserError, match="lower learning_rate"):
        pretrain(str(tmp_path / "base"), IDS, make_tokenizer(), TINY.model_copy(update={"learning_rate": 1e30}))


def test_the_model_has_the_shape_asked_for() -> None:
    model = make_model(TINY, 300, 0)
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32  # q, o; k, v; MLP; two norms
    assert sum(parameter.numel() for parameter in model.parameters()) == 2 * layer + 300 * 32 + 32  # tied head
