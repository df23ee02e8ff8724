"""A folder of shards with a file changed, gone or another one: what is read was written, else the error names it."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from megakd.data import codec
from megakd.data.codebook import save_book
from megakd.data.codec import Layout
from megakd.data.records import Sample
from megakd.data.shard_writer import shard_name, summary_of, write_manifest, write_shard
from megakd.data.shards import ShardSet
from megakd.errors import UserError
from tests.data.damage import FOLDERS, MUTATIONS, SEED, chance
from tests.data.test_codec import Case, example, same


def folder_facts(layout: Layout) -> dict[str, Any]:
    return {
        "tokens": {"sequence_length": layout.sequence_length},
        "vocab_size": len(layout.book.places),
        "codec": codec.NAME,
        "book": layout.book.digest,
        "top_k": layout.top_k,
        "draws": layout.draws,
        "levels": layout.levels,
        "temperatures": list(layout.temperatures),
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of three samples each."""
    folder = tmp_path_factory.mktemp("logits") / "train"
    case = Case("hybrid", 5, 33, top_k=4, draws=6, temperatures=(1.0, 2.0), starts=(2,))
    layout = example(case)[1]
    facts, shards = folder_facts(layout), []
    for number in range(2):
        samples = []
        for index in range(3 * number, 3 * number + 3):
            sample, own = example(case._replace(seed=index, positions=4 + index))
            assert own._replace(book=layout.book) == layout
            samples.append(sample._replace(key=f"{index:09d}"))
        shards.append(summary_of(shard_name(number), write_shard(folder, shard_name(number), samples, facts, layout)))
    save_book(folder, layout.book)
    write_manifest(folder, facts, shards, complete=True)
    return folder


FILES = ["manifest.json", "shard-00000.tar", "shard-00000.json", "shard-00001.tar", "shard-00001.json", "book-"]


def file_of(folder: Path, name: str) -> Path:
    (path,) = folder.glob(f"{name}*")
    return path


def damage(chooser: random.Random, path: Path, originals: dict[str, bytes]) -> tuple[str, list[str]]:
    """Change a file in one of many ways; what was done, and the files it was done to."""
    kind, data = chooser.randrange(10), originals[path.name]
    if kind == 0:
        path.unlink()
        return "deleted", [path.name]
    if kind == 1:
        other = chooser.choice([name for name in sorted(originals) if name != path.name])
        path.write_bytes(originals[other])
        if chooser.random() < 0.7:
            path.with_name(other).write_bytes(data)
            return f"exchanged with {other}", [path.name, other]
        return f"overwritten by {other}", [path.name]
    if kind == 2:
        path.write_bytes(data[: chooser.choice((0, 1, chooser.randrange(len(data)), len(data) - 1))])
        return "cut", [path.name]
    mutation = chooser.choice(MUTATIONS)
    path.write_bytes(mutation(chooser, bytearray(data)))
    return mutation.__name__, [path.name]


def assert_named_or_same(folder: Path, expected: list[Sample], touched: list[str], what: str, **how: Any) -> None:
    try:
        shards = ShardSet(folder, **how)
    except UserError as error:
        assert any(name in str(error) for name in touched) and "\n" not in str(error), f"{what}: {error}"
        return
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert len(shards) == len(expected), what
    for index, sample in enumerate(expected):
        try:
            found = shards[index]
        except UserError as error:
            shard = shard_name(index // 3)
            assert f"{shard}.tar" in str(error) and sample.key in str(error), f"{what}: {error}"
            assert any(name.startswith(shard) for name in touched) and "\n" not in str(error), f"{what}: {error}"
        except Exception as error:
            raise AssertionError(f"{what}, sample {index}: {type(error).__name__}: {error}") from error
        else:
            assert found.key == sample.key and same(found, sample), f"{what}: sample {index} reads differently"
    shards.close()


@pytest.mark.parametrize("name", [*FILES[:-1], pytest.param(FILES[-1])])
def test_damaged_folder(written, tmp_path, name):
    """Any file of it changed, gone or another one: what is read is what was written, else the error names a file."""
    folder = Path(shutil.copytree(written, tmp_path / "logits" / "train"))
    originals = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    assert len(originals) == len(FILES)
    shards = ShardSet(folder)
    expected = list(map(shards.__getitem__, range(6)))
    shards.close()
    for number in range(-(-FOLDERS // len(FILES))):
        path = file_of(folder, name)
        done, touched = damage(chance("folder", name, number), path, originals)
        what = f"seed {SEED}, folder {path.name} {number} ({done})"
        assert_named_or_same(folder, expected, touched, what)
        if path.suffix == ".tar" and path.exists():
            assert_named_or_same(folder, expected, touched, f"{what}, tolerant", tolerant=True)
        for other in touched:
            path.with_name(other).write_bytes(originals[other])
    assert_named_or_same(folder, expected, [], f"seed {SEED}, folder as it was")
    assert sorted(path.name for path in folder.iterdir()) == sorted(originals)


def test_a_shard_that_goes_after_opening(written, tmp_path):
    folder = Path(shutil.copytree(written, tmp_path / "logits" / "train"))
    shards = ShardSet(folder)
    (folder / "shard-00001.tar").unlink()
    assert shards[2].key == "000000002"
    with pytest.raises(UserError, match=r"shard-00001\.tar"):
        print(shards[3])
