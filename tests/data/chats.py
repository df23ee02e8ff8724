"""Conversations, chat templates of four common forms, plain and with {% generation %} marks, and their tokenizers."""

import json
from pathlib import Path
from typing import Any

from megakd.data.tokenizers import load_tokenizer

DEMO = Path(__file__).parents[2] / "megakd" / "assets" / "demo-teacher"
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>", "<|User|>", "<|Assistant|>"]

CHATML = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '<|im_start|>assistant\\n' }}G[{{ m.content }}{{ '<|im_end|>' }}]G{{ '\\n' }}
{%- else -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
HEADERS = """{{ '<s>' }}{%- for m in messages -%}
{{ '<|head|>' + m.role + '<|/head|>\\n' }}
{%- if m.role == 'assistant' -%}G[{{ m.content | trim }}{{ '<|eot|>' }}]G
{%- else -%}{{ m.content | trim }}{{ '<|eot|>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|head|>assistant<|/head|>\\n' }}{%- endif -%}"""
# no generation prompt after a tool's result, and none of its own: the answer follows it
CALLS = """{{ '<s>' }}{%- for t in tools or [] -%}{{ t.function.name }};{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<|User|>' + m.content }}
{%- elif m.role == 'system' -%}{{ m.content }}
{%- elif m.role == 'tool' -%}{{ '[result]' + m.content + '[/result]' }}
{%- elif m.role == 'assistant' -%}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' -%}{{ '<|Assistant|>' }}{%- endif -%}
G[{{ m.content or '' }}{%- for c in m.tool_calls or [] -%}
{{ '[call]' + c.function.name + c.function.arguments | tojson }}{%- endfor -%}{{ '<|eot|>' }}]G
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role != 'tool' -%}{{ '<|Assistant|>' }}{%- endif -%}"""
# reasoning stays in the last answer alone: what came before it renders otherwise once more follows
REASONING = """{%- set last = namespace(user=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- set said = m.content.split('</think>')[-1].lstrip() if loop.index0 < last.user else m.content -%}
{{ '<|im_start|>assistant\\n' }}G[{{ said }}{{ '<|im_end|>' }}]G{{ '\\n' }}
{%- else -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "calls": CALLS, "reasoning": REASONING}

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}


def said(*texts: str) -> list[dict[str, Any]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


CHATS: dict[str, list[dict[str, Any]]] = {
    "one answer": said("Hi there", "Hello!\n\nHow are you? "),
    "three answers": said("Hi", " Hello!", "3 + 4?\n", "It is 7.\n", "and 4 + 4 =", "\n8"),
    "question at the end": said("Hi", "Hello", "Still there?"),
    "system": [{"role": "system", "content": "Be brief."}, *said("Grüße 東京 🙂", "こんにちは")],
    "reasoning": said("Hi", "<think>\na greeting\n</think>\n\nHello", "More", "<think>\nmore\n</think>\n\nHello again"),
}
WITH_TOOLS = [
    *said("Weather in Bern?"),
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
    {"role": "tool", "content": "12 degrees"},
    {"role": "tool", "content": "no wind"},
    *said("", "It is 12 degrees.", "Thanks", "Welcome.")[1:],
]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


MANY_TOOLS = [
    TOOL,
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}},
]
MANY_CALLS = [
    {"role": "user", "content": "Weather in Bern and Rome, and the sum?"},
    {"role": "assistant", "content": "", "tool_calls": [call("weather", city="Bern"), call("weather", city="Rome")]},
    {"role": "tool", "content": "12"},
    {"role": "tool", "content": "21"},
    {"role": "assistant", "content": "Now the sum.", "tool_calls": [call("add", a=12, b=21)]},
    {"role": "tool", "content": "33"},
    {"role": "assistant", "content": "33 in all."},
    {"role": "user", "content": "And half?"},
    {"role": "assistant", "content": "16.5"},
]
ONE_CALL = [  # as templates want it that take one call at a time, without text beside it, with an id of nine characters
    *said("Weather in Bern?"),
    {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "abcdefghi"}]},
    {"role": "tool", "content": "12 degrees", "tool_call_id": "abcdefghi"},
    *said("", "It is 12 degrees.")[1:],
]
SPOKEN_OF_MANY_CALLS = [
    '[call]weather{"city": "Bern"}[call]weather{"city": "Rome"}<|eot|>',
    'Now the sum.[call]add{"a": 12, "b": 21}<|eot|>',
    "33 in all.<|eot|>",
    "16.5<|eot|>",
]


def tokenizer(template: str, marks: bool = False) -> Any:
    """The demo's tokenizer with a chat template of TEMPLATES."""
    found = load_tokenizer(DEMO)
    found.add_special_tokens({"additional_special_tokens": SPECIAL})
    begin, end = ("{% generation %}", "{% endgeneration %}") if marks else ("", "")
    found.chat_template = TEMPLATES[template].replace("G[", begin).replace("]G", end)
    return found


def document(messages: list[dict[str, Any]], tools: Any = None, counted_from: int = 0) -> str:
    return json.dumps({"messages": messages, "tools": tools, "counted_from": counted_from}, ensure_ascii=False)
