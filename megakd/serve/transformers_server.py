"""Run `transformers serve` with the classes of students: python -m megakd.serve.transformers_server serve FOLDER.

The server takes a model's class from the module `transformers` by the name in config.json.
"""

import sys

import transformers
from transformers import AutoConfig
from transformers.cli.transformers import app

from megakd.models import student


def main(folder: str) -> None:
    """Run transformers' command line, sys.argv, with the classes that the folder's config.json names."""
    for name in AutoConfig.from_pretrained(folder).architectures or ():
        setattr(transformers, name, getattr(student, name))
    app()


if __name__ == "__main__":
    main(sys.argv[2])
