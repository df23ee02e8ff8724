"""Peak memory of measuring a layer, in a process of its own: no float32 copy of its experts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megakd.models.hub import WEIGHTS, empty_model
from megakd.models.spec import spec_for
from megakd.models.tiny import tiny_moe_config
from megakd.system.files import read_json, write_json
from tests.models.students import expert_name

MEASURE = """if True:
    import re
    import sys
    from pathlib import Path
    import torch
    def peak():  # not ru_maxrss, which a process inherits from the one that started it
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20
    torch.set_num_threads(1)
    from megakd.compress.calibrate import LayerRunner
    from megakd.models.hub import load_config, model_of
    from megakd.models.sources import Sources
    from megakd.models.spec import spec_for
    folder = Path(sys.argv[1])
    tokens = torch.randint(64, (8, 128))
    positions = torch.arange(128).repeat(8, 1)
    config = load_config(folder)
    sources = Sources(folder, model_of(config, "here"))
    runner = LayerRunner(sources, spec_for(config, "here"), config, tokens, positions)
    hidden = runner.embed()
    before = peak()
    runner.layer(0, hidden, measure=True)
    print(peak() - before)
"""
PEAK_GB = 0.42  # measured: 0.29 to 0.31


def write(folder: Path, fp8: bool) -> None:
    """One layer of 128 experts of 256 x 1024, in bfloat16 or FP8 with blocks of 128 x 128, and the hub's layout."""
    config = tiny_moe_config(
        64, hidden_size=1024, moe_intermediate_size=256, num_hidden_layers=1, num_experts=128, num_attention_heads=8
    )
    config.save_pretrained(folder)
    spec = spec_for(config, "here")
    shapes = {n: p.shape for n, p in empty_model(folder).named_parameters() if not spec.is_expert(n)}
    for projection, shape in spec.shapes.items():
        shapes |= {expert_name(0, e, projection): torch.Size(shape) for e in range(128)}
    tensors = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}
    if fp8:
        for name in [name for name in tensors if ".experts." in name]:
            rows, columns = tensors[name].shape
            tensors[f"{name}_scale_inv"] = torch.full((rows // 128, columns // 128), 0.01)
            tensors[name] = torch.ones(rows, columns).to(torch.float8_e4m3fn)
        config = read_json(folder / "config.json")
        settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        write_json(folder / "config.json", config | {"quantization_config": settings})
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("fp8", [False, True])
def test_experts_are_held_in_16_bits(fp8, tmp_path):
    """100 M expert weights are 0.19 GB in bfloat16 and would be 0.38 GB in float32; the measurements are 0.06 GB."""
    write(tmp_path, fp8)
    argv = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert 0.2 < float(done.stdout.splitlines()[-1]) < PEAK_GB
