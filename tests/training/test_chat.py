"""Conversations → ids, and which of them are learnt."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AddedToken, BatchEncoding, PreTrainedTokenizerFast

from lesa_ray.errors import UserError
from lesa_ray.training.chat import COLUMNS, ChatEncoder, Example, conversation, fit
from lesa_ray.training.documents import Row, read_rows
from lesa_ray.training.sources import deal, find_sources
from tests.training import styles

pytestmark = pytest.mark.timeout(180)
SYSTEM = {"role": "system", "content": "Be brief."}
ONE = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "yes, the café"}]
TWO = [*ONE, {"role": "user", "content": "why?"}, {"role": "assistant", "content": "no\n\nreason"}]


def examples(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], **more: Any) -> list[Example]:
    row = Row("file: line 1", {"messages": messages, **more})
    found = conversation(row)
    assert found is not None
    return ChatEncoder(tokenizer, "it")(row, found)


def learnt(tokenizer: PreTrainedTokenizerFast, example: Example) -> list[str]:
    """The texts of the runs of learnt tokens."""
    runs: list[list[int]] = []
    before = False
    for number, scored in zip(example.ids.tolist(), example.scored.tolist(), strict=True):
        if scored:
            runs += [] if before else [[]]
            runs[-1].append(number)
        before = scored
    return [tokenizer.decode(run) for run in runs]


def whole(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], **more: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **more)["input_ids"])


@pytest.mark.parametrize(
    ("tokenizer", "ends"),
    [
        (styles.qwen(styles.CHATML), "<|im_end|>"),
        (styles.qwen(styles.MARKED), "<|im_end|>"),
        (styles.llama3(styles.LLAMA3), "<|eot|>"),
        (styles.llama2(styles.MISTRAL), "</s>"),
    ],
    ids=["chatml", "marked", "llama3", "mistral"],
)
@pytest.mark.parametrize("messages", [ONE, TWO], ids=["one", "two"])
def test_the_answers_and_their_ends_are_learnt(tokenizer: Any, ends: str, messages: Any) -> None:
    (example,) = examples(tokenizer, messages)
    assert example.ids.tolist() == whole(tokenizer, messages)
    answers = [m["content"] + ends for m in messages if m["role"] == "assistant"]
    assert [run.lstrip() for run in learnt(tokenizer, example)] == answers


@pytest.mark.parametrize(
    ("tokenizer", "end"),
    [
        (styles.qwen(styles.MARKED), "<|im_end|>"),
        (styles.llama3(styles.LLAMA3), "<|eot|>"),
        (styles.llama2(styles.MISTRAL), "</s>"),
        (styles.llama3(styles.PLAIN), "<|end|>"),
        (styles.qwen("{{ raise_exception('no') }}"), "<|im_end|>"),
        (styles.qwen("hello"), "<|im_end|>"),
    ],
    ids=["marked", "llama3", "mistral", "plain", "refuses", "no answer"],
)
def test_generation_stops_where_answers_end(tokenizer: Any, end: str) -> None:
    assert ChatEncoder(tokenizer, "it").stop() == tokenizer.convert_tokens_to_ids(end)


def test_the_mark_of_the_template_wins() -> None:
    template = styles.MARKED.replace("{% generation %}", "THOUGHT{% generation %}")
    tokenizer = styles.qwen(template)
    (example,) = examples(tokenizer, ONE)
    assert learnt(tokenizer, example) == ["yes, the café<|im_end|>"]
    unmarked = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    (example,) = examples(styles.qwen(unmarked), ONE)
    assert learnt(tokenizer, example) == ["THOUGHTyes, the café<|im_end|>"]


def test_of_special_tokens_behind_a_marked_answer_the_first_is_learnt() -> None:
    template = styles.MARKED.replace("{% endgeneration %}<|im_end|>", "{% endgeneration %}<|im_end|><|endoftext|>")
    tokenizer = styles.qwen(template)
    (example,) = examples(tokenizer, TWO)
    assert learnt(tokenizer, example) == ["yes, the café<|im_end|>", "no\n\nreason<|im_end|>"]


def test_a_marked_answer_is_learnt_to_the_last_byte_of_its_last_character() -> None:
    tokenizer = styles.qwen(styles.MARKED)
    talk = [ONE[0], {"role": "assistant", "content": "ok 😊"}]
    assert len(tokenizer("😊")["input_ids"]) > 1
    (example,) = examples(tokenizer, [*talk, *talk])
    assert learnt(tokenizer, example) == ["ok 😊<|im_end|>", "ok 😊<|im_end|>"]


def test_a_slow_tokenizer_learns_the_answers_of_a_template_with_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a tokenizer does not know which token a character is of."""

    def unknown(*_: Any) -> None:
        raise ValueError("char_to_token() is not available when using Python based tokenizers")

    tokenizer = styles.qwen(styles.MARKED)
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda _: False))
    monkeypatch.setattr(BatchEncoding, "char_to_token", unknown)
    (example,) = examples(tokenizer, TWO)
    assert learnt(tokenizer, example) == ["yes, the café<|im_end|>", "no\n\nreason<|im_end|>"]


def test_what_follows_a_special_token_within_an_answer_is_learnt() -> None:
    tokenizer = styles.gpt2()
    tokenizer.chat_template = styles.PLAIN
    (example,) = examples(tokenizer, [ONE[0], {"role": "assistant", "content": "yes<|endoftext|>the café"}])
    (answer,) = learnt(tokenizer, example)
    assert answer.lstrip() == "yes<|endoftext|>the café\n<|endoftext|>"


def test_an_answer_that_joins_the_header_is_learnt_from_the_joint_on() -> None:
    tokenizer = styles.qwen(styles.CHATML)
    odd = [ONE[0], {"role": "assistant", "content": "\n\n  yes"}, TWO[2], {"role": "assistant", "content": ""}]
    (example,) = examples(tokenizer, odd)
    assert example.ids.tolist() == whole(tokenizer, odd)
    first, second = learnt(tokenizer, example)
    assert first.lstrip("\n") == "  yes<|im_end|>"
    assert second == "<|im_end|>"


def test_a_template_that_ends_nothing_gets_the_end_of_text() -> None:
    tokenizer = styles.gpt2()
    tokenizer.chat_template = styles.PLAIN
    (example,) = examples(tokenizer, TWO)
    assert example.ids.tolist() == [*whole(tokenizer, TWO), tokenizer.eos_token_id]
    first, second = learnt(tokenizer, example)  # " n" is one token: it joins the header to the answer
    assert (first.lstrip(), second.lstrip()) == ("yes, the café\n", "no\n\nreason\n<|endoftext|>")


def test_a_template_that_forgets_gives_an_example_for_each_answer() -> None:
    tokenizer = styles.qwen(styles.FORGETFUL)
    first, second = examples(tokenizer, [SYSTEM, *TWO])
    assert first.ids.tolist() == whole(tokenizer, [SYSTEM, *ONE])
    assert second.ids.tolist() == whole(tokenizer, [SYSTEM, *TWO])
    think = "<think>\n\n</think>\n\n"
    assert learnt(tokenizer, first) == [f"{think}yes, the café<|im_end|>"]
    assert learnt(tokenizer, second) == [f"{think}no\n\nreason<|im_end|>"]
    assert len(examples(tokenizer, ONE)) == 1


def test_a_template_whose_prefixes_never_agree_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^tokenizer it: its chat template renders .*file: line 1.*generation"
    ) as caught:
        examples(styles.qwen(styles.FICKLE), TWO)
    assert "\n" not in str(caught.value)


def test_a_template_that_refuses_a_conversation_is_named_with_its_row() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('System role\nnot supported') }}{% endif %}"
    for more in ("", styles.MARKED):
        with pytest.raises(UserError, match=r"^DATA file: line 1: the chat template .*System role not supported"):
            examples(styles.qwen(template + more), [SYSTEM, *ONE])


def test_tokenizers_that_cannot_serve_are_refused() -> None:
    with pytest.raises(UserError, match=r"^tokenizer it: has no chat template"):
        ChatEncoder(styles.gpt2(), "it")
    tokenizer = styles.qwen(styles.CHATML)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"^tokenizer it: has no end-of-text token"):
        ChatEncoder(tokenizer, "it")


def test_padding_is_the_tokenizers_or_the_end() -> None:
    qwen, llama = styles.qwen(styles.CHATML), styles.llama3(styles.LLAMA3)
    assert ChatEncoder(qwen, "it").pad == qwen.pad_token_id
    assert ChatEncoder(llama, "it").pad == llama.eos_token_id


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prompt": "a", "response": "b"}, ["a", "b"]),
        ({"instruction": "a", "output": "b"}, ["a", "b"]),
        ({"instruction": "a", "input": "c", "output": "b"}, ["a\n\nc", "b"]),
        ({"instruction": "a", "input": "", "output": "b"}, ["a", "b"]),
        ({"messages": ONE, "prompt": "x", "response": "y"}, ["hi there", "yes, the café"]),
        ({"messages": [*ONE, {"role": "user", "content": "bye"}]}, ["hi there", "yes, the café"]),
        ({"prompt": "\ud800a", "response": "b"}, ["?a", "b"]),
        ({"messages": None, "prompt": "a", "response": "b"}, ["a", "b"]),
        ({"messages": ONE[:1]}, None),
        ({"messages": ONE[1:]}, None),
        ({"messages": []}, None),
        ({"messages": None}, None),
        ({"prompt": "a", "response": None}, None),
    ],
)
def test_the_ways_to_write_a_conversation(values: dict[str, Any], expected: list[str] | None) -> None:
    found = conversation(Row("file: line 1", values))
    assert (found and [message["content"] for message in found]) == expected
    if found and len(found) == 2:
        assert [message["role"] for message in found] == ["user", "assistant"]


def test_keys_without_a_value_are_not_there() -> None:
    found = conversation(Row("", {"messages": [{**m, "tool_calls": None} for m in ONE]}))
    assert found == ONE


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": "a"}, "has no conversation: expected a column messages.*its columns: text"),
        ({"messages": "a"}, "messages must be a list of objects with a role"),
        ({"messages": [{"from": "human"}]}, "messages must be a list of objects with a role"),
        ({"prompt": ["a"], "response": "b"}, "question and answer must be text"),
        ({"prompt": "a", "response": {"text": "b"}}, "question and answer must be text"),
        ({"instruction": "a", "input": ["c"], "output": "b"}, "question and answer must be text"),
    ],
)
def test_rows_that_are_no_conversation_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^DATA file: line 1: {message}|^DATA file: line 1: {message}"):
        conversation(Row("file: line 1", values))


def test_tools_reach_the_template() -> None:
    tokenizer = styles.qwen("{% if tools %}TOOL {{ tools[0].name }}{% endif %}" + styles.CHATML)
    (example,) = examples(tokenizer, ONE, tools=[{"name": "add"}])
    assert tokenizer.decode(example.ids).startswith("TOOL add<|im_start|>")
    (half,) = examples(tokenizer, ONE, tools=[{"name": "add\ud800"}])
    assert tokenizer.decode(half.ids).startswith("TOOL add?<|im_start|>")
    assert learnt(tokenizer, example) == ["yes, the café<|im_end|>"]


TOOLS = [{"name": "add", "parameters": {"type": "object", "default": None}}]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (TOOLS, TOOLS),
        (json.dumps(TOOLS), TOOLS),
        ([json.dumps(TOOLS[0])], TOOLS),
        ([], None),
        ("[]", None),
        ("null", None),
        ("", None),
        (None, None),
    ],
)
def test_tools_are_a_list_or_json(given: Any, shown: Any) -> None:
    tokenizer = styles.qwen("{{ tools | tojson }}" + styles.CHATML)
    (example,) = examples(tokenizer, ONE, tools=given)
    assert tokenizer.decode(example.ids).startswith(f"{json.dumps(shown)}<|im_start|>")


@pytest.mark.parametrize("given", ["add(left, right)", "{}x", '{"name": "add"}', '["add"]', ["add"], [1], {"a": 1}, 3])
def test_tools_that_are_not_understood_are_named(given: Any) -> None:
    with pytest.raises(UserError, match=r"^DATA file: line 1: tools must be a list of objects, or .*JSON text$"):
        examples(styles.qwen(styles.CHATML), ONE, tools=given)


def test_columns_add_no_keys_to_messages_and_tools(tmp_path: Path) -> None:
    """A row with another's keys beside it, in Parquet, reads as it was written. In JSON a null is the user's own."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image", "image": name}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"name": "of", "arguments": {name: [None, "a"]}}],
                },
            ],
            "tools": [{"name": "of", "parameters": {"properties": {name: {"type": "string"}}}}],
        }
        for name in ("city", "content")
    ]
    template = "{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m | tojson }}<|im_end|>{% endfor %}"
    tokenizer = styles.qwen(template)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (piece,) = deal(find_sources([str(tmp_path / "rows.parquet")], None, "train"))
    read = list(read_rows(piece.parts[0], COLUMNS, (None, "train")))
    for written, row in zip(rows, read, strict=True):
        messages = conversation(row)
        assert messages == written["messages"]
        (example,) = ChatEncoder(tokenizer, "it")(row, messages)
        (expected,) = examples(tokenizer, written["messages"], tools=written["tools"])  # from JSON
        assert tokenizer.decode(example.ids) == tokenizer.decode(expected.ids)
        assert (example.ids.tolist(), example.scored.tolist()) == (expected.ids.tolist(), expected.scored.tolist())
    call = [ONE[0], {"role": "assistant", "content": "", "tool_calls": [{"arguments": {"unit": None}}]}]
    assert conversation(Row("", {"messages": call})) == call


def stripping(style: str, **strips: bool) -> PreTrainedTokenizerFast:
    """A tokenizer with Phi-3's tokens and template: a special token takes the white space beside it."""
    tokenizer = styles.STYLES[style]()
    roles = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken(r, special=True, **strips) for r in roles]})
    tokenizer.chat_template = styles.PHI
    return tokenizer


def conversations(number: int) -> list[list[dict[str, Any]]]:
    """Conversations whose contents begin and end in any way."""
    bits = ["yes", "the café", " ", "\n", "\n\n", "\t", "e\u0301", "日本", "return", " left", "!?", "<|im_end|>"]
    draw = random.Random(number)
    return [
        [
            {"role": role, "content": "".join(draw.choices(bits, k=draw.randint(0, 5)))}
            for _ in range(draw.randint(1, 4))
            for role in ("user", "assistant")
        ]
        for _ in range(number)
    ]


@pytest.mark.parametrize(
    "tokenizer",
    [
        styles.qwen(styles.CHATML),
        styles.qwen(styles.FORGETFUL),
        styles.llama3(styles.LLAMA3),
        styles.llama2(styles.MISTRAL),
        styles.llama2(styles.PLAIN),
        styles.gemma(styles.GEMMA),
        stripping("llama3"),
        stripping("llama2", rstrip=True),
        stripping("gpt2", rstrip=True),
        stripping("qwen", lstrip=True),
    ],
    ids=["chatml", "forgetful", "llama3", "mistral", "plain", "gemma", "phi", "right", "right-gpt2", "left"],
)
def test_characters_tell_the_tokens_that_beginnings_tell(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for messages in conversations(60):
        with monkeypatch.context() as patch:
            found = examples(tokenizer, messages)
            patch.setattr(type(tokenizer), "is_fast", property(lambda _: False))
            expected = examples(tokenizer, messages)
        for one, other in zip(found, expected, strict=True):
            assert (one.ids.tolist(), one.scored.tolist()) == (other.ids.tolist(), other.scored.tolist())


@pytest.mark.parametrize("turns", [1, 20])
def test_a_conversation_is_tokenised_once(turns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = styles.llama3(styles.LLAMA3)
    text = tokenizer.apply_chat_template(ONE * turns, tokenize=False)
    given: list[Any] = []
    call = PreTrainedTokenizerFast.__call__

    def counted(self: Any, what: Any, **more: Any) -> Any:
        given.append(what)
        return call(self, what, **more)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counted)
    (example,) = examples(tokenizer, ONE * turns)
    assert given == [text]
    assert learnt(tokenizer, example) == ["yes, the café<|eot|>"] * turns


@pytest.mark.parametrize(
    ("date", "expected"),
    [
        (
            "{% if not date_string is defined %}{% if strftime_now is defined %}"
            "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '1 Jan 2000' %}{% endif %}"
            "{% endif %}Today Date: {{ date_string }}\n",
            "Today Date: 26 Jul 2024\n",
        ),
        ("{% set form = '%-d %B %y, %A (%-m)' %}{{ strftime_now(format=form) }} ", "26 July 24, Friday (7) "),
        ("{% macro day() %}{{ strftime_now('%Y-%m-%d %H:%M:%S') }}{% endmacro %}{{ day() }}", "2024-07-26 00:00:00"),
        ("\n  {% if strftime_now %}  {% endif %}\n\n{{ strftime_now('%F') }}", "\n  \n2024-07-26"),
    ],
    ids=["llama-3.2", "keyword", "macro", "white space"],
)
@pytest.mark.parametrize("template", [styles.CHATML, styles.MARKED], ids=["chatml", "marked"])
def test_a_template_that_asks_for_the_day_is_told_the_same_on_any(template: str, date: str, expected: str) -> None:
    tokenizer = styles.qwen(date + template)
    (example,) = examples(tokenizer, ONE)
    assert tokenizer.decode(example.ids).startswith(f"{expected}<|im_start|>user")
    assert learnt(tokenizer, example) == ["yes, the café<|im_end|>"]


def test_what_does_not_fit_is_cut_or_left_out() -> None:
    tokenizer = styles.qwen(styles.CHATML)
    (example,) = examples(tokenizer, ONE)
    length, begin = len(example.ids), int(example.scored.argmax())
    kept = fit(example, length, "drop")
    assert kept is not None
    assert kept.ids.tolist() == example.ids.tolist()
    assert fit(example, length - 1, "drop") is None
    cut = fit(example, begin + 1, "truncate")
    assert cut is not None
    assert (cut.ids.tolist(), int(cut.scored.sum())) == (example.ids[: begin + 1].tolist(), 1)
    assert fit(example, begin, "truncate") is None  # nothing is left to learn


def test_an_example_of_which_only_the_first_token_counts_is_left_out() -> None:
    """Nothing stands before it that it could be predicted from."""
    ids, scored = np.arange(3, dtype=np.int32), np.array([True, False, False])
    assert fit(Example(ids, scored), 3, "truncate") is None
    assert fit(Example(ids, scored[::-1]), 3, "truncate") is not None
