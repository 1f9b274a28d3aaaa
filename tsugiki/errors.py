"""Errors for people: what was wrong, where, and what to do."""

from __future__ import annotations


class UserError(Exception):
    """The user's mistake: the command line prints the message without a traceback and exits with 2.

    Args:
        message: what was wrong, with both numbers where there are two.
        where: file, line and field, for example ``qa.jsonl:12 (answer)``.
        hint: what to do about it.
    """

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None):
        self.message, self.where, self.hint = message, where, hint
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.message}" if self.where else self.message
        return f"{head}\n  {self.hint}" if self.hint else head


def raise_problems(problems: list[str], *, what: str, hint: str | None = None, most: int = 20) -> None:
    """Raise one :class:`UserError` that lists every problem found, or return when there is none."""
    if not problems:
        return
    listed = "\n".join(f"  - {p}" for p in problems[:most])
    rest = f"\n  … and {len(problems) - most} more" if len(problems) > most else ""
    raise UserError(f"{what}: {len(problems)} problem(s)\n{listed}{rest}", hint=hint)
