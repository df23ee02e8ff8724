"""A teacher over two ranks: what each holds while it loads its share, in processes of their own.

Started as a script this file is one rank, which loads the teacher and prints its peak.
"""

import gc
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from megakd.capture.sharded import load_shared
from megakd.system.dist import close_world, join_world
from tests.conftest import run_to_end

LAYERS, EXPERTS, HIDDEN, EXPERT_HIDDEN = 4, 8, 512, 2048
LARGEST = EXPERTS * 2 * EXPERT_HIDDEN * HIDDEN * 4  # bytes of gate_up_proj; whole tensors of it leave memory when freed
SMALL = {"vocab_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 64}
SMALL |= {"num_local_experts": EXPERTS, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """A tiny teacher, which takes the first load's own costs, and one of 400 MB."""
    folder = tmp_path_factory.mktemp("teachers")
    for name, sizes in (("tiny", (1, 32, 32)), ("large", (LAYERS, HIDDEN, EXPERT_HIDDEN))):
        shape = dict(zip(("num_hidden_layers", "hidden_size", "intermediate_size"), sizes, strict=True))
        with torch.device("meta"):
            model = MixtralForCausalLM(MixtralConfig(**SMALL, **shape))
        model.to_empty(device="cpu").save_pretrained(folder / name)
    return [folder / "tiny", folder / "large"]


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["zero3", "autoep"])
def test_a_rank_holds_its_share_and_two_of_the_largest_tensors_while_it_loads(folders, kind):
    whole = sum(file.stat().st_size for file in folders[1].glob("*.safetensors"))
    bound = whole / 2 + 2 * LARGEST
    assert bound < 0.9 * whole
    output = run_to_end(2, __file__, kind, *folders)
    peaks = [int(peak) for peak in re.findall(r"peak (\d+)", output)]
    assert len(peaks) == 2 and all(whole / 2 < peak <= bound for peak in peaks), (peaks, whole, bound)


def rank_of_two(kind: str, folders: list[str]) -> None:
    world = join_world()
    before = 0
    for folder in folders:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = memory("VmRSS")
        load_shared(Path(folder), lambda model: model, kind, torch.float32, world)  # type: ignore[arg-type]
    print(f"peak {memory('VmHWM') - before}")
    close_world()


def memory(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


if __name__ == "__main__":
    rank_of_two(sys.argv[1], sys.argv[2:])
