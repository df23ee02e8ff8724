"""DeepSpeed's undocumented names: one file has them, for the pinned version, and says which one is missing."""

import ast
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from deepspeed.comm.torch import TorchBackend
from deepspeed.constants import default_pg_timeout

from megakd.errors import UserError
from megakd.system.deepspeed_internals import (
    SUPPORTED,
    let_all_groups_time_out,
    member,
    replaced,
    skipping_update,
)
from tests.conftest import ROOT

DOCUMENTED = {"deepspeed", "deepspeed.utils"}  # initialize, zero.GatheredParameters; safe_get_*, safe_set_*, logger


def test_the_supported_version_is_the_pinned_one():
    assert f"deepspeed=={SUPPORTED}" in (ROOT / "requirements.txt").read_text().splitlines()


def test_undocumented_modules_are_imported_in_one_file():
    for path in (ROOT / "megakd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found = {module for module in modules if module.split(".")[0] == "deepspeed"} - DOCUMENTED
            assert not found or path.stem == "deepspeed_internals", (path, found)


def test_a_missing_attribute_is_named_with_both_versions():
    with pytest.raises(UserError, match=rf"DeepSpeed \S+: SimpleNamespace\._gone is missing.*deepspeed=={SUPPORTED}"):
        member(SimpleNamespace(), "_gone")


def test_a_missing_import_is_a_user_error_with_both_versions():
    code = """
import deepspeed.module_inject.auto_ep_layer as module
del module._AllToAllV
try:
    import megakd.system.deepspeed_internals
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    said = done.stdout.splitlines()[-1]
    assert re.match(rf"UserError DeepSpeed \S+: .*_AllToAllV.* is missing.*deepspeed=={SUPPORTED}$", said), said


@pytest.mark.parametrize("stage, name", [(3, "_overflow_check_and_loss_scale_update"), (2, "check_grad_overflow")])
def test_an_update_is_not_made_where_it_cannot_be_skipped(stage, name):
    """A method that was renamed would be replaced in vain, and the refused update made."""
    engine = SimpleNamespace(optimizer=SimpleNamespace(_update_scale=None), zero_optimization_stage=lambda: stage)
    with pytest.raises(UserError, match=name), skipping_update(engine):
        raise AssertionError("not reached")


def test_replaced_attributes_come_back():
    class Owner:
        def check(self) -> bool:
            return False

    owner = Owner()
    owner.level = 1  # type: ignore[attr-defined]
    with pytest.raises(ValueError), replaced(owner, check=lambda: True, level=2):
        assert owner.check() and owner.level == 2  # type: ignore[attr-defined]
        raise ValueError
    assert not owner.check() and vars(owner) == {"level": 1}


def test_every_group_of_ranks_has_the_timeout_of_the_first(monkeypatch):
    """A rank that hung within an all-to-all of experts was noticed after torch's 30 minutes."""
    asked = {}
    monkeypatch.setattr("torch.distributed.new_group", lambda ranks, **options: asked.update(options))
    monkeypatch.setattr(TorchBackend, "new_group", TorchBackend.new_group)
    let_all_groups_time_out()
    TorchBackend.new_group(SimpleNamespace(), [0, 1])
    assert asked == {"timeout": default_pg_timeout}
