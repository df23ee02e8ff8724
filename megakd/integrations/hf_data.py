"""The data sets of DistillationTrainer: folders of shards or columns, and what has to fit together before training."""

import weakref
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
from torch.utils.data import Dataset

from megakd.data.batches import collate
from megakd.data.records import Sample, with_rows
from megakd.data.shards import ShardSet, label_masked
from megakd.data.tokenizers import bos_of, bos_words, identify_tokenizer, vocabulary_size
from megakd.errors import UserError, foreign
from megakd.identity import DataIdentity, TokenizerIdentity, packing_of
from megakd.integrations.hf_columns import TopKDataset
from megakd.models.isolation import check_config, check_model
from megakd.models.tables import check_tables
from megakd.objectives.cached import stored_in
from megakd.system.logging import say

Data = Any  # a DistillationDataset, the folder that it reads, or a datasets.Dataset with the columns of hf_columns

SAVING_REMEDY = "correct its generation_config.json, or set student.generation_config.do_sample = True before"


class DistillationDataset(Dataset[Sample]):
    """The samples of a folder of shards with teacher targets, by index; workers of a DataLoader open it anew."""

    def __init__(self, folder: str | Path):
        self.folder = self.name = Path(folder)
        self.shards = ShardSet(self.folder)
        weakref.finalize(self, self.shards.close)  # before Python takes its modules apart
        self.facts = self.shards.facts
        if "codec" not in self.facts:
            raise UserError(f"{folder}: tokens without teacher targets; run: megakd generate-logits RUN")

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> Sample:
        return self.shards[index]

    def blank(self) -> Sample:
        return self.shards.blank()

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """What `Answering.forward` takes; labels are shifted already."""
        batch = with_rows(collate(samples, self.facts["tokens"]["sequence_length"]))
        return dict(zip(("input_ids", "labels", "position_ids", "targets", "counted"), batch[:5], strict=True))

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return type(self), (self.folder,)


class Share(Dataset[Any]):
    """Every world-th sample of a data set; blank ones at the end, so that all ranks have as many."""

    def __init__(self, dataset: DistillationDataset | TopKDataset, rank: int, world: int):
        self.dataset, self.rank, self.world = dataset, rank, world

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.world)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = self.rank + index * self.world
        return self.dataset[place] if place < len(self.dataset) else self.dataset.blank()


def opened(data: Data, vocab_size: int, name: str) -> Any:
    """A data set for a folder or for columns, also within a dict; all else as it is. name: of the argument."""
    if isinstance(data, dict):
        return {key: opened(each, vocab_size, f"{name}[{key!r}]") for key, each in data.items()}
    if isinstance(data, datasets.Dataset):
        return TopKDataset(data, vocab_size, name)
    return DistillationDataset(data) if isinstance(data, str | Path) else data


def vocabulary_of(student: Any, tokenizer: Any) -> int:
    """Real entries of the vocabulary: the tokenizer's, else all rows of the student's head."""
    if tokenizer is not None:
        return vocabulary_size(tokenizer)
    head = student.get_output_embeddings()
    return getattr(head, "out_features", None) or head.weight.shape[0]


def check_data(student: Any, train: DistillationDataset | TopKDataset, evaluation: Any, tokenizer: Any) -> None:
    """UserError where student, tokenizer and data do not belong together."""
    if not isinstance(train, DistillationDataset | TopKDataset):
        kinds = "a DistillationDataset, a folder of shards or a datasets.Dataset with top-k columns"
        raise UserError(f"train_dataset: {kinds}, not {type(train).__name__}")
    for dataset in evaluation.values() if isinstance(evaluation, dict) else [evaluation]:
        if dataset is not None:
            check_alike(train, dataset)
    facts = train.facts
    place = f"{student.name_or_path or type(student).__name__} (student of {train.name})"
    check_tables(student, place, facts["vocab_size"], facts["tokens"]["sequence_length"])
    packing, weight = packing_of(facts), student.get_output_embeddings().weight
    check_config(student.config, place, packing)
    if not hasattr(weight, "ds_id"):  # in pieces over ranks it has no weights to run with
        check_model(student, place, packing)
    if isinstance(train, TopKDataset):
        if tokenizer is None:
            say(f"{train.name}: without processing_class all {train.vocab_size} rows of the head are its vocabulary")
    elif tokenizer is not None:
        mine, theirs = identify_tokenizer(tokenizer), TokenizerIdentity.of(facts["tokens"]["tokenizer"])
        if theirs.difference(mine):
            raise UserError(
                f"{train.folder}: made with a tokenizer of {theirs}, but processing_class has one of {mine}"
            )
        own, made = bos_of(tokenizer), facts["tokens"].get("bos", [])
        if own != made and not label_masked(facts):  # a chat template begins conversations
            say(
                f"{train.folder}: documents begin {bos_words(tokenizer, made)}, texts of processing_class "
                f"{bos_words(tokenizer, own)}; read by it, texts begin otherwise than those that are trained on"
            )


def check_alike(train: DistillationDataset | TopKDataset, other: Any) -> None:
    """UserError unless the loss that was made for `train` is right for `other`."""
    if not isinstance(other, type(train)):
        kind = "a datasets.Dataset with top-k columns"
        kind = "a DistillationDataset or a folder of shards" if isinstance(train, DistillationDataset) else kind
        raise UserError(f"eval_dataset: {kind}, as train_dataset is, not {type(other).__name__}")
    different = None
    if isinstance(train, DistillationDataset):
        different = DataIdentity.of(train.facts).difference(DataIdentity.of(other.facts))
    mine, theirs = stored_in(train.facts), stored_in(other.facts)
    if not different and mine != theirs:
        different = f"another capture: {theirs} instead of {mine}"
    if different:
        raise UserError(f"{other.name}: differs from {train.name}: {different}")


def check_saving(student: Any) -> None:
    """UserError when transformers would refuse to save the student's configs, which it does hours later otherwise."""
    place = student.name_or_path or type(student).__name__
    with TemporaryDirectory() as folder, foreign(f"{place}: cannot be saved", SAVING_REMEDY):
        student.config.save_pretrained(folder)
        if student.can_generate():
            student.generation_config.save_pretrained(folder)
