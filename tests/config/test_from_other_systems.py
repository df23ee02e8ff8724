"""docs/from-other-systems.md lists every key that megakd/config/original_keys.py has, with what becomes of it."""

from megakd.config.original_keys import FLAT, STAGE, TABLE, Skip
from tests.conftest import ROOT


def key_table() -> str:
    """The lines of the page, made from the tables of the code."""
    lines = [
        f"{old} → – ({rule.why})" if isinstance(rule, Skip) else f"{old} → {rule.keys}" for old, rule in TABLE.items()
    ]
    lines += [f"stages[].{old} → stages[].{new}" for old, new in STAGE.items()]
    lines += [f"{old} → python {program}" for program, words in FLAT.items() for old in words.split()]
    return "\n".join(lines)


def test_page_lists_every_key_with_its_conversion():
    assert key_table() in (ROOT / "docs" / "from-other-systems.md").read_text()
