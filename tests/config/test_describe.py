"""`megakd config` and docs/configuration.md name every field; both come from the sections themselves."""

import pytest

from megakd.config.describe import markdown, parts
from megakd.config.run import is_mutable
from megakd.errors import UserError
from tests.config.test_every_field import all_fields
from tests.conftest import ROOT, in_process


def test_the_page_is_what_the_sections_say():
    assert (ROOT / "docs" / "configuration.md").read_text() == markdown(), (
        "run: megakd config --markdown > docs/configuration.md"
    )


def test_every_field_is_described_once_for_each_kind():
    entries = [entry for part in parts() for entry in part.entries]
    named = {entry.path.replace("stages[].", "stages.0.") for entry in entries}
    assert set(all_fields()) <= named | {"stages.0.lr_multipliers"}
    for entry in entries:
        assert (
            (entry.meaning and entry.values != "object") or "deepspeed" in entry.path or entry.path.startswith("stages")
        )
        assert not entry.meaning.endswith("."), entry
        assert entry.mutable == ("[]" not in entry.path and is_mutable(entry.path)), entry
    paths = [entry.path for entry in entries]
    assert {path for path in paths if paths.count(path) > 1} == {
        f"objective.{key}"
        for key in (
            *("kind", "alpha", "temperature", "divergence", "mix", "routing"),
            *("initial_top_k", "final_top_k", "router_patterns"),
        )
    }


def test_the_verb_prints_all_one_section_or_what_may_change():
    every, one = in_process("config"), in_process("config", "optim")
    assert "  optim.lr = 5e-05  (number > 0)\n" in one and one.strip() in every and "engine.kind" not in one
    assert "peak learning rate" in one
    mutable = in_process("config", "--mutable")
    assert "optim.micro_batch = 1  (integer ≥ 1, mutable)" in mutable and "optim.lr " not in mutable
    assert "no field of this section may change" in in_process("config", "compress", "--mutable")
    assert in_process("config", "--markdown") == markdown()
    assert in_process("config", "objective").count("objective.alpha") == 3


@pytest.mark.parametrize("words, said", [("optm", "optm: no section"), ("name", "name: no section")])
def test_an_unknown_section_is_named(words, said):
    assert said in in_process("config", words, code=2)
    with pytest.raises(UserError, match="the sections are model, compress, data"):
        parts("optm")


def test_page_and_filter_exclude_each_other():
    assert "--markdown prints the whole page" in in_process("config", "optim", "--markdown", code=2)
