"""Where text comes from, what is cached of the teacher's logits, and how training reads both."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megakd.config.base import Count, Section, mutable
from megakd.config.tails import DEFAULT


class SourceFields(Section):
    """Where rows come from, and what in them is text or a conversation."""

    source: str = Field(
        "HuggingFaceFW/fineweb",
        description="a data set of the hub, a file or folder (parquet, arrow, jsonl, txt, or saved by `datasets`), or "
        "python-docs, which needs no network",
    )
    revision: str | None = Field(
        None, description="branch, tag or commit of a source on the hub; tokenize records the commit and stays at it"
    )
    subset: str | None = Field(None, description="configuration of a hub data set, like sample-10BT")
    split: str = Field("train", description="split of a hub data set, or of one that `datasets` saved to a folder")
    text_field: str = Field("text", description="column or key that holds the text")
    format: Literal["text", "messages", "prompt_completion"] = Field(
        "text",
        description="what a row is: text; messages: a conversation, through the tokenizer's chat template, where only "
        "the assistant's tokens are labels; prompt_completion: the same of a prompt and its completion, each text or "
        "messages, where only the completion counts",
    )
    messages_field: str = Field("messages", description="column that holds a list of messages")
    prompt_field: str = Field("prompt", description="column that holds a prompt")
    completion_field: str = Field("completion", description="column that holds a completion")
    tools_field: str = Field(
        "tools", description="column that holds the tools of a conversation, a list of JSON schemas; it may be missing"
    )


class SourceConfig(SourceFields):
    """One source of several: its own fields, and how much of the data comes from it."""

    source: str = Field(description="a data set of the hub, a file or folder, or python-docs")
    weight: float = Field(1.0, gt=0, description="its share of the tokens, in proportion to the other weights")
    passes: int = Field(
        1, ge=1, description="how often it may be read; the set ends where a source has been read so often"
    )


class DataConfig(SourceFields):
    """Where text comes from and how it is packed into sequences."""

    sources: tuple[SourceConfig, ...] = Field(
        (),
        description="several sources in the place of data.source, mixed by weight: "
        '[{"source": "a.jsonl", "weight": 0.7}, {"source": "b", "weight": 0.3, "text_field": "body"}]',
    )
    chat_template: str | None = Field(
        None, description="a file with a Jinja chat template, in the place of the tokenizer's own"
    )
    on_bad_line: Literal["raise", "skip"] = mutable(
        "raise",
        description="a line, row or conversation that cannot be read ends tokenize, or is skipped, counted and named",
    )
    streaming: bool = Field(True, description="stream a hub data set instead of downloading it first")
    bos: Literal["auto", "always", "never"] = Field(
        "auto",
        description='whether documents begin with the tokenizer\'s BOS token; auto: as tokenizer("text") itself begins',
    )
    sequence_length: Count = Field(2048, ge=2, le=65535, description="tokens per sequence")
    packing: Literal["packed", "documents"] = Field(
        "packed",
        description="packed: documents one after another, separated by position_ids (a model that does not separate "
        "them "
        "so is refused); documents: one document, or a piece of one, per sequence, padded in batches: right for every "
        "model. Conversations are never cut: packed places them whole, as many as fit",
    )
    tokens: Count = Field(int(2e9), ge=1, description="tokens of the training set")
    holdout_fraction: float = Field(
        0.001, gt=0, lt=1, description="share of the documents that no training sees, by a hash of their text"
    )
    holdout_tokens: Count = Field(int(1e6), ge=1, description="tokens of the validation set, from those documents")
    shard_tokens: Count = Field(int(4e6), ge=1, description="tokens per shard")
    workers: int = mutable(0, ge=0, description="processes that tokenize; 0: the one that reads")

    @property
    def origins(self) -> tuple[SourceConfig, ...]:
        """All sources: those of `sources`, else the one of `source`."""
        single = {name: getattr(self, name) for name in SourceFields.model_fields}
        return self.sources or (SourceConfig(**single),)

    @property
    def has_chats(self) -> bool:
        """Whether rows of a source are conversations: samples then have a label mask."""
        return any(origin.format != "text" for origin in self.origins)


class LogitsConfig(Section):
    """What generate-logits keeps of the teacher at each position."""

    profile: Literal["topk", "sampled", "hybrid"] = Field(
        "topk",
        description="topk: the top_k most probable tokens with p >= pmin, and the mass of all others at each of "
        "`temperatures`; sampled: `draws` draws from the whole distribution; hybrid: what topk keeps, and draws from "
        "the "
        "rest",
    )
    top_k: int = Field(64, ge=1, le=65535, description="tokens kept per position, at most")
    pmin: float = Field(3e-4, ge=0, lt=1, description="smallest probability that is kept")
    levels: int = Field(238, ge=2, le=255, description="levels to which probabilities are rounded")
    draws: int = Field(50, ge=1, le=255, description="profile=sampled or hybrid: draws per position")
    draw_temperature: float = Field(1.0, gt=0, description="temperature of the draws")
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        DEFAULT,
        max_length=16,
        description="temperatures at which the mass of the tail is kept; 1 always is. Between them it is interpolated: "
        "the default reaches every T in [1, 4]",
    )
    parallel: Literal["replica", "zero3", "autoep"] = mutable(
        "replica",
        description="a teacher on each rank (replica), or one over all ranks: zero3, or autoep with experts sharded "
        "too",
    )
    engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="what computes the teacher's hidden states; vllm: a process in vLLM's environment, compared with "
        "transformers before anything is written",
    )
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of the teacher's weights and arithmetic")
    batch_size: int = mutable(8, ge=1, description="sequences per forward pass of the teacher")

    @model_validator(mode="after")
    def _tail_for_draws(self) -> "LogitsConfig":
        if self.profile == "hybrid" and self.draw_temperature not in self.declared_temperatures:
            raise ValueError("hybrid draws need a tail at draw_temperature: add it to temperatures")
        return self

    @model_validator(mode="after")
    def _one_teacher_in_vllm(self) -> "LogitsConfig":
        if self.engine == "vllm" and self.parallel != "replica":
            raise ValueError(f"parallel={self.parallel} divides a teacher in transformers: set engine=transformers")
        return self

    @property
    def declared_temperatures(self) -> tuple[float, ...]:
        """Those with a tail in every record: 1 first, then the others."""
        return (1.0, *(t for t in self.temperatures if t != 1.0))


class StreamConfig(Section):
    """How training reads its shards."""

    lanes: int = Field(0, ge=0, description="interleaved shard readers; 0: one permutation of all sequences per epoch")
    curriculum: Literal["off", "nll", "entropy"] = Field(
        "off",
        description="easy sequences first: by the teacher's mean NLL of a sequence's labels, or by the mean entropy of "
        "its predictions, from the cached logits; each epoch still has every sequence once",
    )
    curriculum_start: float = Field(
        0.1, gt=0, lt=1, description="share of the sequences, the easiest, from which training draws at first"
    )
    curriculum_epochs: float = Field(
        1.0, gt=0, description="passes over the data until it draws from all sequences; the share grows as a root"
    )
    group_by_length: int = Field(
        0,
        ge=0,
        description="with data.packing=documents: so many sequences in a row are of about one length, for less "
        "padding where a step has few micro-batches; a step's, batch_tokens / sequence_length, is a good number. 0: "
        "any order",
    )
    follow: bool = mutable(
        False, description="train while the capture still runs, waiting for shards; needs stream.lanes"
    )
    workers: int = mutable(2, ge=1, description="threads that decode")
    on_damage: Literal["raise", "skip"] = mutable(
        "raise", description="a damaged sample ends the run, or is skipped, counted and named"
    )
    scratch: str | None = mutable(None, description="a folder on a local disk for copies of shards; needs stream.lanes")

    @model_validator(mode="after")
    def _one_order(self) -> "StreamConfig":
        if self.curriculum != "off" and self.lanes:
            raise ValueError(f"curriculum={self.curriculum} draws from all shards at once: set stream.lanes=0")
        if self.group_by_length and (self.lanes or self.curriculum != "off"):
            other = "stream.lanes=0" if self.lanes else "stream.curriculum=off"
            raise ValueError(f"group_by_length={self.group_by_length} is an order of its own: set {other}")
        return self
