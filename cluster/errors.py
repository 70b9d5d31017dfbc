"""The error that is meant for the person who typed the command."""


class StageError(RuntimeError):
    """Something the user can mend: one line that names the file or field and the remedy; exit code 1."""


def last_line(error: Exception) -> str:
    """Of an error of Ray's: what was raised in the worker, below its trace."""
    return str(error).strip().splitlines()[-1]
