"""Make a run folder from a recipe.

The recipe (a JSON or YAML file, the name of a shipped one, or another run's folder) and the overrides are resolved
once, completed with defaults, checked, and frozen in RUN/config.json; every other verb reads that file alone. A field
that has no effect under the others is refused, or, where something else takes its place, named.
From another run's folder, student, tokens and logits that do not depend on what changed are linked, not made again;
it says which, and of the others what differs. From a checkpoint's folder, training goes on from this checkpoint in the
new run, with the same configuration but for mutable settings; the run that it belongs to stays as it is.

Keys of the systems that MegaKD unites and of Hugging Face's Trainer (loss.alpha, training.learning_rate,
distillation.dataset.name, …) are put under our own, in a file or as overrides; each is said. In YAML 5e-5 is a number,
yes, no, on and off are true and false; Hydra's `defaults` lists are composed from the files in the same folder, and
${a.b} and ${oc.env:NAME,default} are resolved.

examples:
  megakd new runs/a --from demo
  megakd new runs/b --from runs/a objective.alpha=0.0 name=ce-only
  megakd new runs/b --from runs/a/checkpoints/all/step-000500
  megakd new runs/c --from conf/config.yaml training.learning_rate=1e-4
"""

import argparse

from megakd.config.checks import notices
from megakd.run import Run
from megakd.system.logging import say


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder to make")
    parser.add_argument(
        "--from",
        dest="recipe",
        required=True,
        metavar="RECIPE",
        help="JSON or YAML file, shipped name, run or checkpoint folder",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def main(args: argparse.Namespace) -> None:
    run = Run.create(args.recipe, args.overrides, args.run)
    for line in notices(run.config):
        say(f"{run.folder}: {line}")
    say(f"{run.folder}: a new run, {run.config.fingerprint()}")
    say_links(run)


def say_links(run: Run) -> None:
    """What a new run shares with another one, and why it does not share the rest."""
    for event in run.events("link"):
        for name in event["linked"]:
            say(f"{run.folder}: {name}: linked from {event['run']}")
        for name, why in event["not_linked"].items():
            say(f"{run.folder}: {name}: not linked from {event['run']}: {why}")
