"""Steps under DeepSpeed: any ZeRO stage, any number of ranks, experts spread or not, the same sums as the local engine.

A state is loaded bit by bit by the layout of ranks that saved it; for another layout it passes through DeepSpeed's
universal checkpoint, which holds every parameter whole, under the names of that layout.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from megakd.engine.base import Accept, CarryOver, StepReport, always, saved_buffers
from megakd.engine.carry_over import export_state, import_state, set_update_counts, update_counts
from megakd.engine.checkpoint import LAYOUT, elastic
from megakd.engine.guard import GRADIENT, REJECTED, SCALE
from megakd.engine.norms import Sums, grad_squares, named, update_squares
from megakd.engine.optim import set_learning_rate
from megakd.errors import UserError
from megakd.system.deepspeed_internals import (
    STATE_TYPES,
    clip_with,
    is_partitioned,
    load_universal,
    local_gradient,
    masters,
    norm_scale,
    set_global_norm,
    skipping_update,
)
from megakd.system.dist import World, barrier, sum_over_ranks
from megakd.system.files import read_json, remove, write_json
from megakd.system.logging import say
from megakd.system.signals import end_with_parent

TAG, UNIVERSAL, CONVERSION_LOG = "state", "universal", "ds_to_universal.log"


class DeepSpeedEngine:
    """expert_parallel: how many ranks share the experts of an objective in which they are spread already."""

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: dict[str, Any],
        world: World,
        expert_parallel: int = 1,
    ):
        self.world = world
        self.labels = {id(p): group["label"] for group in optimizer.param_groups for p in group["params"]}
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
        self.optimizer = optimizer
        self.layout = {
            "ranks": world.size,
            "expert_parallel": expert_parallel,
            "zero": config["zero_optimization"]["stage"],
        }
        if self.layout["zero"] == 0:
            clip_with(self.engine, self._clip)

    def step(
        self, micro_batches: Iterable[Any], tokens: int, factor: float, accept: Accept = always, norms: bool = False
    ) -> StepReport:
        self.engine.train()
        set_learning_rate(self.optimizer, factor)
        found, sums, scale = Sums(), {}, 1.0
        squares: dict[str, float] = {}
        left_out = ""
        for batch in micro_batches:
            report = self.engine(batch)
            # DeepSpeed averages gradients over ranks; we want the sum over all tokens divided once. Experts are kept
            # by fewer ranks, and DeepSpeed divides their sums by all ranks too
            self.engine.backward(report.total * (self.world.size / tokens), scale_wrt_gas=False)
            found.add_report(report)
            if self.engine.is_gradient_accumulation_boundary():
                sums = found.read(over_ranks=True)
                squares = self._grad_squares() if norms else {}
                left_out = "" if accept(sums) else REJECTED
            scale = norm_scale(self.engine.optimizer)  # of this step: DeepSpeed may change it in the step
            with skipping_update(self.engine) if left_out else nullcontext():
                self.engine.step()  # counts micro-batches, updates weights at the last one
        norm = self.engine.get_global_grad_norm()
        grad_norm = 0.0 if norm is None else float(norm) / scale
        if not left_out and (not math.isfinite(grad_norm) or not self.engine.was_step_applied()):
            left_out = SCALE if self.engine.fp16_enabled() else GRADIENT
        if norms and not left_out:
            groups = {group["label"]: group for group in self.optimizer.param_groups}
            members = ((groups[self.labels[id(parts[0])]], master) for master, parts in masters(self.engine))
            squares |= self._over_ranks(named("update_norm", update_squares(self.optimizer, members)))
        return StepReport(sums, grad_norm, left_out, {name: value**0.5 for name, value in squares.items()})

    @torch.no_grad()
    def measure(self, batches: Iterable[Any]) -> dict[str, float]:
        self.engine.eval()
        found = Sums()
        for batch in batches:
            found.add_report(self.engine(batch, held_out=True))
        return found.read(over_ranks=True)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.engine.module.named_parameters():
            packed = getattr(parameter, "packed", None)
            # under ZeRO-3 one parameter is whole on the first rank at a time; without it this gathers nothing
            with deepspeed.zero.GatheredParameters([parameter], enabled=is_partitioned(parameter)):
                if packed is not None:
                    yield from packed.whole(name, parameter)
                elif self.world.first:
                    yield name, parameter.detach()
        if self.world.first:
            yield from saved_buffers(self.engine.module)

    def save(self, folder: Path) -> None:
        # with the file `latest`, which DeepSpeed's own zero_to_fp32.py, copied next to it, asks for
        self.engine.save_checkpoint(str(folder), tag=TAG)
        if self.world.first:
            packs = {name: packed.shapes for name, packed in self._packed()}
            write_json(folder / LAYOUT, {**self.layout, "packs": packs, "updates": update_counts(self.engine)})
        barrier()

    def load(self, folder: Path) -> None:
        saved = read_json(folder / LAYOUT) if (folder / LAYOUT).exists() else self.layout
        if self.world.first:
            remove_converted(folder)
        if all(saved[key] == value for key, value in self.layout.items()):
            self.engine.load_checkpoint(str(folder), tag=TAG)
            return
        if not elastic(folder) or self.layout["zero"] == 0:
            raise UserError(f"{folder}: saved by {describe(saved)}, this is {describe(self.layout)}: resume as saved")
        if self.world.first:
            say(f"{folder}: saved by {describe(saved)}, converted for {describe(self.layout)}")
        self._convert(folder)
        if self.world.first:
            self._rename(folder / UNIVERSAL / "zero", saved["packs"])
            self._match_groups(folder / UNIVERSAL / "zero" / "optimizer_state.pt")
        self._keep_frozen(folder / UNIVERSAL / "zero")
        barrier()
        self._load_universal(folder)
        set_update_counts(self.engine, saved.get("updates", {}))
        barrier()
        if self.world.first:
            remove_converted(folder)

    def export_state(self) -> CarryOver:
        return export_state(self.engine, self.world)

    def import_state(self, carried: CarryOver) -> None:
        import_state(self.engine, carried, self.world)

    def close(self) -> None:
        self.engine.destroy()

    def _grad_squares(self) -> dict[str, float]:
        scale = getattr(self.engine.optimizer, "loss_scale", 1.0)
        trained = ((self.labels[id(p)], p) for p in self.engine.module.parameters() if id(p) in self.labels)
        found = grad_squares((label, local_gradient(p)) for label, p in trained)
        return self._over_ranks(named("grad_norm", {label: value / scale**2 for label, value in found.items()}))

    def _over_ranks(self, squares: dict[str, float]) -> dict[str, float]:
        """Sums over ranks that keep parts; without ZeRO each keeps all (sharded experts apart: those are its own)."""
        if self.layout["zero"] == 0:
            return squares
        return dict(zip(squares, sum_over_ranks(list(squares.values()), self.world.device), strict=True))

    def _clip(self) -> None:
        """Clip by the norm of all gradients; DeepSpeed's own averages the norms of ranks that keep other experts.

        Gradients that are not finite become none: the optimizer has nothing to do, and the norm says it.
        """
        gradients = [(p, p.grad) for p in self.engine.module.parameters() if p.grad is not None]
        squares = grad_squares(("spread" if hasattr(p, "packed") else "kept", gradient) for p, gradient in gradients)
        copies = self.world.size // self.layout["expert_parallel"]  # of each expert
        spread = sum_over_ranks([squares.get("spread", 0.0)], self.world.device)[0] / copies
        norm = (squares.get("kept", 0.0) + spread) ** 0.5
        set_global_norm(self.engine, norm)
        for parameter, gradient in gradients:
            if math.isfinite(norm):
                gradient.mul_(min(1.0, self.engine.gradient_clipping() / (norm + 1e-6)))
            else:
                parameter.grad = None

    def _packed(self) -> Iterator[tuple[str, Any]]:
        for name, parameter in self.engine.module.named_parameters():
            if hasattr(parameter, "packed"):
                yield name, parameter.packed

    def _convert(self, folder: Path) -> None:
        """DeepSpeed's own conversion, in a process of the first rank; the others meet it twice a second meanwhile.

        They would wait in one collective otherwise, which ends with an error after some minutes.
        """
        output = folder / UNIVERSAL
        process = None
        if self.world.first:
            command = [sys.executable, "-m", "megakd.engine.conversion", "--inject_missing_state"]
            command += ["--input_folder", str(folder / TAG), "--output_folder", str(output)]
            # no rank of ours: it must not join, nor start an accelerator
            alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
            # it must not write on when this rank is killed: the next attempt converts anew
            ending = end_with_parent(signal.SIGKILL)
            with (folder / CONVERSION_LOG).open("w") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, env=alone, preexec_fn=ending)
        going, failed = True, False
        while going:
            time.sleep(0.5)
            code = process.poll() if process else 0
            running, wrong = sum_over_ranks([float(code is None), float(bool(code))], self.world.device)
            going, failed = running > 0, wrong > 0
        if failed:
            raise RuntimeError(f"ds_to_universal failed; see {folder / CONVERSION_LOG}")

    def _rename(self, zero: Path, saved: dict[str, dict[str, list[int]]]) -> None:
        """Give each parameter of this layout its folder below `zero`: pack or take apart what another packed.

        saved: of the layout that saved, [rows, R] of each factor in a packed parameter.
        """
        mine = dict(self._packed())
        for packed_name, shapes in saved.items():
            if packed_name not in mine:
                experts = packed_name.rsplit(".", 2)[0]
                for path in sorted((zero / packed_name).iterdir()):
                    content = torch.load(path, weights_only=True)
                    offset = 0
                    for factor, (rows, rank) in shapes.items():
                        part = content
                        if isinstance(content, dict):
                            flat = content["param"][:, offset : offset + rows * rank]
                            part = {"param": flat.reshape(-1, rows, rank).clone()}
                        offset += rows * rank
                        (zero / f"{experts}.{factor}").mkdir(exist_ok=True)
                        torch.save(part, zero / f"{experts}.{factor}" / path.name)
        for packed_name, packed in mine.items():
            if packed_name not in saved and not packed.frozen:
                factors = packed.names(packed_name)
                (zero / packed_name).mkdir()
                for path in sorted((zero / factors[0]).iterdir()):
                    parts = [torch.load(zero / factor / path.name, weights_only=True) for factor in factors]
                    tensors = [part["param"] if isinstance(part, dict) else part for part in parts]
                    whole = tensors[0] if path.stem == "step" else packed.universal(tensors)
                    torch.save(whole, zero / packed_name / path.name)

    def _keep_frozen(self, zero: Path) -> None:
        """Sharded experts that a rule freezes train at a rate of 0: give them their weights, and no momentum."""
        for name, parameter in self.engine.module.named_parameters():
            packed = getattr(parameter, "packed", None)
            if packed is not None and packed.frozen:
                with deepspeed.zero.GatheredParameters([parameter], enabled=is_partitioned(parameter)):
                    factors = [tensor.float().cpu() for _, tensor in packed.whole(name, parameter)]
                if self.world.first:
                    remove(zero / name)
                    (zero / name).mkdir()
                    torch.save(packed.universal(factors), zero / name / "fp32.pt")
                    # ZeRO 1 and 2 make moments that are missing, ZeRO-3 asks for them
                    for moment in ("exp_avg", "exp_avg_sq") if self.layout["zero"] == 3 else ():
                        zeros = packed.universal([torch.zeros_like(factor) for factor in factors])
                        torch.save(zeros, zero / name / f"{moment}.pt")

    def _match_groups(self, path: Path) -> None:
        """As many saved groups as there are here: ZeRO 1 and 2 load the states of no more groups than were saved."""
        if self.layout["zero"] < 3:
            with torch.serialization.safe_globals(STATE_TYPES):
                state = torch.load(path, weights_only=True)
            state["param_groups"] = [{} for _ in self.optimizer.param_groups]  # their settings are ours
            torch.save(state, path)

    def _load_universal(self, folder: Path) -> None:
        groups = self.optimizer.param_groups
        kept = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        load_universal(self.engine, str(folder), UNIVERSAL)
        # DeepSpeed gives all groups the rates and decay of the saved first one
        for group, settings in zip(groups, kept, strict=True):
            group.update(settings)
        # and, under ZeRO-3, all of them one tensor that counts steps, by which each would count for all, or the count
        # of the first group (`set_update_counts`)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()


def remove_converted(folder: Path) -> None:
    """Delete what a conversion has made in a state: it takes as much room, and the next checkpoint is of this layout.

    The state itself stays as it was saved, also where a kill ends the conversion halfway.
    """
    remove(folder / UNIVERSAL)
    for name in ("latest_universal", CONVERSION_LOG):
        (folder / name).unlink(missing_ok=True)


def describe(layout: dict[str, Any]) -> str:
    return f"{layout['ranks']} ranks with expert_parallel {layout['expert_parallel']}"
