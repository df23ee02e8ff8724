"""Rows of a data set on the hub, read again behind the last one where a connection breaks; the commit of a revision."""

import re
import time
from collections.abc import Iterator
from typing import Any

from megakd.errors import UserError, foreign, reason
from megakd.system.logging import say

WAITS = (1, 2, 4, 8, 16)  # seconds before each new attempt to go on with rows of the hub
# what another attempt would meet again: the data is like that, or nobody may read it
LASTING = (ValueError, TypeError, LookupError, ArithmeticError, NotImplementedError, FileNotFoundError, PermissionError)


def hub_rows(
    source: str, subset: str | None, split: str, streaming: bool, revision: str | None
) -> Iterator[dict[str, Any]]:
    """The rows of a hub data set in order.

    When reading fails, it begins again behind the last row that it gave, after 1, 2, 4, 8 and 16 seconds; the fifth
    attempt in a row without a new row is the last one. UserError then, or when another attempt cannot help.
    """
    import datasets

    place = f"data.source: cannot open {source!r} as a file or a hub data set"
    with foreign(place):
        try:
            rows = datasets.load_dataset(source, subset, split=split, streaming=streaming, revision=revision)
        except ConnectionError as error:
            files = "without a network: the path of a .parquet, .jsonl or .txt file, or of a folder of them"
            raise UserError(f"{place}: {reason(error)}; {files}") from error
        except RuntimeError as error:
            if "scripts" not in str(error):
                raise
            raise UserError(
                f"data.source: {source} comes with a script, which is not run; where the hub has its rows as Parquet: "
                "data.revision=refs/convert/parquet"
            ) from error
    given = attempts = 0
    while True:
        try:
            for row in rows.skip(given) if given else rows:
                given, attempts = given + 1, 0
                yield dict(row)
            return
        except Exception as error:
            place = f"data.source: {source}: reading broke off after {given:,} rows: {reason(error)}"
            if isinstance(error, LASTING) or attempts == len(WAITS):
                again = "" if isinstance(error, LASTING) else "; the same command goes on after the last finished shard"
                raise UserError(place + again) from error
            say(f"{place}; trying again in {WAITS[attempts]} s")
        time.sleep(WAITS[attempts])
        attempts += 1


def hub_commit(source: str, revision: str | None) -> str | None:
    """The commit at which a branch or tag of a hub data set is (None: its main branch).

    None when the hub cannot be asked, for there is no network or no such data set; reading it says which.
    """
    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(source, revision=revision, timeout=30).sha
    except Exception:  # every class of error there means the same here
        return None
