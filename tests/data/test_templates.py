"""What the assistant speaks, token by token: by prefixes of a plain template, and by transformers' own mask.

MEGAKD_CHAT_TOKENIZERS: a folder with the tokenizers of four instruct models, for the test with real ones:
tools/make/chat_tokenizers.py makes it.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megakd.data.templates import encode_conversation, template_of
from megakd.errors import UserError
from tests.data.chats import (
    CHATS,
    MANY_CALLS,
    MANY_TOOLS,
    ONE_CALL,
    SPOKEN_OF_MANY_CALLS,
    TEMPLATES,
    TOOL,
    WITH_TOOLS,
    document,
    said,
    tokenizer,
)


def own_mask(marked: Any, messages: list[dict[str, Any]], tools: Any = None) -> tuple[list[int], list[bool]]:
    """What transformers says of a template with marks."""
    found = marked.apply_chat_template(messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
    return found["input_ids"], [bool(said) for said in found["assistant_masks"]]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("marks", [False, True])
def test_labels_are_those_of_the_templates_own_mask(template, chat, marks):
    expected = own_mask(tokenizer(template, marks=True), CHATS[chat])
    found = encode_conversation(tokenizer(template, marks), document(CHATS[chat]), 10_000)
    assert (found.ids, found.spoken) == expected
    assert any(found.spoken) and not all(found.spoken) and not found.shortened


@pytest.mark.parametrize("marks", [False, True])
def test_calls_are_spoken_and_results_are_not(marks):
    chosen = tokenizer("calls", marks)
    found = encode_conversation(chosen, document(WITH_TOOLS, [TOOL]), 10_000)
    assert (found.ids, found.spoken) == own_mask(tokenizer("calls", marks=True), WITH_TOOLS, [TOOL])
    spoken = chosen.decode([i for i, said in zip(found.ids, found.spoken, strict=True) if said])
    assert spoken == 'I look.[call]weather{"city": "Bern"}<|eot|>It is 12 degrees.<|eot|>Welcome.<|eot|>'


@pytest.mark.parametrize("marks", [False, True])
def test_of_many_tools_and_turns_no_result_is_spoken(marks):
    """Two tools, two calls at once, results one after the other, a call after a result, and a second question."""
    chosen = tokenizer("calls", marks)
    found = encode_conversation(chosen, document(MANY_CALLS, MANY_TOOLS), 10_000)
    assert (found.ids, found.spoken) == own_mask(tokenizer("calls", marks=True), MANY_CALLS, MANY_TOOLS)
    runs, text = [], ""
    for token, said_by_assistant in zip(found.ids, found.spoken, strict=True):
        if said_by_assistant:
            text += chosen.decode([token])
        elif text:
            runs, text = [*runs, text], ""
    assert [*runs, text] == SPOKEN_OF_MANY_CALLS
    for end in range(2, len(MANY_CALLS)):  # cut short, it ends after what the assistant said last
        kept = encode_conversation(chosen, document(MANY_CALLS[:end], MANY_TOOLS), 10_000)
        cut = encode_conversation(chosen, document(MANY_CALLS, MANY_TOOLS), len(kept.ids))
        assert cut.spoken[-1] and cut.ids == found.ids[: len(cut.ids)] and cut.spoken == found.spoken[: len(cut.ids)]


@pytest.mark.parametrize("marks", [False, True])
def test_messages_of_a_prompt_are_context(marks):
    chosen, messages = tokenizer("chatml", marks), CHATS["three answers"]
    found = encode_conversation(chosen, document(messages, counted_from=3), 10_000)
    spoken = chosen.decode([i for i, said in zip(found.ids, found.spoken, strict=True) if said])
    assert spoken == "It is 7.\n<|im_end|>\n8<|im_end|>"


@pytest.mark.parametrize("marks", [False, True])
def test_a_long_conversation_ends_after_an_answer(marks):
    chosen, messages = tokenizer("headers", marks), CHATS["three answers"]
    whole = encode_conversation(chosen, document(messages), 10_000)
    for answers in (1, 2, 3):
        kept = encode_conversation(chosen, document(messages[: 2 * answers]), 10_000)
        found = encode_conversation(chosen, document(messages), len(kept.ids))
        assert (found.ids, found.spoken) == (kept.ids, kept.spoken)
        assert found.shortened == (answers < 3)
        assert found.ids == whole.ids[: len(found.ids)]
    nothing = encode_conversation(chosen, document(messages), len(encode_first(chosen, messages).ids) - 1)
    assert (nothing.ids, nothing.silent) == ([], False)


def encode_first(chosen: Any, messages: list[dict[str, Any]]) -> Any:
    return encode_conversation(chosen, document(messages[:2]), 10_000)


@pytest.mark.parametrize("messages", [said("Hi"), [{"role": "system", "content": "Be brief."}]])
def test_a_conversation_without_an_answer_is_silent(messages):
    found = encode_conversation(tokenizer("chatml"), document(messages), 10_000)
    assert (found.ids, found.silent) == ([], True)


def refusal(chosen: Any, messages: list[dict[str, Any]], tools: Any = None) -> str:
    """Why a conversation is refused; then nothing of it is used."""
    found = encode_conversation(chosen, document(messages, tools), 10_000)
    assert found.refused and not found.ids and not found.silent
    return found.refused


REFUSED = {
    "another prompt": (
        "{%- if add_generation_prompt -%}",
        "{%- if add_generation_prompt -%}Answer:",
        "generation prompt",
    ),
    "words replaced": (
        "{{ m.content }}{{ '<|im_end|>' }}",
        "{{ m.content if loop.last else 'It said something.' }}{{ '<|im_end|>' }}",
        "no place for the text of message 1, of the role assistant",
    ),
    "words added": (
        "{{ m.content }}{{ '<|im_end|>' }}",
        "{{ m.content if loop.last else m.content ~ ', it said' }}{{ '<|im_end|>' }}",
        "is another one once later messages follow",
    ),
    "cut inside a token": ("<|im_start|>assistant\\n", "assistant: th", "change with what follows"),
}


def changed(name: str, old: str, new: str) -> Any:
    """A tokenizer whose template has something else in place of `old`."""
    chosen = tokenizer(name)
    assert old in chosen.chat_template
    chosen.chat_template = chosen.chat_template.replace(old, new)
    return chosen


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_is_no_prefix_is_refused(name):
    old, new, message = REFUSED[name]
    refused = refusal(changed("chatml", old, new), said("Hi", "e end of it", "So?", "Yes"))
    assert message in refused and "begins with 'Hi'" in refused and "\n" not in refused


def test_a_closing_token_inside_an_answer_does_not_end_it_unnoticed():
    messages = said("Hi", "<think>a</think>one<|im_end|>two", "So?", "Yes")
    assert "is another one" in refusal(tokenizer("reasoning"), messages)


def test_a_template_without_tools_is_refused():
    assert "no place for the tool weather" in refusal(tokenizer("chatml"), said("Hi", "Hello"), [TOOL])
    assert "no place for the call of weather" in refusal(tokenizer("chatml"), WITH_TOOLS)


# role: (the piece of the template, what stays of it, the message that is named)
SKIPPED = {
    "system": ("{{ m.content }}", "", 0),
    "tool": ("+ m.content +", "+", 4),  # the first result stands in the answer behind it too
    "assistant": ("{{ m.content or '' }}", "", 2),
}


@pytest.mark.parametrize("role", SKIPPED)
def test_a_template_that_skips_a_messages_text_is_refused(role):
    """Mistral's skips the system prompt where an answer comes last, Llama's the text beside a call."""
    old, new, number = SKIPPED[role]
    refused = refusal(changed("calls", old, new), [{"role": "system", "content": "Be brief."}, *WITH_TOOLS], [TOOL])
    assert f"no place for the text of message {number}, of the role {role}; give it one" in refused


def test_a_template_that_fails_is_named():
    chosen = tokenizer("chatml")
    chosen.chat_template = "{{ raise_exception('roles must alternate') }}"
    refused = refusal(chosen, said("Hi", "Hello"))
    assert "begins with 'Hi': the chat template fails: roles must alternate" in refused


def test_a_tokenizer_without_a_template_is_named():
    chosen = tokenizer("chatml")
    chosen.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        template_of(chosen)


QWEN = "{{- '<|im_start|>' + message.role + '\\n' + content }}"
MARKED: dict[str, list[tuple[str, str]]] = {  # where marks go into the real templates
    "qwen3": [
        (
            "{%- if loop.index0 > ns",
            "{{- '<|im_start|>assistant\\n' }}{%- set inner = loop %}{% generation %}{%- if inner.index0 > ns",
        ),
        ("{%- if loop.last or (not loop.last and r", "{%- if inner.last or (not inner.last and r"),
        ("'<|im_start|>' + message.role + '\\n<think>", "'<think>"),
        (QWEN, "{{- content }}"),
        (
            "{{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\" %}",
            "{{- '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}\n    {%- elif message.role == \"tool\" %}",
        ),
    ],
    "llama3_1": [
        (
            "{{ content }}",
            "{% if message['role'] == 'assistant' %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
            "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
            "{% else %}{{ content }}{% endif %}",
        )
    ],
    "deepseek_v3": [
        (
            "{{'<｜tool▁outputs▁end｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}",
            "{{'<｜tool▁outputs▁end｜>'}}{% generation %}{{message['content'] + '<｜end▁of▁sentence｜>'}}"
            "{% endgeneration %}",
        ),
        (
            "{{'<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}",
            "{{'<｜Assistant｜>'}}{% generation %}{{message['content'] + '<｜end▁of▁sentence｜>'}}{% endgeneration %}",
        ),
    ],
    "gemma3": [
        (
            "{%- if message['content'] is string -%}\n        {{ message['content'] | trim }}",
            "{%- if role == 'model' -%}{% generation %}{{ message['content'] | trim + '<end_of_turn>' }}"
            "{% endgeneration %}{{ '\n' }}"
            "{%- elif message['content'] is string -%}\n        {{ message['content'] | trim }}",
        ),
        ("    {{ '<end_of_turn>\n' }}", "    {%- if role != 'model' -%}{{ '<end_of_turn>\n' }}{%- endif -%}"),
    ],
}


MARKED |= {
    "qwen2_5": [
        (
            "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}",
            "{{- '<|im_start|>' + message.role + '\\n' }}{%- if message.role == 'assistant' %}{% generation %}"
            "{{- message.content + '<|im_end|>' }}{% endgeneration %}{%- else %}{{- message.content + '<|im_end|>' }}"
            "{%- endif %}{{- '\\n' }}",
        ),
        (
            "{{- '<|im_start|>' + message.role }}\n        {%- if message.content %}\n            "
            "{{- '\\n' + message.content }}",
            "{{- '<|im_start|>' + message.role + '\\n' }}{% generation %}\n        {%- if message.content %}\n"
            "            {{- message.content }}",
        ),
        (
            '{{- \'\\n<tool_call>\\n{"name": "\' }}',
            "{{- ('' if loop.first and not message.content else '\\n') + '<tool_call>\\n{\"name\": \"' }}",
        ),
        (
            "{{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\" %}",
            "{{- '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}\n    {%- elif message.role == \"tool\" %}",
        ),
    ],
    "llama3_2": [
        (
            "+ '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}",
            "+ '<|end_header_id|>\\n\\n' }}{%- if message['role'] == 'assistant' %}{% generation %}"
            "{{- message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}{%- else %}"
            "{{- message['content'] | trim + '<|eot_id|>' }}{%- endif %}",
        ),
        ('{{- \'{"name": "\' + tool_call.name', '{% generation %}{{- \'{"name": "\' + tool_call.name'),
        (
            '{{- "<|eot_id|>" }}\n    {%- elif message.role == "tool"',
            '{{- "<|eot_id|>" }}{% endgeneration %}\n    {%- elif message.role == "tool"',
        ),
    ],
    "mistral_nemo": [
        ('{{- "[TOOL_CALLS][" }}', '{% generation %}{{- "[TOOL_CALLS][" }}'),
        (
            '{%- endfor %}\n    {%- elif message["role"] == "assistant" %}\n'
            '        {{- message["content"] + eos_token}}',
            '{%- endfor %}{% endgeneration %}\n    {%- elif message["role"] == "assistant" %}\n'
            '{% generation %}{{- message["content"] + eos_token}}{% endgeneration %}',
        ),
    ],
}
MANY: list[tuple[Any, Any]] = [(WITH_TOOLS, [TOOL]), (MANY_CALLS, MANY_TOOLS)]
WITH_CALLS = {"qwen3": MANY, "qwen2_5": MANY, "llama3_2": [(ONE_CALL, [TOOL])], "mistral_nemo": [(ONE_CALL, [TOOL])]}
NOT_THESE = {  # what real templates refuse
    ("qwen2_5", "three answers"): "change with what follows them",  # an answer begins with a line break
    ("mistral_nemo", "system"): "no place for the text of message 0, of the role system",  # unless a question is last
    ("llama3_1", "other calls"): "no place for the tool weather",
    ("llama3_2", "other calls"): "no place for the text of message 1, of the role assistant",
    ("mistral_nemo", "other calls"): "Tool call IDs",
    ("deepseek_v3", "other calls"): "no place for the tool weather",
    ("gemma3", "other calls"): "roles must alternate",
}


@pytest.mark.skipif("MEGAKD_CHAT_TOKENIZERS" not in os.environ, reason="MEGAKD_CHAT_TOKENIZERS names no folder")
@pytest.mark.parametrize("name", MARKED)
def test_real_templates(name):
    folder = Path(os.environ["MEGAKD_CHAT_TOKENIZERS"]) / name / "package" / "models"
    plain, marked = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for old, new in MARKED[name]:
        assert old in marked.chat_template, old
        marked.chat_template = marked.chat_template.replace(old, new)
    chats = [(chat, messages, None) for chat, messages in CHATS.items()]
    for chat, messages, tools in [*chats, *(("calls", *each) for each in WITH_CALLS.get(name, []))]:
        if reason := NOT_THESE.get((name, chat)):
            assert reason in refusal(plain, messages, tools)
            continue
        found = encode_conversation(plain, document(messages, tools), 10_000)
        assert (found.ids, found.spoken) == own_mask(marked, messages, tools), messages
    if reason := NOT_THESE.get((name, "other calls")):
        assert reason in refusal(plain, WITH_TOOLS, [TOOL])
