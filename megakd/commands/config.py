"""Print every field of a run's configuration: its path, the values it takes, its default and its meaning.

examples:
  megakd config                    every field
  megakd config optim              one section
  megakd config objective          all kinds of objective
  megakd config --mutable          the fields that may change after `megakd new`
  megakd config --markdown         the page docs/configuration.md
"""

import argparse
import shutil
import textwrap

from megakd.config.describe import markdown, parts
from megakd.errors import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("section", nargs="?", help="a section, like optim (default: all)")
    parser.add_argument("--mutable", action="store_true", help="fields alone that may change after the run was made")
    parser.add_argument("--markdown", action="store_true", help="print docs/configuration.md")


def main(args: argparse.Namespace) -> None:
    if args.markdown and (args.section or args.mutable):
        raise UserError("--markdown prints the whole page: give no section and no --mutable")
    if args.markdown:
        print(markdown(), end="")
        return
    width = max(min(shutil.get_terminal_size().columns, 120), 60)
    found = parts(args.section, args.mutable)
    if not found:
        print(f"{args.section}: no field of this section may change after the run was made")
    for index, part in enumerate(found):
        print(f"{'' if index == 0 else chr(10)}{part.title}: {part.about}")
        for entry in part.entries:
            print(f"  {entry.path} = {entry.default}  ({entry.values}{', mutable' if entry.mutable else ''})")
            print(textwrap.fill(entry.meaning, width, initial_indent="      ", subsequent_indent="      "))
