"""Stream documents, tokenize and pack them: RUN/data/tokens/train and RUN/data/tokens/holdout.

Documents are assigned to the validation set by a hash of their text, so that no run ever trains on them. They begin
with the tokenizer's BOS token where the tokenizer's own texts do (data.bos) and end with its end token. Killed and
started again, it goes on after the last finished shard and writes what an undisturbed pass would have written: it reads
again the documents that are packed, and refuses to go on when they have changed. The number of workers may differ: they
tokenize, this process reads and packs in the order of the documents.

examples:
  megakd tokenize runs/a
  megakd tokenize runs/a data.workers=8     eight processes next to this one
"""

import argparse

from megakd.config.checks import check_batches
from megakd.data.facts import source_commits
from megakd.data.pipeline import tokenize_part
from megakd.data.templates import set_template, template_of
from megakd.data.tokenizers import bos_of, bos_words, load_tokenizer
from megakd.models.checks import check_isolation, check_models, model_folders, student_identity
from megakd.names import resolve
from megakd.run import Run
from megakd.system.logging import say

SECTIONS = ("model", "data")  # of the configuration


def main(run: Run, args: argparse.Namespace) -> None:
    check_models(run.config)
    model = run.config.model
    if model.student:
        run.record("tokenize", student=student_identity(run).record())
    if run.config.objective.live and model.student:  # the teacher reads the same text in its own way
        folder = run.student_folder
    else:
        folder = resolve(model.teacher, model.revision, weights=False)
    check_batches(run.config)
    tokenizer = load_tokenizer(folder)
    check_isolation(model_folders(model), run.config.data.packing)
    data = run.config.data
    commits = source_commits(run)
    if data.has_chats:
        set_template(tokenizer, data.chat_template)
        template_of(tokenizer)
    if any(origin.format == "text" for origin in data.origins):
        say(f"tokenize: documents begin {bos_words(tokenizer, bos_of(tokenizer, data.bos))} (data.bos={data.bos})")
    for part, budget in (("holdout", data.holdout_tokens), ("train", data.tokens)):
        tokenize_part(run, part, budget, tokenizer, folder, commits)
