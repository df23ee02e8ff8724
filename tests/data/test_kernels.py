"""The codec's compiled functions work wherever they are installed: a cache on disk is a help and no condition."""

import errno

import pytest
from numba.core.caching import FunctionCache, IndexDataCacheFile

from megakd.data.kernels import compiled


def twice(number):
    return 2 * number


def test_no_writable_cache_ends_no_verb(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FunctionCache._impl_class, "_locator_classes", [])  # as numba finds it on a read-only image
    assert compiled()(twice)(21) == 42


@pytest.mark.parametrize(
    "load, save", [(EOFError("Ran out of input"), None), (None, OSError(errno.ENOSPC, "No space left on device"))]
)
def test_damaged_cache_or_full_disk_ends_no_verb(monkeypatch: pytest.MonkeyPatch, load, save):
    def fail(error):
        def method(*_):
            if error:
                raise error

        return method

    monkeypatch.setattr(IndexDataCacheFile, "load", fail(load))
    monkeypatch.setattr(IndexDataCacheFile, "save", fail(save))
    assert compiled()(twice)(21) == 42
