"""Between a student's fused factors and the unfused wrappers that some trainers store.

    python tools/compat/seed_form.py to-seed STUDENT FOLDER [--dtype float32]
    python tools/compat/seed_form.py from-seed FOLDER STUDENT [--dtype bfloat16]

Unfused, every expert's matrix is the shared core between two wrappers, one on each side of it,
    W_e = (I + U_out S_out^T) C (I + U_in S_in^T)
FOLDER is a Hugging Face folder with the stock model's config.json and these tensors instead of the experts':
    model.layers.{i}.mlp.shared_core.{p}_proj.weight                        C, p = gate, up, down
    model.layers.{i}.mlp.experts.{e}.{p}_proj.output_wrapper.{u,v}          U_out, S_out [d_out, R]
    model.layers.{i}.mlp.experts.{e}.{p}_proj.input_wrapper.{u,v}           U_in, S_in [d_in, R]
All other tensors have the hub's names.

A student (megakd/models/shared_core.py) stores the product of the core with the wrapper on the side of the hidden size:
for gate and up Q = L C U_in with L = I + U_out S_out^T, next to V = S_in; down is the mirror. from-seed multiplies.
to-seed solves L C U_in = Q by least squares, in float64. With F <= D and a core of full rank that is exact, whatever Q
is. U_in may be huge where L is nearly singular, hence float32: in bfloat16 the products can be wrong by a third. Every
expert is multiplied out from what was written, and an error above 1e-3 is refused.

Wrappers of unequal ranks, or none (`additive`), are filled up with columns of zeros; from-seed takes these away again.
The shape `basis` and experts that were kept dense have no unfused form.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import installed  # noqa: F401
import torch
from torch import Tensor

from megakd.errors import UserError
from megakd.models.hub import (
    Checkpoint,
    cast,
    copy_side_files,
    exact_names,
    is_student,
    load_config,
    model_of,
    say_unused,
    write_config,
    write_weights,
)
from megakd.models.shared_core import PROJECTIONS, Form, dense_weight
from megakd.models.sources import as_stored, module_names
from megakd.models.spec import MoESpec, spec_for
from megakd.models.student import stock_config, student_config
from megakd.names import expand
from megakd.outputs import check_folder
from megakd.system.files import publishing
from megakd.system.terminal import accept_any_encoding, one_line_errors

WORST = 1e-3
SIDES = ("output", "input")


def main(argv: list[str] | None = None) -> None:
    accept_any_encoding()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, dtype in (("to-seed", "float32"), ("from-seed", None)):
        command = commands.add_parser(name)
        command.add_argument("source", type=expand)
        command.add_argument("out", type=expand)
        command.add_argument(
            "--dtype",
            choices=("float32", "bfloat16", "float16"),
            default=dtype,
            help=f"of what is written (default: {dtype or 'what the core is stored in'})",
        )
    args = parser.parse_args(argv)
    with one_line_errors("seed_form"):
        args.out = check_folder(args.out)
        (to_seed if args.command == "to-seed" else from_seed)(args.source, args.out, args.dtype)


def to_seed(source: Path, out: Path, dtype: str) -> None:
    """Write a student's folder with its wrappers unfused; UserError when it has no such form."""
    config, checkpoint = load_config(source), Checkpoint(source)
    if not is_student(config):
        raise UserError(f"{source}: model type {config.model_type!r} is no compressed student")
    spec = spec_for(config, str(source))
    layers = [layer for layer in spec.layers if config.forms(layer) is not None]
    for layer in layers:
        bases = [p for p, form in config.forms(layer).items() if form.based]
        if bases:
            raise UserError(f"{source}: layer {layer} stores {', '.join(bases)} in bases, which have no unfused form")
        if config.dense_experts(layer):
            raise UserError(f"{source}: layer {layer} keeps experts {config.dense_experts(layer)} dense")
    errors: list[float] = []
    with publishing(out) as temporary:
        write_weights(temporary, seed_tensors(checkpoint, config, spec, layers, getattr(torch, dtype), errors))
        stock = stock_config(config)
        stock.dtype = getattr(torch, dtype)
        write_config(temporary, stock)
        copy_side_files(source, temporary)
    print(f"{out}: {len(layers)} layers, largest relative error of an expert's matrix {max(errors, default=0.0):.1e}")


def seed_tensors(
    checkpoint: Checkpoint, config: Any, spec: MoESpec, layers: list[int], dtype: torch.dtype, errors: list[float]
) -> Iterator[tuple[str, Tensor]]:
    """All tensors in the unfused layout; `errors` gets one of every matrix."""
    blocks = {f"model.layers.{layer}.mlp.": layer for layer in layers}
    model = model_of(stock_config(config), str(checkpoint.folder))
    exact = exact_names(model)
    for name in checkpoint.files:
        inside = any(name.startswith((block + "experts.", block + "shared_core.")) for block in blocks)
        if not inside:
            yield from as_stored(model, {name: cast(name, checkpoint.tensor(name), dtype, exact)}).items()
    for block, layer in blocks.items():
        stored = {n.removeprefix(block): checkpoint.tensor(n) for n in checkpoint.files if n.startswith(block)}
        for projection in PROJECTIONS:
            core = stored[f"shared_core.{projection}_proj.weight"]
            yield f"{block}shared_core.{projection}_proj.weight", core.to(dtype)
            for expert in range(spec.experts):
                wrappers = {n: t.to(dtype) for n, t in unfused(stored, projection, expert).items()}
                found = seed_weight(core.to(dtype), wrappers)
                expected = dense_weight(stored, projection, expert).double()
                errors.append(((found - expected).norm() / expected.norm().clamp(min=1e-300)).item())
                if not errors[-1] <= WORST:
                    raise UserError(
                        f"{checkpoint.folder}: layer {layer}, {projection}_proj of expert {expert}: unfused in "
                        f"{str(dtype).removeprefix('torch.')} the matrix is off by {errors[-1]:.1e}, more than {WORST}"
                    )
                for name, tensor in wrappers.items():
                    yield f"{block}experts.{expert}.{projection}_proj.{name}", tensor


def unfused(stored: dict[str, Tensor], projection: str, expert: int) -> dict[str, Tensor]:
    """One expert's wrappers by name (`output_wrapper.u`, …), float64, of one rank, from a layer's fused factors."""
    core = stored[f"shared_core.{projection}_proj.weight"].double()
    far, near = SIDES if projection == "down" else SIDES[::-1]  # the side of the hidden size, and of the experts'

    def factor(wrapper: str, side: str, rows: int) -> Tensor:
        found = stored.get(f"experts.{wrapper}_wrapper_{projection}_{side}")
        if found is None:
            return core.new_zeros(rows, 0)
        return (found[expert].T if side == "left" else found[expert]).double()

    if projection == "down":  # W^T = L C^T + Q V^T with L = I + V U^T, Q = P, V = U'
        core, left, right, q, v = core.T, "right", "left", "right", "left"
    else:
        left, right, q, v = "left", "right", "left", "right"
    u, s = factor(near, left, core.shape[0]), factor(near, right, core.shape[0])
    q, v = factor(far, q, core.shape[0]), factor(far, v, core.shape[1])
    solved = torch.linalg.lstsq(core + u @ (s.T @ core), q, driver="gelsd").solution
    rank = max(u.shape[1], v.shape[1])
    near_pair, far_pair = (u, s), (solved, v)
    if projection == "down":  # transposed back: the roles of u and v change
        near_pair, far_pair = near_pair[::-1], far_pair[::-1]
    pairs = {far: far_pair, near: near_pair}
    return {
        f"{side}_wrapper.{letter}": torch.nn.functional.pad(tensor, (0, rank - tensor.shape[1])).contiguous()
        for side in SIDES
        for letter, tensor in zip("uv", pairs[side], strict=True)
    }


def seed_weight(core: Tensor, wrappers: dict[str, Tensor]) -> Tensor:
    """(I + U_out S_out^T) C (I + U_in S_in^T), float64."""
    core, w = core.double(), {name: tensor.double() for name, tensor in wrappers.items()}
    inner = core + (core @ w["input_wrapper.u"]) @ w["input_wrapper.v"].T
    return inner + w["output_wrapper.u"] @ (w["output_wrapper.v"].T @ inner)


def from_seed(source: Path, out: Path, dtype: str | None) -> None:
    """Write the student of a folder in the unfused layout."""
    config, checkpoint = load_config(source), Checkpoint(source)
    spec = spec_for(config, str(source))
    layers = [i for i in spec.layers if f"model.layers.{i}.mlp.shared_core.gate_proj.weight" in checkpoint.files]
    if is_student(config) or not layers:
        raise UserError(f"{source}: no stock config.json next to shared cores with unfused wrappers; see --help")
    first = checkpoint.tensor(f"model.layers.{layers[0]}.mlp.shared_core.gate_proj.weight")
    target = getattr(torch, dtype) if dtype else first.dtype
    forms: dict[int, dict[str, Form]] = {layer: {} for layer in layers}
    with publishing(out) as temporary:
        write_weights(temporary, fused_tensors(checkpoint, config, spec, forms, target))
        student = student_config(config, forms)
        student.dtype = target
        write_config(temporary, student)
        copy_side_files(source, temporary)
    print(f"{out}: {len(layers)} layers, {student.architectures[0]}")


def fused_tensors(
    checkpoint: Checkpoint, config: Any, spec: MoESpec, forms: dict[int, dict[str, Form]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """All tensors by the student's names; fills in the forms of each layer."""
    blocks = {f"model.layers.{layer}.mlp.": layer for layer in forms}
    model = model_of(config, str(checkpoint.folder))
    expected, exact, unused = model.state_dict(), exact_names(model), []
    for name, module_name in module_names(model, checkpoint.files).items():
        if module_name in expected:
            yield module_name, cast(module_name, checkpoint.tensor(name), dtype, exact)
        elif not any(name.startswith((block + "experts.", block + "shared_core.")) for block in blocks):
            unused.append(name)
    say_unused(checkpoint.folder, unused)
    for block, layer in blocks.items():
        for projection in PROJECTIONS:
            name = f"{block}shared_core.{projection}_proj.weight"
            core = checkpoint.tensor(name)
            if tuple(core.shape) != spec.shapes[projection]:
                raise UserError(
                    f"{checkpoint.place(name)} has shape {tuple(core.shape)}, "
                    f"config.json says {spec.shapes[projection]}"
                )
            yield name, core.to(dtype)
            wrappers = without_padding(stacked(checkpoint, config, spec, layer, projection))
            ranks = (wrappers[f"{side}_wrapper.u"].shape[2] for side in ("input", "output"))
            form = Form("wrappers", *ranks)
            if (form.input_rank if projection == "down" else form.output_rank) == 0:
                form = form._replace(shape="additive")
            forms[layer][projection] = form
            for factor, tensor in fused(core.double(), projection, wrappers).items():
                if tensor.numel() > 0:
                    yield f"{block}experts.{factor}", tensor.to(dtype)


def stacked(checkpoint: Checkpoint, config: Any, spec: MoESpec, layer: int, projection: str) -> dict[str, Tensor]:
    """The wrappers of all experts, [E, d, R] in float64; UserError for one of another shape than the others."""
    d_out, d_in = spec.shapes[projection]
    found = {}
    for side, rows in zip(SIDES, (d_out, d_in), strict=True):
        rank = None
        for letter in "uv":
            names = [
                f"model.layers.{layer}.mlp.experts.{e}.{projection}_proj.{side}_wrapper.{letter}"
                for e in range(spec.experts)
            ]
            tensors = [checkpoint.tensor(name).double() for name in names]
            rank = tensors[0].shape[-1] if rank is None else rank
            for name, tensor in zip(names, tensors, strict=True):
                if tuple(tensor.shape) != (rows, rank):
                    raise UserError(f"{checkpoint.place(name)} has shape {tuple(tensor.shape)}, not {(rows, rank)}")
            found[f"{side}_wrapper.{letter}"] = torch.stack(tensors)
    return found


def without_padding(wrappers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Less the columns at the end that are zero in u and v of every expert."""
    found = {}
    for side in SIDES:
        u, v = wrappers[f"{side}_wrapper.u"], wrappers[f"{side}_wrapper.v"]
        used = (u.abs().amax((0, 1)) + v.abs().amax((0, 1))).nonzero()
        rank = int(used[-1]) + 1 if len(used) else 0
        found[f"{side}_wrapper.u"], found[f"{side}_wrapper.v"] = u[..., :rank], v[..., :rank]
    return found


def fused(core: Tensor, projection: str, wrappers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The student's factors by name, as they are stored: one wrapper as it is, the other times core and the first."""
    u_out, s_out, u_in, s_in = (wrappers[f"{side}_wrapper.{letter}"] for side in SIDES for letter in "uv")
    if projection == "down":
        # P = (C (I + U_in S_in^T))^T S_out = (I + S_in U_in^T) C^T S_out
        p = core.T @ s_out
        pairs = {"input": (u_in, s_in), "output": (u_out, p + s_in @ (u_in.mT @ p))}
    else:
        q = core @ u_in
        pairs = {"input": (q + u_out @ (s_out.mT @ q), s_in), "output": (u_out, s_out)}
    found = {}
    for wrapper, (left, right) in pairs.items():
        found[f"{wrapper}_wrapper_{projection}_left"] = left.mT.contiguous()
        found[f"{wrapper}_wrapper_{projection}_right"] = right
    return found


if __name__ == "__main__":
    main()
