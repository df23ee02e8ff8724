"""Where text comes from, what is kept of the teacher's logits, and how training reads both."""

from typing import Annotated, Literal

from pydantic import (
    Field,
    model_validator,
)

from megakd.config.base import Count, Section, live


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
