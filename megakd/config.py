"""RunConfig: everything a run is, in typed, frozen sections; read from a recipe, written out in full."""

import difflib
import json
import math
import operator
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

from megakd.errors import UserError
from megakd.files import digest, read_json
from megakd.names import find_deepspeed

# 2e9 is how people write token counts; JSON reads it as a float.
Count = Annotated[int, BeforeValidator(lambda v: int(v) if isinstance(v, float) and v.is_integer() else v)]


def live(default: Any, **constraints: Any) -> Any:
    """A field that may change after the run was made; the change is recorded in history.jsonl."""
    return Field(default, json_schema_extra={"live": True}, **constraints)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Section):
    """teacher and student: a folder, a hub id, or `demo` (shipped). student None: made by `megakd compress`.

    revision, student_revision: branch, tag or commit of a hub's model; a commit cannot change later.
    """

    teacher: str = "demo"
    revision: str | None = None
    student: str | None = None
    student_revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


class CompressConfig(Section):
    """How the teacher's experts become shared cores and small factors (docs/compression.md).

    rank: of both wrappers of every expert; split: free divides their parameters unequally where that fits better.
    budget: instead of rank, the share of the teacher's expert parameters to keep, spent by a planner over all layers on
    any of `shapes`; flops: at most this share of the experts' FLOPs a token too.
    solver: als, at most `sweeps` rounds until one gains less than `tolerance`; adam, `steps` at rate `lr`.
    calibration_tokens: tokens of the run's training shards that measure what the experts' inputs are, 0: weights alone
    count; damping: candidates for the share of the identity in these measurements, the best on held-out tokens is kept;
    sequential: measured behind the layers that are compressed already.
    align: permute hidden units first where experts are copies of each other. super_experts: keep those dense that make
    the massive activations (auto finds them, needs calibration).
    """

    rank: int = Field(64, ge=1)
    split: Literal["equal", "free"] = "equal"
    budget: float | None = Field(None, gt=0, lt=1)
    flops: float | None = Field(None, gt=0, le=1)
    shapes: tuple[Literal["wrappers", "additive", "basis"], ...] = Field(
        ("wrappers", "additive", "basis"), min_length=1
    )
    solver: Literal["als", "adam"] = "als"
    sweeps: int = Field(20, ge=0)
    tolerance: float = Field(1e-4, ge=0)
    steps: int = Field(1000, ge=1)
    lr: float = Field(1e-2, gt=0)
    calibration_tokens: Count = Field(32768, ge=0)
    damping: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field((0.1,), min_length=1)
    sequential: bool = False
    align: Literal["auto", "off"] = "auto"
    super_experts: Literal["auto", "off"] = "off"

    @model_validator(mode="after")
    def _needs(self) -> "CompressConfig":
        if self.super_experts == "auto" and not self.calibration_tokens:
            raise ValueError("super_experts=auto finds them by running tokens: set calibration_tokens, like 32768")
        if self.sequential and self.budget is not None:
            raise ValueError("the planner wants all layers measured before one is fitted: set sequential=false")
        if self.flops is not None and self.budget is None:
            raise ValueError("flops bounds what the planner chooses: set budget too, like 0.25")
        return self


class DataConfig(Section):
    """Where text comes from and how it is packed; see `megakd.data.documents` for what `source` may be.

    revision: branch, tag or commit of a source on the hub; tokenize records the commit and stays at it.
    bos: whether documents begin with the tokenizer's BOS token. auto: as tokenizer("text") itself begins; always: also
    where it does not; never.
    packing: packed fills every sequence with documents, separated by position_ids; a model that does not separate them
    so (recurrent and convolutional layers, masks that ignore position_ids) is refused. documents puts one document, or
    a piece of one, into each sequence, shorter where the document is: right for every model, padded in batches.
    workers: processes that tokenize, 0: the one that reads.
    """

    source: str = "HuggingFaceFW/fineweb"
    revision: str | None = None
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"
    streaming: bool = True
    bos: Literal["auto", "always", "never"] = "auto"
    sequence_length: Count = Field(2048, ge=2, le=65535)
    packing: Literal["packed", "documents"] = "packed"
    tokens: Count = Field(int(2e9), ge=1)
    holdout_fraction: float = Field(0.001, gt=0, lt=1)
    holdout_tokens: Count = Field(int(1e6), ge=1)
    shard_tokens: Count = Field(int(4e6), ge=1)
    workers: int = live(0, ge=0)


class LogitsConfig(Section):
    """What is kept of the teacher at each position.

    topk     the top_k most probable tokens with p >= pmin, and the mass of all others at each declared temperature
    sampled  `draws` draws from the whole distribution at draw_temperature
    hybrid   both: what topk keeps, and draws from the rest
    levels: how finely probabilities are rounded, see `megakd.data.codec`.
    parallel: a teacher on each rank (replica), or one over all ranks (zero3, or autoep: experts spread too).
    """

    profile: Literal["topk", "sampled", "hybrid"] = "topk"
    top_k: int = Field(64, ge=1, le=65535)
    pmin: float = Field(3e-4, ge=0, lt=1)
    levels: int = Field(238, ge=2, le=255)
    draws: int = Field(50, ge=1, le=255)
    draw_temperature: float = Field(1.0, gt=0)
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field((1.0, 2.0), max_length=16)
    parallel: Literal["replica", "zero3", "autoep"] = live("replica")
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    batch_size: int = live(8, ge=1)

    @model_validator(mode="after")
    def _tail_for_draws(self) -> "LogitsConfig":
        if self.profile == "hybrid" and self.draw_temperature not in self.declared_temperatures:
            raise ValueError("hybrid draws need a tail at draw_temperature: add it to temperatures")
        return self

    @property
    def declared_temperatures(self) -> tuple[float, ...]:
        """Those with a tail in every record: 1 first, then the others."""
        return (1.0, *(t for t in self.temperatures if t != 1.0))


class StreamConfig(Section):
    """How training reads its shards; see `megakd.data.stream` for lanes.

    follow: begin while the capture still runs, waiting for shards (needs lanes). workers: threads that decode.
    on_damage: skip leaves out samples that are damaged, counts and names them. scratch: a local folder for copies.
    """

    lanes: int = Field(0, ge=0)
    follow: bool = live(False)
    workers: int = live(2, ge=1)
    on_damage: Literal["raise", "skip"] = live("raise")
    scratch: str | None = live(None)


def _ramp(**bounds: float) -> PlainValidator:
    """Checks a number, or a pair [start, end] of them; bounds like those of a Field."""
    kinds: dict[str, Any] = {"ge": "greater_than_equal", "gt": "greater_than", "le": "less_than_equal"}
    holds: dict[str, Any] = {"ge": operator.ge, "gt": operator.gt, "le": operator.le}

    def number(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PydanticKnownError("float_type")
        if not math.isfinite(value):
            raise PydanticKnownError("finite_number")
        for key, bound in bounds.items():
            if not holds[key](value, bound):
                raise PydanticKnownError(kinds[key], {key: bound})
        return float(value)

    def check(value: Any) -> float | tuple[float, float]:
        if not isinstance(value, list | tuple):
            return number(value)
        if len(value) != 2:
            raise PydanticCustomError("ramp", "Input should be a number or a pair [start, end]")
        return number(value[0]), number(value[1])

    return PlainValidator(check)


_AS_IT_IS = PlainSerializer(lambda value: value)
# pydantic's own union would name its members in every error
Share = Annotated[float | tuple[float, float], _ramp(ge=0, le=1), _AS_IT_IS]
Temperature = Annotated[float | tuple[float, float], _ramp(gt=0), _AS_IT_IS]


class ObjectiveConfig(Section):
    """(1 - alpha) * CE + alpha * T^2 * KL; tail: what stands for the tokens that are not in the stored head.

    kind: cached learns from stored targets; sar from the teacher itself, whose routers learn too; online from the
    teacher itself, and from what is inside it. Both have sections of their names.

    ghost: one more bucket. truncated: nothing. sampled, hybrid: the stored draws, from everything or from the rest.
    alpha, temperature: a number, or [start, end]: linear over each stage. divergence: instead of the KL; mix: the
    teacher's share of the mixture in jsd and skew_kl.
    """

    kind: Literal["cached", "sar", "online"] = "cached"
    alpha: Share = 0.5
    temperature: Temperature = 2.0
    tail: Literal["ghost", "truncated", "sampled", "hybrid"] = "ghost"
    divergence: Literal["kl", "reverse_kl", "jsd", "skew_kl", "tvd"] = "kl"
    mix: float = 0.5

    @model_validator(mode="after")
    def _mixes(self) -> "ObjectiveConfig":
        if self.divergence in ("jsd", "skew_kl") and not 0 < self.mix < 1:
            raise ValueError(f"{self.divergence} mixes teacher and student: mix is between 0 and 1, like 0.1")
        return self


class SarConfig(Section):
    """The teacher's side of objective.kind=sar: which experts a token takes while distilling, and what holds routers.

    routing: trained takes as many experts as the teacher was trained with, all takes all; top_m goes from initial_top_k
    to final_top_k in equal steps over each stage (at most all experts).
    router_lr_multiplier: of routers that no rule of a stage matches; at the student's rate (1) teachers collapse.
    anchor, entropy, balance: weights a token of |W - W0|^2 / |W0|^2, of the routers' lack of entropy (1 - H / log E)
    and of the load balance (1 where experts are used alike).
    likelihood, features: of a teacher with another tokenizer, in the place of the KL: weights of how likely spans of
    text are that both tokenizers end alike, and of the last hidden states of these spans behind a projection.
    router_patterns: regular expressions for the names of routers that are not found by role and shape.
    drift_steps: every how many steps the teacher as it was is asked too, for the log; 0 never.
    """

    routing: Literal["trained", "all", "top_m"] = "trained"
    initial_top_k: int = Field(1, ge=1)
    final_top_k: int = Field(4, ge=1)
    router_lr_multiplier: float = Field(0.1, ge=0)
    anchor: float = Field(0.1, ge=0)
    entropy: float = Field(0.0, ge=0)
    balance: float = Field(0.0, ge=0)
    likelihood: float = Field(1.0, ge=0)
    features: float = Field(1.0, ge=0)
    router_patterns: tuple[str, ...] = ()
    drift_steps: int = live(10, ge=0)


class OnlineConfig(Section):
    """What objective.kind=online learns from the teacher itself; a part with weight 0 is not computed.

    The loss is (1 - alpha) CE + alpha times the sum of: kl * T^2 KL; feature, of last hidden states; attention, of its
    maps; layers, of every layer's hidden states; contrastive, of a window's positions, at contrastive_temperature.
    gap: positions count for the KL by their KL at T = 1 to this power. importance: experts of the teacher count by
    their share of that KL to this power. routing as in `sar`, or capacity: the way from initial_top_k to final_top_k by
    exp(-KL), how much of the teacher the student reaches.
    """

    kl: float = Field(0.7, ge=0)
    feature: float = Field(0.1, ge=0)
    attention: float = Field(0.1, ge=0)
    layers: float = Field(0.05, ge=0)
    contrastive: float = Field(0.05, ge=0)
    contrastive_temperature: float = Field(0.1, gt=0)
    gap: float = Field(0.0, ge=0)
    importance: float = Field(0.0, ge=0)
    routing: Literal["trained", "all", "top_m", "capacity"] = "trained"
    initial_top_k: int = Field(1, ge=1)
    final_top_k: int = Field(4, ge=1)
    router_patterns: tuple[str, ...] = ()


class OptimConfig(Section):
    """AdamW. batch_tokens: positions a step over all ranks; micro_batch: windows a rank runs at once."""

    lr: float = Field(5e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(100, ge=0)
    final_lr_ratio: float = Field(0.1, ge=0, le=1)
    clip_norm: float = Field(1.0, gt=0)
    batch_tokens: Count = Field(1048576, ge=1)
    micro_batch: int = live(1, ge=1)


class LrRule(Section):
    """Parameters whose name `pattern` (a regex, searched) finds train at lr * lr_multiplier; 0 freezes them."""

    pattern: str
    lr_multiplier: float = Field(ge=0)


LONGEST_NAME = 200  # bytes; file systems take 255, and names of files get endings


def _folder_name(name: str) -> str:
    """A stage's name, which is that of the folder of its checkpoints; ValueError for one that would be lost there."""
    if name.startswith("."):
        raise ValueError("a stage is a folder of checkpoints, whose name must not begin with a dot; try all")
    if ".tmp-" in name or name == "best.json":  # of folders half written, and of the best checkpoint
        raise ValueError("this name has a meaning of its own among the checkpoints; give another, like all")
    if len(name.encode()) > LONGEST_NAME:
        raise ValueError(f"too long for a folder: {len(name.encode())} bytes, at most {LONGEST_NAME}")
    return name


class StageConfig(Section):
    """A stretch of training with its own length and rules; the first rule that matches a parameter counts.

    Exactly one of tokens (positions), steps and epochs (passes over the run's training samples) says how long it is.
    lr, objective, optim: what differs from the run's sections, like {"alpha": 0.9} or {"batch_tokens": 524288}.
    config: a DeepSpeed file of its own, copied into `deepspeed`.
    Adam's moments and fp32 masters of parameters that a stage goes on training come from the stage before.
    """

    name: Annotated[str, AfterValidator(_folder_name)] = Field(pattern=r"^[\w.-]+$")
    tokens: Count | None = Field(None, ge=1)
    steps: Count | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    lr: float | None = Field(None, gt=0)
    lr_multipliers: tuple[LrRule, ...] = ()
    objective: dict[str, Any] = {}
    optim: dict[str, Any] = {}
    config: str | None = None
    deepspeed: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_length(self) -> "StageConfig":
        given = [name for name in ("tokens", "steps", "epochs") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of tokens, steps and epochs, not {' and '.join(given) or 'none of them'}")
        if self.lr is not None and "lr" in self.optim:
            raise ValueError("lr is there twice, in optim too; delete one")
        return self


class GuardConfig(Section):
    """What happens to a step whose loss or gradient is not finite, or whose loss jumps.

    nonfinite: stop ends the run, weights as they were; skip leaves out the update and goes on with the next data.
    spike: skip updates whose loss per token is more than so many times the median of the last `window` steps; losses
    below and near 0 are measured as `engine/guard.py` says.
    rollback: after so many updates left out in a row weights and moments go back to the stage's last checkpoint, while
    step, schedule and data go on; 0 never does. float16's loss scaler leaves out updates of its own.
    """

    nonfinite: Literal["stop", "skip"] = live("stop")
    spike: float | None = live(None, gt=1)
    window: int = live(64, ge=8)
    rollback: int = live(0, ge=0)


class EngineConfig(Section):
    """local: one process. deepspeed: `config` names a file of ds_configs/ or a path, copied into `deepspeed`.

    expert_parallel: how many neighbouring ranks share the experts, each keeping its part of them (deepspeed alone);
    tokens travel to their experts. 1: every rank keeps or partitions all of them. May change with `ranks`.
    activation_checkpointing: forget what layers computed, and compute it again in the backward pass.
    offload_teacher: the layers of a teacher that is asked while training lie in CPU memory, and come to the device one
    at a time; where its routers train they are computed again in the backward pass.
    """

    kind: Literal["local", "deepspeed"] = "deepspeed"
    config: str = "zero3"
    deepspeed: dict[str, Any] | None = None
    ranks: int = live(1, ge=1)
    expert_parallel: int = live(1, ge=1)
    activation_checkpointing: bool = live(False)
    offload_teacher: bool = live(False)


class CheckpointConfig(Section):
    """every_steps: besides the end of each stage. keep: how many of the newest stay, 0 keeps all."""

    every_steps: int = live(500, ge=1)
    keep: int = live(0, ge=0)


# Measures of the hold-out by which a checkpoint can be the best, and whether higher is better.
HIGHER_IS_BETTER = {"kl": False, "perplexity": False, "bits_per_byte": False, "nll": False, "top1": True, "topk": True}


class EvalConfig(Section):
    """What `evaluate` and `watch` measure beside the hold-out, and how (docs/evaluation.md).

    batch_size: windows of the hold-out at once. tasks: of lm-eval, its own or those of YAML files below task_folder.
    limit: questions of each task, the first ones, null: all. few_shot: examples before a question, null: as each task
    says. task_batch_size: requests of lm-eval at once.
    attention: windows of the hold-out, the first ones, on which attention is compared with the teacher's; 0: none.
    best: the measure by which `watch` keeps a checkpoint from rotation: kl, perplexity, bits_per_byte, nll, top1, topk,
    or TASK/METRIC like hellaswag/acc_norm; auto: kl where held-out teacher targets are stored, else perplexity.
    poll_seconds: how often it looks for new ones.
    """

    batch_size: int = live(8, ge=1)
    tasks: tuple[str, ...] = live(())
    task_folder: str | None = live(None)
    limit: int | None = live(None, ge=1)
    few_shot: int | None = live(None, ge=0)
    task_batch_size: int = live(8, ge=1)
    attention: int = live(0, ge=0)
    best: str = live("auto")
    poll_seconds: float = live(5.0, gt=0)


class LogConfig(Section):
    every_steps: int = live(10, ge=1)
    tensorboard: bool = live(True)
    wandb: Literal["offline", "online", "disabled"] = live("offline")
    wandb_project: str = live("megakd", pattern=r"^[^/\\#?%:]{1,128}$")


class RunConfig(Section):
    name: str = "run"
    seed: int = Field(0, ge=0)
    model: ModelConfig = ModelConfig()
    compress: CompressConfig = CompressConfig()
    data: DataConfig = DataConfig()
    logits: LogitsConfig = LogitsConfig()
    stream: StreamConfig = StreamConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    sar: SarConfig = SarConfig()
    online: OnlineConfig = OnlineConfig()
    optim: OptimConfig = OptimConfig()
    stages: tuple[StageConfig, ...] = Field((StageConfig(name="all", tokens=int(1e9)),), min_length=1)
    engine: EngineConfig = EngineConfig()
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _stages_fit(self) -> "RunConfig":
        for index, stage in enumerate(self.stages):
            for name in ("objective", "optim"):
                try:
                    _changed(getattr(self, name), getattr(stage, name))
                except ValidationError as error:
                    first = error.errors()[0]
                    place = (name, *first["loc"])
                    what = _nearest(place) if first["type"] == "extra_forbidden" else ""
                    path = ".".join(map(str, place))
                    raise ValueError(f"stages.{index}.{path}: {first['msg']}{what}") from error
            live = [key for key in stage.optim if is_live(f"optim.{key}")]
            if live:
                raise ValueError(f"stages.{index}.optim.{live[0]} is one for all stages; set it in the run's optim")
        return self

    @model_validator(mode="after")
    def _teacher_is_there(self) -> "RunConfig":
        if self.engine.offload_teacher and self.objective.kind == "cached":
            raise ValueError("engine.offload_teacher is for objective.kind sar and online; cached asks no teacher")
        return self

    @property
    def windows_per_step(self) -> int:
        """Windows of one optimizer step over all ranks."""
        return self.optim.batch_tokens // self.data.sequence_length

    def at(self, stage: StageConfig) -> "RunConfig":
        """The configuration in force during a stage."""
        optim = {**stage.optim, **({} if stage.lr is None else {"lr": stage.lr})}
        engine = {} if stage.config is None else {"config": stage.config, "deepspeed": stage.deepspeed}
        return self.model_copy(
            update={
                "objective": _changed(self.objective, stage.objective),
                "optim": _changed(self.optim, optim),
                "engine": self.engine.model_copy(update=engine),
            }
        )

    def steps_of(self, stage: StageConfig, windows: int | None = None) -> int:
        """Optimizer steps of a stage: its tokens, or its passes over so many windows, over its batch, rounded up.

        windows: those of the training shards; without them as many as `data` asks for.
        """
        if stage.steps is not None:
            return stage.steps
        config = self.at(stage)
        if stage.tokens is not None:
            return -(-stage.tokens // config.optim.batch_tokens)
        assert stage.epochs is not None
        if windows is None:
            windows = max(self.data.tokens // self.data.sequence_length, 1)
        return max(math.ceil(stage.epochs * windows / max(config.windows_per_step, 1)), 1)

    @cached_property
    def mark(self) -> str:
        """Tells runs of one recipe apart: `Run` sets it to what its folder's history holds. No part of a recipe."""
        return ""

    def fingerprint(self, *sections: str) -> str:
        """A hash of the named sections without their live fields; of the whole run when none is named."""
        frozen = {path: v for path, v in flatten(self.model_dump(mode="json")) if not is_live(path)}
        return digest({k: v for k, v in frozen.items() if not sections or k.split(".")[0] in sections})


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """A recipe (or a run's config.json) with overrides applied, the DeepSpeed file copied in, and checked."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a recipe is a JSON object, not {type(raw).__name__}")
    overrides = list(overrides)
    if any(item.startswith("engine.config=") for item in overrides) and isinstance(raw.get("engine"), dict):
        raw["engine"] = {k: v for k, v in raw["engine"].items() if k != "deepspeed"}  # the copy that it replaces
    config = parse(apply_overrides(raw, overrides), str(path))
    _check_distinct([stage.name for stage in config.stages], path)
    return _with_deepspeed(config, path.parent)


def _check_distinct(names: list[str], path: Path) -> None:
    """UserError for two stages of one name, as file systems see it: some take "All" and "all" for one."""
    seen: dict[str, str] = {}
    for name in names:
        key = unicodedata.normalize("NFC", name).casefold()
        if key in seen:
            both = f"two stages are named {name!r}"
            if seen[key] != name:
                both = f"the names {seen[key]!r} and {name!r} differ in case or accents' form alone"
            raise UserError(f"{path}: stages: {both}; checkpoints need distinct names")
        seen[key] = name


def parse(raw: dict[str, Any], source: str) -> RunConfig:
    """Validate; the first thing wrong becomes a UserError `SOURCE: key: what is wrong and what would be right`."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        others = sum(e["type"] != "too_short" for e in error.errors()[1:])  # a broken list also counts as too short
        more = f" (and {others} more)" if others else ""
        if first["type"] == "extra_forbidden":
            raise UserError(f"{source}: unknown key {path!r}{_nearest(first['loc'])}{more}") from None
        got = "" if first["type"] == "missing" else f", got {json.dumps(first['input'], default=str)[:80]}"
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise UserError(f"{source}: {path}: {message}{got}{more}") from None


def parse_frozen(raw: Any, source: str) -> RunConfig:
    """`parse` of a run's own config.json, in which fields that its version did not have mean what that version did."""
    if isinstance(raw, dict) and raw.get("objective", {}).get("kind") == "sar":
        raw.get("sar", {}).setdefault("router_lr_multiplier", 1.0)
    return parse(raw, source)


def apply_overrides(raw: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `raw` with every `section.key=value` set; value is JSON, or a string where it is not."""
    raw = json.loads(json.dumps(raw))
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals or not path:
            raise UserError(f"override {item!r}: expected section.key=value, like optim.lr=1e-4")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        _set(raw, path.split("."), value, item)
    return raw


def _set(node: Any, keys: list[str], value: Any, item: str) -> None:
    for key, following in zip(keys, [*keys[1:], None], strict=True):
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise UserError(f"override {item!r}: {key!r} is no index into a list of {len(node)}")
            place: Any = int(key)
        elif isinstance(node, dict):
            place = key
        else:
            raise UserError(f"override {item!r}: {key!r} is below a value that holds no keys")
        if following is None:
            node[place] = value
        else:
            if isinstance(node, dict):
                node.setdefault(place, {})
            node = node[place]


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, leaf) of nested dicts; lists are leaves."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def is_live(path: str) -> bool:
    """Whether the field at a dotted path may change after the run was made."""
    section, _, key = path.partition(".")
    model = RunConfig.model_fields[section].annotation
    if not (isinstance(model, type) and issubclass(model, Section)) or key not in model.model_fields:
        return False
    return bool((model.model_fields[key].json_schema_extra or {}).get("live"))  # type: ignore[union-attr]


def _nearest(location: tuple[int | str, ...]) -> str:
    model: Any = RunConfig
    for part in location[:-1]:
        if isinstance(part, str):
            model = model.model_fields[part].annotation
            inner = [a for a in get_args(model) if isinstance(a, type) and issubclass(a, Section)]
            model = inner[0] if inner else model
    names = list(getattr(model, "model_fields", {}))
    close = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys are {', '.join(names)}"


def _changed(section: Section, changes: dict[str, Any]) -> Any:
    """A section with changes, validated."""
    return type(section).model_validate({**section.model_dump(), **changes}) if changes else section


def _with_deepspeed(config: RunConfig, folder: Path) -> RunConfig:
    """Copy the named DeepSpeed files into the config, so that the run never depends on a file that may change."""
    engine = config.engine
    if engine.kind != "deepspeed":
        return config
    if engine.deepspeed is None:
        content = _deepspeed_file(engine.config, folder, "engine.config")
        config = config.model_copy(update={"engine": engine.model_copy(update={"deepspeed": content})})
    stages = []
    for index, stage in enumerate(config.stages):
        if stage.config is not None and stage.deepspeed is None:
            content = _deepspeed_file(stage.config, folder, f"stages.{index}.config")
            stage = stage.model_copy(update={"deepspeed": content})
        stages.append(stage)
    return config.model_copy(update={"stages": tuple(stages)})


def _deepspeed_file(name: str, folder: Path, key: str) -> dict[str, Any]:
    path = find_deepspeed(name, folder, key)
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: a DeepSpeed file is a JSON object, not {type(content).__name__}")
    return content
