"""Instruction data → examples: the ids of a conversation, and which of them the model is to learn.

Decides
- The text is what the tokenizer's own chat template makes of the messages. Learnt are the assistant's answers and the
  token that ends the turn, nothing else.
- Which tokens those are: what the template marks with `{% generation %}`, where it does. Else the conversation is
  rendered up to each answer (with the header that asks for one) and up to its end, and the answer is the difference:
  the tokens with a character of it. Only the whole is tokenised, else a long conversation would cost the square of its
  turns; a slow tokenizer, which does not say where in the text a token lies, is given each beginning too.
- Where a template renders a beginning differently from the whole (Qwen3 drops the thinking of earlier turns), a
  conversation becomes one example for each answer, each as the model would see it when asked. That repeats the
  earlier turns. A template with which not even that works is refused.
- The token that ends a turn is the special token after the answer, even where a template leaves it unmarked; white
  space after it is not learnt. Where a template ends a turn with none, the end-of-text token is put at the end of the
  example: a model that never learns to stop is of no use.
- A template that asks for today's date (Llama 3.2, gpt-oss, Mistral Small) is told 26 July 2024, what Llama 3.1's says
  when it is told none: the same data give the same ids on any day.
- Tools are a list of objects, or that as JSON, as Parquet files mostly hold them. In rows from columns, keys without
  a value are left out of messages and tools at any depth: Arrow gives an object all keys that any row's has.
- What follows the last answer is left off. An assistant's message that nothing precedes is not learnt.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lesa_ray.errors import UserError
from lesa_ray.faults import explain
from lesa_ray.training.documents import Row, clean
from lesa_ray.training.packing import Ids

COLUMNS = ("messages", "prompt", "response", "instruction", "input", "output", "tools")
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PAIRS = (("prompt", "response"), ("instruction", "output"))
_TODAY = datetime(2024, 7, 26)
# in the template itself: transformers turns a function that is passed beside the messages into a text
_FIXED_TODAY = (
    "{% macro strftime_now(format) %}{{ format | replace('%-m', '7') | replace('%-', '%')"
    + "".join(f" | replace('%{sign}', '{_TODAY.strftime(f'%{sign}')}')" for sign in "aAbBcdFHIjmMpSTxXyY")
    + " }}{% endmacro %}\n"  # a template's line break after a tag is dropped
)

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """The ids of a conversation (n,), and whether each is learnt (n,)."""

    ids: Ids
    scored: NDArray[np.bool_]


class _Disagree(Exception):
    """The template renders a beginning of the conversation differently from the whole."""


def fit(example: Example, seq_len: int, too_long: Literal["truncate", "drop"]) -> Example | None:
    """The example if it fits in a row, cut after `seq_len` tokens if that is asked for; None if it is to be left out,
    or nothing is to be learnt from it. Its first token is never learnt: a row's tokens are predicted from those before
    them."""
    if len(example.ids) > seq_len and too_long == "drop":
        return None
    cut = Example(example.ids[:seq_len], example.scored[:seq_len])
    return cut if cut.scored[1:].any() else None


def conversation(row: Row) -> Messages | None:
    """The messages of a row, up to the last answer; None if it has none.

    Raises: UserError if the row holds no conversation that is understood."""
    values = row.values
    messages = values.get("messages")
    if messages is None:
        for question, answer in _PAIRS:
            if question in values and answer in values:
                messages = _pair(row, values[question], values[answer], values.get("input"))
                break
        else:
            if "messages" in values:
                return None
            names = ", ".join(map(str, values)) or "none"
            raise UserError(
                f"DATA {row.where}: has no conversation: expected a column messages, or prompt and response, or "
                f"instruction and output; its columns: {names}"
            )
    if messages is None:
        return None
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    ):
        raise UserError(f"DATA {row.where}: messages must be a list of objects with a role and a content")
    answers = _answers(messages)
    if not answers:
        return None
    kept = [
        {k: _present(v) if row.columnar else v for k, v in message.items() if v is not None or k == "content"}
        for message in messages[: answers[-1] + 1]
    ]
    return [_cleaned(message) for message in kept]


def _tools(row: Row) -> list[dict[str, Any]] | None:
    """What the assistant of a row may call; None if nothing. Raises: UserError if it is not understood."""
    given = row.values.get("tools")
    try:
        tools = _parsed(_present(given) if row.columnar else given)
        tools = [_parsed(tool) for tool in tools] if isinstance(tools, list) else tools
    except (ValueError, RecursionError):
        tools = given
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"DATA {row.where}: tools must be a list of objects, or such a list as JSON text")
    return [_cleaned(tool) for tool in tools]


def _parsed(value: Any) -> Any:
    return json.loads(value) if value and isinstance(value, str) else value


def _present(value: Any) -> Any:
    """Without the keys that have no value, at any depth."""
    if isinstance(value, list):
        return [_present(item) for item in value]
    return {k: _present(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def _pair(row: Row, question: Any, answer: Any, more: Any) -> Messages | None:
    if question is None or answer is None:
        return None
    if not isinstance(question, str) or not isinstance(answer, str) or not isinstance(more, str | None):
        raise UserError(f"DATA {row.where}: question and answer must be text; give lists of messages as `messages`")
    asked = f"{question}\n\n{more}" if more else question
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    return {_cleaned(k): _cleaned(v) for k, v in value.items()} if isinstance(value, dict) else value


def _answers(messages: Messages) -> list[int]:
    return [index for index, message in enumerate(messages) if index and message["role"] == "assistant"]


class ChatEncoder:
    """A tokenizer with a chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        """Raises: UserError if there is no chat template, or no end-of-text token."""
        if tokenizer.chat_template is None:
            raise UserError(f"tokenizer {name}: has no chat template (chat_template.jinja), which conversations need")
        if tokenizer.eos_token_id is None:
            raise UserError(f"tokenizer {name}: has no end-of-text token (eos_token)")
        self._tokenizer, self._name = tokenizer, name
        self.eos = int(tokenizer.eos_token_id)
        self.pad = self.eos if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        added = tokenizer.added_tokens_decoder.items()
        self._special = {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}

    def __call__(self, row: Row, messages: Messages) -> list[Example]:
        """The examples of a conversation (one, or one for each answer). Raises: UserError naming the row."""
        try:
            tools = _tools(row)
            if self._tokenizer.is_fast and _MARKED.search(self._template(tools)):
                return [self._marked(messages, tools)]
            answers = _answers(messages)
            try:
                return [self._by_prefixes(messages, answers, tools)]
            except _Disagree:
                if len(answers) == 1:
                    raise
            return [self._by_prefixes(messages[: answer + 1], [answer], tools) for answer in answers]
        except _Disagree:
            raise UserError(
                f"tokenizer {self._name}: its chat template renders the beginning of a conversation differently from "
                f"the whole (DATA {row.where}); mark the answers in it with {{% generation %}}"
            ) from None
        except UserError:
            raise
        except Exception as error:  # a template may fail in any way, and says in words of its own what it wants
            raise UserError(f"DATA {row.where}: the chat template does not take it ({explain(error)[:200]})") from error

    def stop(self) -> int:
        """The id that ends an answer: where generation is to stop."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            (example,) = self(Row("a trial", {"messages": messages}), messages)
        except UserError:  # a template of other needs
            return self.eos
        learnt = np.flatnonzero(example.scored)
        return int(example.ids[learnt[-1]]) if len(learnt) else self.eos  # a template may leave the answer out

    def _marked(self, messages: Messages, tools: Any) -> Example:
        out = self._tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=self._template(tools),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        ids = [int(token) for token in out["input_ids"]]
        scored = [bool(flag) for flag in out["assistant_masks"]]
        spans = out["offset_mapping"]
        for index in range(1, len(ids)):  # transformers marks but the first token of a mark's last character
            scored[index] |= scored[index - 1] and spans[index][0] < spans[index - 1][1]
        for index in range(1, len(ids)):  # the end of a turn, where it stands outside of the mark
            if scored[index - 1] and not scored[index] and ids[index] in self._special:
                scored[index] = ids[index - 1] not in self._special
        return self._ended(ids, scored)

    def _by_prefixes(self, messages: Messages, answers: Sequence[int], tools: Any) -> Example:
        """answers: which messages are to be learnt."""
        text = self._render(messages, tools)
        bounds = []
        for answer in answers:
            begins = self._render(messages[:answer], tools, add_generation_prompt=True)
            ends = self._render(messages[: answer + 1], tools)
            if not ends.startswith(begins) or not text.startswith(ends):
                raise _Disagree
            bounds += [len(begins), len(ends)]
        ids, before = self._tokenise(text, bounds)
        scored = [False] * len(ids)
        for begin, end in zip(before[::2], before[1::2], strict=True):
            last = max((index for index in range(begin, end) if ids[index] in self._special), default=None)
            if last is not None and not self._tokenizer.decode(ids[last + 1 : end]).strip():
                end = last + 1
            scored[begin:end] = [True] * (end - begin)
        return self._ended(ids, scored)

    def _tokenise(self, text: str, bounds: Sequence[int]) -> tuple[list[int], list[int]]:
        """The ids of a text, and how many lie before each bound (a number of characters). A token that a bound cuts,
        which joins the header to the answer, lies behind it."""
        fast = self._tokenizer.is_fast
        out = self._tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=fast)
        ids = [int(token) for token in out["input_ids"]]
        if not fast:
            parts = (self._tokenizer(text[:bound], add_special_tokens=False, verbose=False) for bound in bounds)
            return ids, [_common(ids, part["input_ids"]) for part in parts]
        ends = [
            # a special token may take the white space behind it, the answer's too
            begin + len(text[begin:end].rstrip()) if number in self._special else end
            for number, (begin, end) in zip(ids, out["offset_mapping"], strict=True)
        ]
        ends = list(accumulate(ends, max))
        return ids, [bisect_right(ends, bound) for bound in bounds]

    def _render(self, messages: Messages, tools: Any, *, add_generation_prompt: bool = False) -> str:
        text: str = self._tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=self._template(tools),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return text

    def _template(self, tools: Any) -> str:
        template: str = self._tokenizer.get_chat_template(tools=tools)
        return _FIXED_TODAY + template if "strftime_now" in template else template

    def _ended(self, ids: list[int], scored: list[bool]) -> Example:
        """With the end-of-text token, where the last answer ends with no special token."""
        last = max((index for index, flag in enumerate(scored) if flag), default=None)
        if last is not None and ids[last] not in self._special:
            ids, scored = [*ids, self.eos], [*scored, True]
        return Example(np.array(ids, np.int32), np.array(scored, np.bool_))


def _common(whole: Sequence[int], prefix: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next(
        (i for i, (a, b) in enumerate(zip(whole, prefix, strict=False)) if a != b), min(len(whole), len(prefix))
    )
