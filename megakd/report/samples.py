"""Greedy continuations of held-out text by the teacher and the last student, kept in RUN/samples.json.

Of text the prompt is the beginning of a document. Of conversations it is what stands before the assistant's first
answer, in the tokens that the chat template made of it.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from megakd.data.records import Sample
from megakd.data.shards import ShardSet
from megakd.data.tokenizers import load_tokenizer
from megakd.errors import UserError, foreign
from megakd.evals.evaluate import named
from megakd.evals.measure import Subject
from megakd.models.loading import load_model
from megakd.names import resolve
from megakd.run import Run
from megakd.system.dist import read_world
from megakd.system.files import read_json, write_json
from megakd.system.logging import say

PROMPT, CONTINUATION = 48, 64  # tokens; of a short document at most half is the prompt
SHORTEST = 16  # tokens of a prompt that begins with its document


def text_samples(run: Run, count: int | None = None) -> list[dict[str, Any]]:
    """[{"prompt", "continuations": {model: text}}]: those that are kept, or `count` of the last student.

    Models run only where the kept ones are of another student, or too few.
    """
    file = run.path("samples.json")
    kept = read_json(file) if file.exists() else {"student": None, "samples": []}
    if count is None:
        return kept["samples"]
    if count < 0:
        raise UserError(f"--samples {count}: give how many")
    student = _last(run)
    if kept["student"] != student.name or len(kept["samples"]) < count:
        kept = {"student": student.name, "samples": _generate(run, student, count)}
        write_json(file, kept)
    return kept["samples"][:count]


def _last(run: Run) -> Subject:
    """The last checkpoint, or the student before training where there is none."""
    started = any(run.path("checkpoints").glob("*/step-*/progress.json"))
    return named(run, "last" if started else "student-0")


class Prompt(NamedTuple):
    """What a model continues: text, or of a conversation the tokens of that text and the one that ends an answer."""

    text: str
    ids: list[int] | None = None
    closing: int | None = None


def _generate(run: Run, student: Subject, count: int) -> list[dict[str, Any]]:
    holdout = ShardSet(run.path("data", "tokens", "holdout"))
    own = load_tokenizer(run.student_folder)
    chosen = sorted({len(holdout) * i // count for i in range(count)}) if count else []
    prompts = [(chat_prompt if holdout.masked else _text_prompt)(own, holdout[index]) for index in chosen]
    samples: list[dict[str, Any]] = [{"prompt": prompt.text, "continuations": {}} for prompt in prompts]
    teacher = resolve(run.config.model.teacher, run.config.model.revision)
    for name, folder, tokenizer in (
        ("teacher", teacher, load_tokenizer(teacher)),
        (f"student, {student.name}", student.folder, own),
    ):
        model = load_model(folder, getattr(torch, run.config.model.dtype)).eval().to(read_world().device)
        for sample, prompt in zip(samples, prompts, strict=True):
            with foreign(f"{folder}: text samples"):
                sample["continuations"][name] = _continue(model, tokenizer, prompt)
        say(f"report: {len(samples)} text samples of {name}")
        del model  # before the next one is loaded
    return samples


def _text_prompt(tokenizer: Any, sample: Sample) -> Prompt:
    tokens = sample.tokens
    whole = [int(at) for at in sample.starts[1:] if len(tokens) - at >= 2 * SHORTEST]  # documents that begin here
    tokens = tokens[whole[0] :] if whole else tokens
    return Prompt(tokenizer.decode(tokens[: max(1, min(PROMPT, len(tokens) // 2))], skip_special_tokens=True))


def chat_prompt(tokenizer: Any, sample: Sample) -> Prompt:
    """The beginning of a sequence's first conversation, up to the assistant's first answer."""
    assert sample.mask is not None and sample.label_count, sample.key
    begin = int(np.flatnonzero(sample.mask)[0]) + 1  # the label at t is token t + 1
    rest = np.flatnonzero(~sample.mask[begin - 1 :])
    end = begin + int(rest[0]) if len(rest) else len(sample.tokens)
    ids = sample.tokens[:begin].tolist()
    return Prompt(tokenizer.decode(ids), ids, int(sample.tokens[end - 1]))


@torch.no_grad()
def _continue(model: Any, tokenizer: Any, prompt: Prompt) -> str:
    from transformers import GenerationConfig

    ids = tokenizer(prompt.text).input_ids if prompt.ids is None else prompt.ids
    inputs = torch.tensor([ids], device=model.device)
    end = tokenizer.eos_token_id
    stop = end if prompt.closing is None else [end, prompt.closing]
    greedy = GenerationConfig(max_new_tokens=CONTINUATION, do_sample=False, eos_token_id=stop, pad_token_id=end)
    tokens = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=greedy)
    return tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True)
