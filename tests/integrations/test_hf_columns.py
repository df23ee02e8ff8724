"""A datasets.Dataset with tokens and top-k columns as train_dataset: the loss of the same targets in shards."""

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from megakd.data.batches import collate
from megakd.data.records import IGNORED, Batch, with_rows
from megakd.data.tokenizers import load_tokenizer
from megakd.errors import UserError
from megakd.integrations.hf_columns import TopKDataset
from megakd.integrations.hf_data import Share
from megakd.integrations.hf_trainer import DistillationTrainer, DistillationTrainingArguments
from megakd.models.loading import load_model
from megakd.objectives.cached import CachedDistillation

V, COUNT = 400, 6
QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 2}


@pytest.fixture(scope="module")
def samples(dataset) -> list[Any]:
    return [dataset[index] for index in range(COUNT)]


@pytest.fixture(scope="module")
def student(prepared) -> Any:
    return load_model(prepared / "student-0", torch.float32).eval()


def columns(samples: list[Any], form: str, kind: type = np.float32) -> dict[str, list[Any]]:
    """Samples as columns; form: topk_logprobs, topk_values (raw logits), or tail_mass (raw logits with it)."""
    made: dict[str, list[Any]] = {"input_ids": [], "position_ids": [], "topk_indices": []}
    values = made.setdefault("topk_logprobs" if form == "topk_logprobs" else "topk_values", [])
    for number, sample in enumerate(samples):
        targets, length = sample.targets, len(sample.tokens)
        places = np.arange(length)
        starts = sample.starts[sample.starts < length]
        made["input_ids"].append(sample.tokens)
        made["position_ids"].append(places - starts[np.searchsorted(starts, places, side="right") - 1])
        made["topk_indices"].append(targets.ids)
        shift = 0 if form == "topk_logprobs" else 3 + number
        values.append((targets.logprobs + shift).astype(kind))
        if form == "tail_mass":
            made.setdefault("tail_mass", []).append(np.exp(targets.log_tails[:, 0]))
    return made


def rows(values: dict[str, list[Any]], kind: str = "float32") -> datasets.Dataset:
    """Ragged lists of numpy arrays as a Dataset whose values have a type."""
    features: dict[str, Any] = {name: datasets.List(datasets.Value("int64")) for name in values}
    for name in values.keys() & {"topk_values", "topk_logprobs"}:
        features[name] = datasets.List(datasets.List(datasets.Value(kind)))
    if "topk_indices" in values:
        features["topk_indices"] = datasets.List(datasets.List(datasets.Value("int32")))
    if "tail_mass" in values:
        features["tail_mass"] = datasets.List(datasets.Value("float32"))
    return datasets.Dataset.from_dict(values, datasets.Features(features))


def loss_of(student: Any, data: TopKDataset, tail: str, temperature: float) -> dict[str, float]:
    settings = DistillationTrainingArguments("x", distillation_tail=tail, distillation_temperature=temperature, **QUIET)
    objective = CachedDistillation(student, settings.objective_config(), data.facts)
    return totals(objective, Batch(*data.collate([data[i] for i in range(len(data))]).values()))


def totals(objective: CachedDistillation, batch: Batch) -> dict[str, float]:
    with torch.no_grad():
        report = objective(batch)
    return {"total": report.total.item(), **{name: value.item() for name, value in report.terms.items()}}


@pytest.mark.parametrize(
    "form, tail, temperature",
    [("topk_logprobs", "ghost", 1.0), ("tail_mass", "ghost", 1.0), ("topk_values", "truncated", 2.0)],
)
def test_loss_is_that_of_the_same_targets_in_shards(student, samples, dataset, form, tail, temperature):
    data = TopKDataset(rows(columns(samples, form)), V)
    found = loss_of(student, data, tail, temperature)
    settings = DistillationTrainingArguments("x", distillation_tail=tail, distillation_temperature=temperature, **QUIET)
    objective = CachedDistillation(student, settings.objective_config(), dataset.facts)
    expected = totals(objective, with_rows(collate(samples, 32)))
    if form == "topk_values":  # of raw logits the mass that is stored is not known
        found.pop("stored_mass"), expected.pop("stored_mass"), found.pop("kl_t1", 0), expected.pop("kl_t1", 0)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-4)
    if form == "topk_values":
        half = loss_of(student, TopKDataset(rows(columns(samples, form, np.float16), "float16"), V), tail, temperature)
        assert half["kl"] == pytest.approx(expected["kl"], rel=2e-3)


def test_masks_labels_and_padding_count_as_in_a_loop_over_tokens(student, samples):
    """Left and right padding, ignored labels, rows of anything where nothing counts; truncated, alpha 1, T = 2."""
    made = columns(samples[:2], "topk_values")
    del made["position_ids"]
    made["labels"], made["attention_mask"], expected = [], [], 0.0
    for row, (left, right) in enumerate(((3, 0), (0, 2))):
        tokens, ids, values = (made[name][row] for name in ("input_ids", "topk_indices", "topk_values"))
        labels = tokens.copy()
        labels[:7] = IGNORED  # a prompt
        with torch.no_grad():
            logits = student(torch.from_numpy(tokens[None]).long()).logits[0].double() / 2
        for t in range(6, len(tokens) - 1):
            p = np.exp(values[t].astype(float) / 2 - np.logaddexp.reduce(values[t].astype(float) / 2))
            q = logits[t].log_softmax(0)[ids[t]].numpy()
            expected += 4 * sum(p[k] * (np.log(p[k]) - q[k]) for k in range(len(p)) if p[k] > 0)
        values, ids = np.pad(values, ((0, 1), (0, 0))), np.pad(ids, ((0, 1), (0, 0)))
        values[:6], ids[0] = np.nan, 10**6  # below positions that do not count
        pad = (left, right)
        made["input_ids"][row], made["labels"][row:] = (
            np.pad(tokens, pad),
            [np.pad(labels, pad, constant_values=IGNORED)],
        )
        made["attention_mask"].append(np.pad(np.ones(len(tokens)), pad))
        made["topk_values"][row], made["topk_indices"][row] = (np.pad(x, (pad, (0, 0))) for x in (values, ids))
    data = TopKDataset(rows({name: [x.astype(x.dtype) for x in xs] for name, xs in made.items()}), V)
    found = loss_of(student, data, "truncated", 2.0)
    assert found["kl"] * 4 == pytest.approx(expected, rel=1e-4)


def test_training_and_evaluation_say_what_the_columns_do_not_tell(prepared, samples, student, tmp_path, capfd):
    """Defaults: ghost at T = 2, which no column has a tail for."""
    made = rows({**columns(samples, "topk_values"), "id": [[n] for n in range(COUNT)]}, "float16")
    args = DistillationTrainingArguments(str(tmp_path), per_device_train_batch_size=2, **QUIET)
    tokenizer = load_tokenizer(prepared / "student-0")
    model = load_model(prepared / "student-0", torch.float32)
    trainer = DistillationTrainer(model, args, made, {"some": made.select(range(5))}, tokenizer)
    said = capfd.readouterr().err
    assert "train_dataset: columns that are not read: id" in said and "rows of the head" not in said
    assert "nothing is known of the tokens outside the 16 stored; distillation_tail=truncated" in said
    before = trainer.evaluate()["eval_some_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_some_kl"] < before
    assert [len(Share(trainer.train_dataset, rank, 4)) for rank in range(4)] == [2] * 4  # type: ignore[arg-type]
    last = trainer.train_dataset.collate([Share(trainer.train_dataset, 3, 4)[1]])  # type: ignore[union-attr, arg-type]
    assert (last["labels"] == IGNORED).all()
    known = rows(columns(samples, "topk_logprobs"))
    data = DistillationTrainer(model, args, known).train_dataset
    said = capfd.readouterr().err
    assert "the tail's mass is known at T = 1 alone, not at T = 2" in said
    assert f"without processing_class all {V} rows of the head" in said
    assert isinstance(data, TopKDataset)
    assert data.supported(args.objective_config().model_copy(update={"temperature": 1.0})).tail == "ghost"
    with pytest.raises(UserError, match="eval_dataset: differs from train_dataset: another capture"):
        DistillationTrainer(model, args, known, made)
    with pytest.raises(UserError, match=r"eval_dataset: a datasets\.Dataset with top-k columns, as train_dataset is"):
        DistillationTrainer(model, args, known, prepared / "data" / "logits" / "holdout")
    with pytest.raises(UserError, match="hybrid needs draws"):
        args = DistillationTrainingArguments(str(tmp_path), distillation_tail="hybrid", **QUIET)
        DistillationTrainer(model, args, made)


def without(*names: str) -> Callable[[dict[str, Any]], Any]:
    return lambda made: [made.pop(name) for name in names]


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, Any]], Any]:
    """The column of row 1 changed."""
    return lambda made: made[name].__setitem__(1, change(made[name][1].copy()))


def at(place: Any, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[place] = value
        return array

    return change


ROW = "train_dataset: row 1, "


@pytest.mark.parametrize(
    "form, change, message",
    [
        (
            "topk_values",
            without("input_ids", "topk_values"),
            "no column input_ids, topk_logprobs or topk_values; it has",
        ),
        ("tail_mass", lambda made: made.update(topk_logprobs=made["topk_values"]), "has topk_logprobs and topk_values"),
        ("topk_values", changed("topk_values", lambda x: x[:-3]), ROW + "topk_values: 29 rows next to 33 input_ids"),
        (
            "topk_values",
            changed("topk_values", lambda x: x[:, :5]),
            ROW + "topk_indices: 32 x 16 next to topk_values of",
        ),
        (
            "topk_values",
            changed("position_ids", lambda x: x[1:]),
            ROW + "position_ids: 32 entries next to 33 input_ids",
        ),
        ("topk_values", changed("position_ids", lambda x: x + 1), ROW + "position_ids: expected 0, 1, 2, …"),
        (
            "topk_values",
            changed("topk_indices", at((3, 2), V)),
            f"topk_indices: id {V} is beyond the vocabulary of {V}",
        ),
        ("topk_values", changed("topk_indices", at((3, slice(2)), 7)), ROW + "topk_indices: an id twice for one token"),
        ("topk_values", changed("input_ids", at(4, V + 3)), f"input_ids: id {V + 3} is beyond the vocabulary of {V}"),
        ("topk_values", changed("topk_values", at((3, 2), np.nan)), ROW + "topk_values: NaN or infinity"),
        ("topk_values", changed("topk_values", at(3, -1e4)), ROW + "topk_values: a token without an entry"),
        (
            "topk_logprobs",
            changed("topk_logprobs", lambda x: x + 2),
            "rename the column to topk_values if it has raw logits",
        ),
        ("tail_mass", changed("tail_mass", at(5, 1.5)), ROW + "tail_mass: 1.5 is no probability below 1"),
        ("tail_mass", changed("tail_mass", lambda x: x[1:]), ROW + "tail_mass: 31 entries next to 32 rows"),
        (
            "topk_values",
            lambda made: made.update(labels=[np.roll(x, -1) for x in made["input_ids"]]),
            "labels are not shifted",
        ),
        (
            "topk_values",
            lambda made: made.update(attention_mask=[at(9, 0)(np.ones_like(x)) for x in made["input_ids"]]),
            "attention_mask: 0 between tokens; padding is at the ends alone",
        ),
    ],
)
def test_bad_columns_are_refused_with_row_and_column(samples, form, change, message):
    made = columns(samples[:2], form)
    change(made)
    with pytest.raises(UserError) as error:
        data = TopKDataset(rows(made), V)
        [data[index] for index in range(2)]
    assert message in str(error.value) and "\n" not in str(error.value)
