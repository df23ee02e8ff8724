"""Conversations → token ids through a tokenizer's chat template, and which of them the assistant speaks.

Where the template has {% generation %} marks, transformers says what the assistant speaks
(`apply_chat_template(return_assistant_tokens_mask=True)`). Of other templates it is found by prefixes: for each message
of the assistant, the conversation before it with a generation prompt, and the conversation up to it, are rendered.
  begin  behind the generation prompt: the first tokens of the conversation are those of the prompt, token by token
  end    behind the token that closes the message. Line breaks after it are the template's. Where later messages make
         the template drop the beginning of an earlier one (Qwen3: its reasoning), the rest of it stands there unchanged
Where a template's text does not follow these rules, the conversation is refused.
"""

import json
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megakd.errors import UserError, foreign, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for them


class Encoded(NamedTuple):
    """A conversation in tokens; spoken: which of them the assistant speaks. No tokens: it cannot be trained on.

    text_bytes: of what the assistant speaks, without special tokens. shortened: its last messages did not fit.
    silent: nothing in it is spoken by the assistant. refused: why the template cannot be used for it. (None of them,
    and no tokens: its first answer does not fit.)
    """

    ids: list[int]
    spoken: list[bool]
    text_bytes: int = 0
    shortened: bool = False
    silent: bool = False
    refused: str = ""


def template_of(tokenizer: "PreTrainedTokenizerBase", tools: Any = None) -> str:
    """The chat template that a conversation is rendered with; UserError where the tokenizer has none."""
    try:
        return tokenizer.get_chat_template(None, tools)
    except ValueError as error:
        raise UserError(
            f"data.format: the tokenizer of {tokenizer.name_or_path} has no chat template ({reason(error)}); "
            "take an instruct model's tokenizer, set data.chat_template, or set data.format=text"
        ) from error


def set_template(tokenizer: "PreTrainedTokenizerBase", file: str | None) -> None:
    """Give a tokenizer the chat template of a file, where there is one, in the place of its own."""
    if file is None:
        return
    path = Path(file).expanduser()
    with foreign(f"data.chat_template: {path}"):
        tokenizer.chat_template = path.read_text(encoding="utf-8")


def encode_conversation(tokenizer: "PreTrainedTokenizerBase", document: str, limit: int) -> Encoded:
    """A conversation of at most `limit` tokens; a longer one ends after the last message of the assistant that fits."""
    try:
        return _encoded(tokenizer, document, limit)
    except UserError as error:
        return Encoded([], [], refused=str(error))


def _encoded(tokenizer: "PreTrainedTokenizerBase", document: str, limit: int) -> Encoded:
    found = json.loads(document)
    chat = _Chat(tokenizer, found["messages"], found["tools"], found["counted_from"])
    answers = chat.answers
    if not answers:
        return Encoded([], [], silent=True)
    chat.check_rendered()
    ids, shortened = chat.ids(), False
    while len(ids) > limit and answers:
        shortened = True
        chat = chat.up_to(answers.pop() + 1)
        ids = chat.ids()
    if len(ids) > limit or not chat.answers:
        return Encoded([], [])
    spoken = chat.spoken(ids)
    # a label is what comes after a token: the first one is none
    if not any(spoken[1:]):
        return Encoded([], [], silent=True)
    text = tokenizer.decode([i for i, said in zip(ids, spoken, strict=True) if said], skip_special_tokens=True)
    return Encoded(ids, spoken, len(str(text).encode()), shortened)


class _Chat:
    """Messages and what a template makes of them."""

    def __init__(self, tokenizer: Any, messages: list[dict[str, Any]], tools: Any, counted_from: int):
        self.tokenizer, self.messages, self.tools, self.counted_from = tokenizer, messages, tools, counted_from
        self.answers = [
            index for index, message in enumerate(messages) if message["role"] == "assistant" and index >= counted_from
        ]

    def up_to(self, end: int) -> "_Chat":
        return _Chat(self.tokenizer, self.messages[:end], self.tools, self.counted_from)

    def text(self, end: int | None = None, prompt: bool = False) -> str:
        """What the template makes of the first `end` messages; prompt: with a generation prompt."""
        try:
            return self.tokenizer.apply_chat_template(
                self.messages[:end], tools=self.tools, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template is a program: it fails in any way, raise_exception in its own
            raise UserError(f"{self}: the chat template fails: {reason(error)}") from error

    @cached_property
    def whole(self) -> str:
        return self.text()

    def ids(self) -> list[int]:
        return self._tokens(self.whole)

    def check_rendered(self) -> None:
        """UserError where the template has no place for a message's text, a tool or a call: it would skip them unsaid.

        Line breaks and spaces may differ, and what comes before `</think>`, which templates drop from earlier answers.
        """
        calls, text = [call for message in self.messages for call in message.get("tool_calls") or []], self.whole
        bare = _bare(text)
        for index, message in enumerate(self.messages):
            content = message.get("content")
            said = content.rpartition("</think>")[2] if isinstance(content, str) else ""
            if _bare(said) not in bare and _bare(json.dumps(said)[1:-1]) not in bare:
                raise UserError(
                    f"{self}: the chat template has no place for the text of message {index}, of the role "
                    f"{message['role']}; give it one that has"
                )
        for kind, each in [("tool", tool) for tool in self.tools or []] + [("call of", call) for call in calls]:
            name = each.get("function", each).get("name")
            if name is not None and name not in text:
                raise UserError(f"{self}: the chat template has no place for the {kind} {name}; give it one that has")

    def spoken(self, ids: list[int]) -> list[bool]:
        """Whether the assistant speaks each token; messages before `counted_from` are context."""
        marked = MARKS.search(template_of(self.tokenizer, self.tools))
        spoken = self._marked(ids) if marked else self._by_prefix(ids)
        if marked and self.counted_from:
            context = self._tokens(self.text(self.counted_from, prompt=True))
            self._check_begins(ids, context, self.counted_from)
            spoken[: len(context)] = [False] * len(context)
        return spoken

    def _marked(self, ids: list[int]) -> list[bool]:
        try:
            found = self.tokenizer.apply_chat_template(
                self.messages, tools=self.tools, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception as error:
            raise UserError(f"{self}: transformers gives no assistant mask: {reason(error)}") from error
        assert found["input_ids"] == ids, self
        return [bool(said) for said in found["assistant_masks"]]

    def _by_prefix(self, ids: list[int]) -> list[bool]:
        spoken, whole = [False] * len(ids), self.whole
        for index in self.answers:
            before, through = self.text(index, prompt=True), self.text(index + 1)
            if not through.startswith(before):
                raise UserError(
                    f"{self}: message {index}, of the assistant, does not begin with the template's generation prompt: "
                    f"{_difference(before, through)}; give the template {{% generation %}} marks"
                )
            closed = self._closed(through)
            first = self._tokens(before)
            self._check_begins(ids, first, index)
            if whole.startswith(closed):
                last = self._tokens(closed)
                self._check_begins(ids, last, index)
            else:
                last = ids[: self._end_of_rest(ids, len(first), closed[len(before) :], index)]
            spoken[len(first) : len(last)] = [True] * (len(last) - len(first))
        return spoken

    def _end_of_rest(self, ids: list[int], begin: int, said: str, index: int) -> int:
        """Where the assistant's message ends whose beginning the template dropped: `said` is all of it.

        Its own closing token ends it, and what is before it is the end of `said`, character by character.
        """
        closing = self._tokens(said)[-1]
        end = ids.index(closing, begin) + 1 if closing in ids[begin:] else begin
        rest = self.tokenizer.decode(ids[begin:end], clean_up_tokenization_spaces=False)
        if closing not in _special(self.tokenizer) or end == begin or not said.endswith(rest):
            raise UserError(
                f"{self}: message {index}, of the assistant, is another one once later messages follow: "
                f"{_difference(said, rest)}; give the template {{% generation %}} marks"
            )
        return end

    def _closed(self, through: str) -> str:
        """The text without the line breaks that follow its last special token."""
        bare = through.rstrip()
        return bare if bare.endswith(tuple(_special(self.tokenizer).values())) else through

    def _check_begins(self, ids: list[int], first: list[int], index: int) -> None:
        """UserError unless a conversation's tokens begin with those of its first messages."""
        if ids[: len(first)] != first:
            raise UserError(
                f"{self}: the tokens before and in message {index} change with what follows them; give the chat "
                "template {% generation %} marks"
            )

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def __str__(self) -> str:
        text = " ".join(str(self.messages[0].get("content")).split())
        return f"the conversation of {len(self.messages)} messages that begins with {text[:60]!r}"


def _bare(text: str) -> str:
    """The text without white space."""
    return "".join(text.split())


def _special(tokenizer: Any) -> dict[int, str]:
    return {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def _difference(one: str, other: str) -> str:
    """Where two texts begin to differ, with a few characters of each."""
    at = next(
        (i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )
    return f"{one[at : at + 30]!r} against {other[at : at + 30]!r}"
