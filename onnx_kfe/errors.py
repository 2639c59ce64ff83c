"""The errors a user can cause, each one line that says what to do, with the exit code of the command line."""

__all__ = ["BudgetError", "KfeError", "UsageError"]


class KfeError(Exception):
    """Something about the model, the data or the machine stops the work. The message is one line for the user."""

    exit_code = 1


class UsageError(KfeError, ValueError):
    """An option or argument cannot be what it is."""

    exit_code = 2


class BudgetError(KfeError):
    """The stated budget or quality floor cannot be met; the message says what can."""

    exit_code = 3
