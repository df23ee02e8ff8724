"""Lines for the person at the terminal, and a progress line with rate and ETA."""

import sys
import time

from megakd.system.text import clock, short


def say(message: str) -> None:
    """One line for the person at the terminal."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


class Progress:
    """`generate-logits  34%  120k/350k tokens  5.3k tokens/s  ETA 0:42`, redrawn on a terminal, else a line every 10 s.

    done: what was finished before (a resumed pass), which does not count for the rate.
    own: what this process has to do itself (default: all the rest); rate and ETA are about that.
    """

    def __init__(
        self, name: str, total: float, unit: str, done: float = 0, quiet: bool = False, own: float | None = None
    ):
        self.name, self.total, self.unit, self.quiet = name, max(total, 1), unit, quiet
        self.done = self.before = done
        self.own = total - done if own is None else own
        self.start = self.shown = time.perf_counter()
        self.terminal = sys.stderr.isatty()

    def update(self, count: float, note: str = "") -> None:
        self.done += count
        now = time.perf_counter()
        if not self.quiet and now - self.shown >= (0.2 if self.terminal else 10):
            self.shown = now
            sys.stderr.write(("\r\x1b[K" if self.terminal else "") + self.line(note) + ("" if self.terminal else "\n"))
            sys.stderr.flush()

    def add_others(self, count: float) -> None:
        """Count what other processes did."""
        self.done += count
        self.before += count

    def line(self, note: str = "") -> str:
        seconds, mine = max(time.perf_counter() - self.start, 1e-9), self.done - self.before
        rate = mine / seconds
        eta = clock(max(self.own - mine, 0) / rate) if rate > 0 else "?"
        counts = f"{short(self.done)}/{short(self.total)} {self.unit}"
        share = min(self.done / self.total, 1)
        return f"{self.name}  {share:4.0%}  {counts}  {short(rate)} {self.unit}/s  ETA {eta}  {note}".rstrip()

    def close(self, note: str = "") -> None:
        if not self.quiet:
            seconds = time.perf_counter() - self.start
            mine = self.done - self.before
            of_all = f" of {short(self.done)}" if self.before else ""  # the others: earlier, or by other processes
            rate = short(mine / max(seconds, 1e-9))
            counts = f"{short(mine)}{of_all} {self.unit} in {clock(seconds)}, {rate} {self.unit}/s"
            sys.stderr.write(("\r\x1b[K" if self.terminal else "") + f"{self.name}: {counts}  {note}".rstrip() + "\n")
            sys.stderr.flush()
