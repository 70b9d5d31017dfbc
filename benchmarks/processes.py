"""Processes by their command lines, to watch or to kill in benchmarks and tests; one that has ended is not found."""

from contextlib import suppress

import psutil


def below(pid: int, words: str = "") -> list[psutil.Process]:
    """The processes below a process whose command line holds `words`, newest last."""
    with suppress(psutil.Error):
        found = psutil.Process(pid).children(recursive=True)
        return sorted((p for p in found if words in command_line(p)), key=lambda process: process.create_time())
    return []


def command_line(process: psutil.Process) -> str:
    """Its words with spaces between; empty if it has ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def end_tree(pid: int) -> None:
    """SIGKILL to a process and all below it."""
    with suppress(psutil.NoSuchProcess):
        for process in [*below(pid), psutil.Process(pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
