"""What a check of the environment found, and all checks as one table."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from megakd.errors import reason
from megakd.system.text import table

OK, WARN, FAULT = "ok", "warn", "fault"


class Finding(NamedTuple):
    """mark: ok; warn: works, but slowly or with a risk; fault: a verb fails or hangs. remedy: what the user can do."""

    mark: str
    check: str
    found: str
    remedy: str = ""


def ok(check: str, found: str) -> Finding:
    return Finding(OK, check, found)


def warn(check: str, found: str, remedy: str) -> Finding:
    return Finding(WARN, check, found, remedy)


def fault(check: str, found: str, remedy: str) -> Finding:
    return Finding(FAULT, check, found, remedy)


Check = Callable[[], Iterable[Finding]]


def examine(checks: Sequence[tuple[str, Check]]) -> list[Finding]:
    """The findings of all checks in their order; they run at the same time, for most wait for another process."""
    with ThreadPoolExecutor(len(checks)) as pool:
        return [finding for each in pool.map(_findings, checks) for finding in each]


def _findings(named: tuple[str, Check]) -> list[Finding]:
    """One check that fails itself must not hide what the others found."""
    name, check = named
    try:
        return list(check())
    except Exception as error:
        return [warn(name, f"not examined: {reason(error)}", "check it by hand")]


def as_text(findings: Sequence[Finding]) -> str:
    """The table, and how many findings have which mark."""
    text = table(["", "check", "found", "remedy"], [list(finding) for finding in findings], left=True)
    faults, warnings = (sum(each.mark == mark for each in findings) for mark in (FAULT, WARN))
    return f"{text}\n\n{_count(faults, 'fault')}, {_count(warnings, 'warning')}"


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"
