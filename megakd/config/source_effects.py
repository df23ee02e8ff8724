"""Fields of a data source that have no effect with what it is: rules for data.source and each of data.sources."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from megakd.config.data import SourceFields


class SourceRule(NamedTuple):
    """`fields` have no effect where `when` holds of a source, because its other field `reason`.

    replaced: recipes set them for data.source, so there it is said, not refused.
    """

    fields: tuple[str, ...]
    when: Callable[[SourceFields], bool]
    reason: str
    replaced: bool = False


def names_files(source: SourceFields) -> bool:
    return source.source == "python-docs" or Path(source.source).expanduser().exists()


SOURCE_RULES = (
    SourceRule(("subset",), names_files, "source names files; data sets of the hub alone have it", replaced=True),
    SourceRule(
        ("split",),
        lambda s: names_files(s) and not (Path(s.source).expanduser() / "dataset_dict.json").exists(),
        "source names files; data sets of the hub, and those saved by `datasets`, alone have it",
        replaced=True,
    ),
    SourceRule(("revision",), names_files, "source names files; data sets of the hub alone have revisions"),
    SourceRule(
        ("text_field",),
        lambda s: s.source == "python-docs" or s.source.endswith(".txt"),
        "source is plain text, without fields",
        replaced=True,
    ),
    SourceRule(("text_field",), lambda s: s.format != "text", "format reads conversations", replaced=True),
    SourceRule(("messages_field",), lambda s: s.format != "messages", "format is not messages"),
    SourceRule(
        ("prompt_field", "completion_field"),
        lambda s: s.format != "prompt_completion",
        "format is not prompt_completion",
    ),
    SourceRule(("tools_field",), lambda s: s.format == "text", "format=text has no tools"),
)
