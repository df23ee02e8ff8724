"""UserError: what a user can correct, printed as one line, exit code 2; faults of libraries are turned into it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST_MESSAGE = 2000  # characters; a log line or a terminal shows no more
LONGEST_REASON = 300  # characters of what a library says about a file, a template, …


class UserError(Exception):
    """Says where, what is wrong and what would be right; `megakd.cli` prints it without a traceback.

    A message longer than LONGEST_MESSAGE is cut in its middle, with the number of characters that are missing.
    """

    def __init__(self, message: str):
        super().__init__(shorten(message, LONGEST_MESSAGE))


@contextmanager
def foreign(place: object, remedy: str = "") -> Iterator[None]:
    """Turn whatever a library raises about the user's material into `UserError("PLACE: REASON; REMEDY")`.

        with foreign(path, "convert it to UTF-8"):
            table = pyarrow.parquet.read_table(path)

    The block holds calls of a library on files, names or text of the user and nothing else, for every class of
    exception counts, also Rust's panics, which are no `Exception`. UserError passes, and so do MemoryError, which is
    no fault of the material, and requests to end: KeyboardInterrupt, SystemExit, GeneratorExit.
    """
    try:
        yield
    except (UserError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{place}: {reason(error)}{'; ' if remedy else ''}{remedy}") from error


def reason(error: BaseException) -> str:
    """One line, never empty: the first line of an exception's message, with its class where that says more."""
    if isinstance(error, OSError) and error.strerror:
        return shorten(f"{error.strerror}: {error.filename}" if error.filename else error.strerror, LONGEST_REASON)
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if not line:
        return type(error).__name__
    # "'text'" or "NoneType has no …" alone tell a reader nothing
    unclear = isinstance(error, LookupError | TypeError | AttributeError | AssertionError | StopIteration)
    return shorten(f"{type(error).__name__}: {line}" if unclear else line, LONGEST_REASON)


def shorten(text: str, longest: int) -> str:
    """`text`, its middle replaced by the number of characters that are missing where it is longer than `longest`."""
    if len(text) <= longest:
        return text
    half = (longest - len(" … [1,000,000,000 characters] … ")) // 2
    return f"{text[:half]} … [{len(text) - 2 * half:,} characters] … {text[-half:]}"


def listed(names: Iterable[object], most: int = 8) -> str:
    """Names for a message, separated by commas: the first `most`, then how many more there are."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
