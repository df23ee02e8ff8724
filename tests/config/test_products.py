"""What the products of a run depend on: field by field, by the facts that manifests state, and across kinds."""

import pytest

from megakd.capture.pipeline import Part, logits_facts
from megakd.config.parsing import parse
from megakd.config.products import LOGITS, PRODUCTS, STUDENT, TOKENS, differences
from megakd.config.run import RunConfig, is_mutable
from megakd.data.facts import token_facts
from megakd.identity import TeacherIdentity, TokenizerIdentity
from tests.config.test_every_field import FIELDS

BASE = {"stages": [{"name": "a", "tokens": 2**24}], "optim": {"batch_tokens": 2**15}}


def config(**fields: object) -> RunConfig:
    value: dict = {section: dict(keys) for section, keys in BASE.items() if isinstance(keys, dict)}
    value["stages"] = BASE["stages"]
    for path, given in fields.items():
        section, _, key = path.partition(".")
        if key:
            value.setdefault(section, {})[key] = given
        else:
            value[section] = given
    return parse(value, "test")


def expected(path: str) -> set[str]:
    """The products that a field changes, said once more."""
    section = path.partition(".")[0]
    if path in ("model.teacher", "model.revision"):
        return {TOKENS, LOGITS, STUDENT}
    if section == "data" and path not in ("data.streaming", "data.workers", "data.on_bad_line"):
        return {TOKENS, LOGITS, STUDENT}
    if section == "logits" and path not in ("logits.batch_size", "logits.parallel"):
        return {LOGITS}
    return {STUDENT} if section == "compress" or path == "model.dtype" else set()


OTHERS = (
    "stages.",
    "objective.",
    "engine.offload_teacher",
    "engine.teacher_parallel",
)  # of live teachers, or of how a student is trained
CACHED = [path for path in FIELDS if not path.startswith(OTHERS) or path == "objective.alpha"]


@pytest.mark.parametrize("path", CACHED)
def test_a_changed_field_changes_the_products_that_depend_on_it_and_no_other(path):
    line = FIELDS[path]
    # a field that needs others to have an effect is changed where it has one
    before, after = config(**line.beside), config(**{**line.beside, path: line.value})
    changed = {name for name in PRODUCTS if differences(name, after, before)}
    if path.startswith("model.student"):
        changed -= {STUDENT}  # compress makes none
    assert changed == expected(path)
    for name in changed:
        assert any(
            each.startswith(f"{path} is ") and " instead of " in each for each in differences(name, after, before)
        )
    assert not is_mutable(path) or not changed
    facts_before, facts_after = facts(before), facts(after)
    for name, one, other in zip((TOKENS, LOGITS), facts_before, facts_after, strict=True):
        assert one == other or name in changed, f"{path} changes the facts of {name}"


def facts(given: RunConfig) -> tuple[dict, dict]:
    """What the manifests of tokens and logits would state."""

    class Shards:
        facts = token_facts(given.data, "train", TokenizerIdentity(10, 0, "hash"), [])

    part = Part("train", Shards, None, given.logits)  # type: ignore[arg-type]
    teacher = TeacherIdentity(given.model.teacher, given.model.revision, "weights")
    return Shards.facts, logits_facts(part, teacher, given.seed, "book")


def test_what_has_no_effect_changes_nothing():
    """Draws take the seed; a budget takes the place of a rank; a student that was not calibrated saw no tokens."""
    drawn = {"logits.profile": "hybrid"}
    assert differences(LOGITS, config(**drawn, seed=1), config(**drawn)) == ["seed is 1 instead of 0"]
    budget = {"compress.budget": 0.3}
    assert not differences(STUDENT, config(**budget, **{"compress.rank": 8}), config(**budget))
    weights = {"compress.calibration_tokens": 0}
    assert not differences(STUDENT, config(**weights, **{"data.tokens": 5}), config(**weights))


def test_who_tokenizes_is_the_student_next_to_a_live_teacher_alone():
    for kind, changed in (("cached", []), ("sar", ['model.student is "y/b" instead of "y/a"'])):
        one, two = (config(**{"objective.kind": kind, "model.student": student}) for student in ("y/a", "y/b"))
        assert differences(TOKENS, two, one) == differences(LOGITS, two, one) == changed
    cached, sar = (config(**{"objective.kind": kind, "model.student": "y/a"}) for kind in ("cached", "sar"))
    assert any("model.teacher is without effect instead of" in each for each in differences(TOKENS, sar, cached))
