"""What the products of a run depend on, as data: which of them a run can link from the run it was made from.

`DEPENDS` names the configuration's fields. What a product was really made from (the teacher's fingerprint, the
tokenizer's hash) is in its manifest, and every verb that reads it compares.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from megakd.config.effects import idle_fields
from megakd.config.run import RunConfig, flatten

TOKENS, LOGITS, STUDENT = "data/tokens", "data/logits", "student-0"
PRODUCTS = (STUDENT, TOKENS, LOGITS)


class Rule(NamedTuple):
    """A product depends on `fields` where `when` holds: paths, a whole section, or all that a product depends on."""

    product: str
    fields: tuple[str, ...]
    when: Callable[[RunConfig], bool] = lambda config: True


def _student_tokenizes(config: RunConfig) -> bool:
    """Whether the student's tokenizer makes the tokens; else it is the teacher's (commands/tokenize.py)."""
    return config.objective.live and config.model.student is not None


DEPENDS: tuple[Rule, ...] = (
    Rule(TOKENS, ("data.source", "data.revision", "data.subset", "data.split", "data.text_field", "data.bos")),
    Rule(TOKENS, ("data.format", "data.messages_field", "data.prompt_field", "data.completion_field")),
    Rule(TOKENS, ("data.tools_field", "data.chat_template", "data.sources")),
    Rule(TOKENS, ("data.sequence_length", "data.packing", "data.tokens", "data.shard_tokens")),
    Rule(TOKENS, ("data.holdout_fraction", "data.holdout_tokens")),
    Rule(TOKENS, ("model.teacher", "model.revision"), lambda config: not _student_tokenizes(config)),
    Rule(TOKENS, ("model.student", "model.student_revision"), _student_tokenizes),
    Rule(LOGITS, (TOKENS, "model.teacher", "model.revision")),
    Rule(LOGITS, ("logits.profile", "logits.top_k", "logits.pmin", "logits.levels", "logits.temperatures")),
    Rule(LOGITS, ("logits.dtype", "logits.engine")),
    Rule(LOGITS, ("logits.draws", "logits.draw_temperature", "seed"), lambda config: config.logits.profile != "topk"),
    Rule(STUDENT, ("model.teacher", "model.revision", "model.dtype", "compress")),
    Rule(STUDENT, (TOKENS,), lambda config: config.compress.calibration_tokens > 0),
)


def dependencies(config: RunConfig, product: str) -> dict[str, Any]:
    """The fields that a product of this configuration depends on, with their values; of idle ones the default."""
    values = dict(flatten(config.model_dump(mode="json")))
    values |= {each.path: each.default for each in idle_fields(config)}
    found: dict[str, Any] = {}
    for rule in DEPENDS:
        if rule.product != product or not rule.when(config):
            continue
        for field in rule.fields:
            if field in PRODUCTS:
                found |= dependencies(config, field)
            else:
                found |= {path: value for path, value in values.items() if f"{path}.".startswith(f"{field}.")}
    return found


def differences(product: str, mine: RunConfig, theirs: RunConfig) -> list[str]:
    """Each field that makes a product of two configurations another one, with both values; empty: it is the same."""
    here, there = dependencies(mine, product), dependencies(theirs, product)
    return [
        f"{path} is {_shown(here, path)} instead of {_shown(there, path)}"
        for path in dict.fromkeys([*here, *there])
        if here.get(path) != there.get(path)
    ]


def _shown(values: dict[str, Any], path: str) -> str:
    return json.dumps(values[path]) if path in values else "without effect"
