import hashlib
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from megakd.cli import run_verb
from megakd.data.records import Sample
from megakd.data.shards import ShardSet
from megakd.errors import UserError
from tests.conftest import files
from tests.tools.examples import LENGTH, SAMPLES, make_shards, refused, token_shards, tool

module = tool("convert/reshard")


@pytest.fixture(scope="module")
def logits(tmp_path_factory, tokenizer) -> ShardSet:
    return make_shards(tmp_path_factory.mktemp("logits"), tokenizer)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, logits) -> ShardSet:
    extra = {"documents": 7, "text_bytes": 1000, "text_tokens": 170, "text_hash": "ab"}
    return token_shards(tmp_path_factory.mktemp("tokens"), logits, **extra)


@pytest.fixture(scope="module", params=["logits", "tokens"])
def shards(request, logits, tokens) -> ShardSet:
    return {"logits": logits, "tokens": tokens}[request.param]


def reshard(*argv: object) -> None:
    module.main([str(arg) for arg in argv])


def opened(folder: Path) -> ShardSet:
    """What `megakd inspect --verify` finds in order."""
    run_verb(["inspect", str(folder), "--verify"])
    return ShardSet(folder)


def same(left: Sample, right: Sample) -> bool:
    """Equal but for the key."""
    if not (np.array_equal(left.tokens, right.tokens) and np.array_equal(left.starts, right.starts)):
        return False
    return all(np.array_equal(a, b) for a, b in zip(left.targets or (), right.targets or (), strict=True))


def assert_are(found: ShardSet, source: ShardSet, order: list[int]) -> None:
    assert len(found) == len(order)
    for number, index in enumerate(order):
        assert found[number].key == f"{number:09d}"
        assert same(found[number], source[index])


def records(folder: Path) -> dict[str, bytes]:
    """Every member of every tar."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                found[member.name] = content.read()
    return found


def test_the_same_shards_come_out_byte_by_byte(shards, tmp_path):
    reshard(shards.folder, tmp_path / "out")
    found = opened(tmp_path / "out")
    mine, theirs = files(tmp_path / "out"), files(shards.folder)
    del mine["manifest.json"], theirs["manifest.json"]
    assert mine == theirs and found.facts == shards.facts


@pytest.mark.parametrize(
    "argv, sizes",
    [
        (["--samples", 2], [2, 2, 2, 2, 1]),
        (["--samples", 100], [9]),
        (["--shard-tokens", 5 * LENGTH + 3], [5, 4]),
        (["--shard-tokens", 1], [1] * 9),
        (["--count", 5, "--samples", 3], [3, 2]),
        (["--count", 1e6], [4, 4, 1]),
    ],
)
def test_sizes_and_first_samples(shards, tmp_path, argv, sizes):
    reshard(shards.folder, tmp_path / "out", *argv)
    found = opened(tmp_path / "out")
    assert found.sizes == sizes
    assert_are(found, shards, list(range(sum(sizes))))
    assert set(records(tmp_path / "out").items()) <= set(records(shards.folder).items())


def test_shuffle_is_a_permutation_by_seed(shards, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        reshard(shards.folder, tmp_path / name, "--shuffle", seed)
    order = np.random.default_rng(1).permutation(SAMPLES).tolist()
    assert order != sorted(order)
    assert_are(opened(tmp_path / "a"), shards, order)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a") != files(tmp_path / "c")
    assert sorted(records(tmp_path / "a").values()) == sorted(records(shards.folder).values())


def test_split_is_by_tokens_on_the_same_side_everywhere(logits, tokens, tmp_path):
    def hashed(sample: Sample) -> float:
        return int(hashlib.sha256(sample.tokens.astype("<i4").tobytes()).hexdigest()[:16], 16) / 2**64

    apart = [i for i in range(SAMPLES) if hashed(logits[i]) < 0.4]
    rest = [i for i in range(SAMPLES) if i not in apart]
    assert apart and rest
    for name, source in (("logits", logits), ("tokens", tokens)):
        reshard(source.folder, tmp_path / name / "rest", "--split", 0.4, "--split-to", tmp_path / name / "apart")
        assert_are(opened(tmp_path / name / "rest"), source, rest)
        assert_are(opened(tmp_path / name / "apart"), source, apart)
    shuffled = [i for i in np.random.default_rng(5).permutation(SAMPLES).tolist()]
    reshard(logits.folder, tmp_path / "r", "--split", 0.4, "--split-to", tmp_path / "a", "--shuffle", 5)
    assert_are(opened(tmp_path / "a"), logits, [i for i in shuffled if i in apart])
    assert_are(opened(tmp_path / "r"), logits, [i for i in shuffled if i in rest])


def test_exchanged_sides_are_refused(logits, tmp_path, capsys):
    """Even when they hold as many samples each."""
    hashes = [hashlib.sha256(logits[i].tokens.astype("<i4").tobytes()).digest()[:8] for i in range(8)]
    below, above = (int.from_bytes(sorted(hashes)[i], "big") for i in (3, 4))
    middle = (below + above) / 2**65
    a, b = tmp_path / "a", tmp_path / "b"
    reshard(logits.folder, a, "--count", 8, "--split", middle, "--split-to", b)
    assert len(ShardSet(a)) == len(ShardSet(b)) == 4
    said = refused(module, capsys, logits.folder, b, "--count", 8, "--split", middle, "--split-to", a)
    assert "b: holds something else already" in said


def test_folders_with_equal_facts_become_one(shards, tmp_path):
    reshard(shards.folder, tmp_path / "first", "--count", 4)
    reshard(tmp_path / "first", shards.folder, tmp_path / "first", tmp_path / "all", "--samples", 6)
    found = opened(tmp_path / "all")
    assert found.sizes == [6, 6, 5]
    assert_are(found, shards, [0, 1, 2, 3, *range(SAMPLES), 0, 1, 2, 3])
    if shards.layout is None:  # evaluate needs the text's tokens per byte
        assert found.manifest["text_tokens"] / found.manifest["text_bytes"] == 0.17


def test_folders_with_other_facts_are_named(tokenizer, logits, tokens, tmp_path, capsys):
    other, mine = make_shards(tmp_path / "other", tokenizer, levels=200), logits.facts["levels"]
    said = refused(module, capsys, logits.folder, other.folder, tmp_path / "out")
    assert said.startswith(f"reshard: {other.folder}: levels is 200, in {logits.folder} it is {mine}; only folders")
    other = make_shards(tmp_path / "seed", tokenizer, seed=50)
    assert "seed: book is " in refused(module, capsys, logits.folder, other.folder, tmp_path / "out")
    said = refused(module, capsys, logits.folder, tokens.folder, tmp_path / "out")
    assert "is None, in" in said and "only folders with equal facts become one" in said
    assert not (tmp_path / "out").exists()


def test_killed_and_started_again_gives_the_same(shards, tmp_path, capsys, monkeypatch):
    argv = ["--samples", 3, "--shuffle", 3]
    reshard(shards.folder, tmp_path / "whole", *argv)
    read, asked = module.Pile.sample, []

    def dies(pile, index):
        asked.append(index)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return read(pile, index)

    monkeypatch.setattr(module.Pile, "sample", dies)
    with pytest.raises(SystemExit, match="130"):
        reshard(shards.folder, tmp_path / "out", *argv)
    assert [p.name for p in sorted((tmp_path / "out").glob("shard*"))] == ["shard-00000.json", "shard-00000.tar"]
    with pytest.raises(UserError, match="not finished"):
        ShardSet(tmp_path / "out")
    assert "holds something else already" in refused(module, capsys, shards.folder, tmp_path / "out", "--samples", 3)
    reshard(shards.folder, tmp_path / "out", *argv)
    assert len(asked) == 6 + 6  # the first shard was not made again
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    reshard(shards.folder, tmp_path / "out", *argv)
    assert "is finished already" in capsys.readouterr().err


@pytest.mark.parametrize("at", [0.1, 0.5, 0.8])
def test_damage_is_not_copied(shards, tmp_path, capsys, at):
    shutil.copytree(shards.folder, tmp_path / "damaged")
    tar = tmp_path / "damaged" / "shard-00001.tar"
    data = bytearray(tar.read_bytes())
    entry = ShardSet(tmp_path / "damaged").entry(6)
    data[entry.offset + int(at * entry.size)] ^= 4
    tar.write_bytes(data)
    said = refused(module, capsys, tmp_path / "damaged", tmp_path / "out")
    assert "shard-00001.tar: sample 000000006: checksum does not match" in said
    with pytest.raises(UserError, match="not finished"):
        ShardSet(tmp_path / "out")


def test_what_cannot_be_is_one_line(shards, tmp_path, capsys):
    out = tmp_path / "out"
    assert "one needs the other" in refused(module, capsys, shards.folder, out, "--split", 0.5)
    assert "one needs the other" in refused(module, capsys, shards.folder, out, "--split-to", tmp_path / "b")
    split = [shards.folder, out, "--split-to", tmp_path / "b", "--split"]
    assert "--split 1: must be between 0 and 1" in refused(module, capsys, *split, 1)
    assert f"{tmp_path / 'b'}: no sample of 9 would go there" in refused(module, capsys, *split, 1e-9)
    assert "named twice" in refused(module, capsys, shards.folder, out, "--split-to", out, "--split", 0.5)
    assert "--count: must be at least 1" in refused(module, capsys, shards.folder, out, "--count", 0)
    assert "--samples: must be at least 1" in refused(module, capsys, shards.folder, out, "--samples", 0)
    assert "no manifest.json here" in refused(module, capsys, tmp_path / "nowhere", out)
    assert "holds something else already" in refused(module, capsys, shards.folder, shards.folder)
    assert not out.exists() and not (tmp_path / "b").exists()
    out.mkdir()
    (out / "precious").write_text("mine")
    assert "exists already" in refused(module, capsys, shards.folder, out)
    assert files(out) == {"precious": b"mine"}


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0 and "reshard.py all mixed --shuffle 0" in capsys.readouterr().out
