"""UserError: a mistake the user can mend, printed as one line, exit code 2."""


class UserError(Exception):
    """Says where, what is wrong and what would be right; `megakd.cli` prints it without a traceback."""
