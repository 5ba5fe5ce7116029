"""Documents become one stream of ids, conversations whole rows."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from lesa_ray.errors import UserError
from lesa_ray.training.documents import fragments
from lesa_ray.training.packing import Encoder, encode, fill_rows, hide, pack_examples
from tests.training import styles

pytestmark = pytest.mark.timeout(180)


def stream(tokenizer: PreTrainedTokenizerFast, texts: list[str], longest: int = 10_000) -> list[int]:
    encoder = Encoder.of(tokenizer, "it")
    pieces = [fragment for text in texts for fragment in fragments(text, longest)]
    return [int(number) for _, ids in encode(encoder, pieces) for number in ids]


@pytest.mark.parametrize("style", styles.STYLES)
def test_a_document_is_what_the_tokenizer_makes_of_it_and_the_end(style: str) -> None:
    tokenizer = styles.STYLES[style]()
    texts = ["The café\n  opens – 𝄞", "x", "", " \n"]
    whole = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts if text]
    assert stream(tokenizer, texts) == [number for ids in whole for number in ids]
    begins = {"llama2": "<s>", "llama3": "<|begin|>"}.get(style)
    assert tokenizer.convert_ids_to_tokens(whole[0][0]) == begins or begins is None
    assert Encoder.of(tokenizer, "it").prefix == ((whole[0][0],) if begins else ())


def test_an_end_that_the_tokenizer_puts_itself_is_not_put_twice() -> None:
    tokenizer = styles.gpt2()
    end = ("<|endoftext|>", tokenizer.eos_token_id)
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[end]
    )
    assert tokenizer("café")["input_ids"][-1] == end[1]
    assert stream(tokenizer, ["café", "x"]) == [*tokenizer("café")["input_ids"], *tokenizer("x")["input_ids"]]


@pytest.mark.parametrize("style", ["gpt2", "llama3", "qwen"])
def test_a_cut_document_has_the_ids_of_the_whole(style: str) -> None:
    text = "".join(
        f"def add_{n}(left, right):\n    return left +\n\n        {n}\r\n\n\n\tnaïve\n…  café\n" for n in range(60)
    )
    tokenizer = styles.STYLES[style]()
    assert len(list(fragments(text, 50))) > 20
    assert stream(tokenizer, [text], longest=50) == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    words = "naïve people come " * 100  # no line's end at all
    assert stream(tokenizer, [words], longest=50) == [*tokenizer(words)["input_ids"], tokenizer.eos_token_id]


def test_special_tokens_written_in_a_text_are_text() -> None:
    tokenizer = styles.llama3()
    ids = stream(tokenizer, ["a<|end|>b<|begin|>"])
    assert ids.count(tokenizer.eos_token_id) == ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids[1:-1]) == "a<|end|>b<|begin|>"
    assert tokenizer("<|end|>", add_special_tokens=False)["input_ids"] == [tokenizer.eos_token_id]  # not for good


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = styles.gpt2()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"^tokenizer it: has no end-of-text token"):
        Encoder.of(tokenizer, "it")


def naive_best_fit(lengths: list[int], seq_len: int, most: int) -> list[list[int]]:
    """The same rule with plain loops."""
    rows: list[list[int]] = []
    room: dict[int, int] = {}
    for index, length in enumerate(lengths):
        fitting = [(free, row) for row, free in room.items() if free >= length]
        if fitting:
            _, row = min(fitting)
        else:
            row = len(rows)
            rows.append([])
            room[row] = seq_len
        rows[row].append(index)
        room[row] -= length
        if not room[row]:
            del room[row]
        if len(room) > most:
            del room[min(room, key=lambda row: (room[row], row))]
    return rows


@pytest.mark.parametrize("draw", ["uniform", "short", "long", "halves"])
def test_packing_is_best_fit_among_open_rows(draw: str) -> None:
    random = np.random.default_rng(3)
    lengths = {
        "uniform": random.integers(1, 101, 1500),
        "short": random.integers(1, 20, 1500),
        "long": random.integers(51, 101, 600),
        "halves": np.full(301, 50),
    }[draw].tolist()
    packed = pack_examples(lengths, 100)
    rows = [packed.examples[a:b].tolist() for a, b in pairwise(packed.starts)]
    assert rows == naive_best_fit(lengths, 100, 128)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 100 for row in rows)
    used = sum(lengths) / (100 * packed.rows)
    assert used > {"uniform": 0.97, "short": 0.99, "long": 0.5, "halves": 0.99}[draw]


def test_nothing_to_pack_is_no_row() -> None:
    assert pack_examples([], 100).rows == 0


def test_rows_keep_their_examples_apart() -> None:
    first = hide(np.array([5, 6, 7], np.int32), np.array([True, False, True]))
    second = hide(np.array([0, 8], np.int32), np.array([False, True]))
    got = fill_rows([[first, second], [second]], 6, pad=9)
    np.testing.assert_array_equal(got["input_ids"], [[5, 6, 7, 0, 8, 9], [0, 8, 9, 9, 9, 9]])
    np.testing.assert_array_equal(got["labels"], [[-100, -100, 7, -100, 8, -100], [-100, 8, *[-100] * 4]])
    np.testing.assert_array_equal(got["position_ids"], [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]])
    assert all(values.dtype == np.int32 for values in got.values())


@pytest.fixture(scope="module", params=list(styles.STYLES))
def any_style(request: pytest.FixtureRequest) -> Callable[[], PreTrainedTokenizerFast]:
    return styles.STYLES[request.param]


def test_batches_do_not_change_the_ids(any_style: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = any_style()
    texts = [f"line {number}\n" * (number % 7) for number in range(200)]  # more than a batch, some empty
    singly = [number for text in texts for number in stream(tokenizer, [text])]
    assert stream(tokenizer, texts) == singly
