"""What tests of several tools start from."""

from pathlib import Path

import pytest

from megakd.data.shards import ShardSet
from tests.tools.examples import make_shards, tool


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    """A tokenizer's folder."""
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory, tokenizer) -> ShardSet:
    return make_shards(tmp_path_factory.mktemp("shards"), tokenizer)


@pytest.fixture(scope="module")
def hdf5(tmp_path_factory, shards) -> Path:
    """The shards as `convert_hdf5 to` writes them."""
    path = tmp_path_factory.mktemp("hdf5") / "store.h5"
    tool("convert/convert_hdf5").main(["to", str(shards.folder), str(path)])
    return path
