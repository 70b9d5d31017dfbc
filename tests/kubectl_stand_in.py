"""A kubectl for tests: writes down what it is asked, and answers from a script; `kustomize` is the real one's.

As a program: `kubectl ...`, with its folder in $STAND_IN. answers.json there maps the beginning of a command to a list
of answers, given in turn, the last one for ever. An answer is an object or text for stdout, or {"error": TEXT}.
"""

import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.kubernetes import KUBECTL


class StandIn:
    """The test's side of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers: dict[str, list[Any]] = {}
        program = folder / "kubectl"
        root = Path(__file__).resolve().parents[1]
        program.write_text(f'#!/bin/sh\nPYTHONPATH={root} exec {sys.executable} {__file__} "$@"\n')
        program.chmod(0o755)

    def answer(self, command: str, *answers: Any) -> None:
        """Have commands that begin with `command` answered so."""
        self.answers[command] = list(answers)
        (self.folder / "answers.json").write_text(json.dumps(self.answers))

    def asked(self, verb: str = "") -> list[str]:
        """The commands so far that begin with a verb."""
        log = self.folder / "log.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [line["command"] for line in lines if line["command"].startswith(verb)]

    def sent(self, verb: str) -> str:
        """What the last command that begins with a verb was given on stdin."""
        lines = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
        return str([line["stdin"] for line in lines if line["command"].startswith(verb)][-1])


def main(words: list[str], folder: Path) -> int:
    """Answer one command."""
    command = " ".join(words)
    stdin = sys.stdin.read() if "--filename=-" in words else ""
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps({"command": command, "stdin": stdin}) + "\n")
    if words[0] == "kustomize":
        os.execv(KUBECTL, ["kubectl", *words])
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # `logs --follow` asks beside the others
        answer = next_answer(command, folder / "answers.json")
    if isinstance(answer, dict) and "error" in answer:
        print(answer["error"], file=sys.stderr)
        return 1
    print(answer if isinstance(answer, str) else json.dumps(answer))
    return 0


def next_answer(command: str, file: Path) -> Any:
    """What the script has for a command; it is given once, unless it is the last one."""
    answers = json.loads(file.read_text()) if file.exists() else {}
    known = max((key for key in answers if command.startswith(key)), key=len, default=None)
    if known is None:
        return ""
    if len(answers[known]) == 1:
        return answers[known][0]
    answer = answers[known].pop(0)
    file.write_text(json.dumps(answers))
    return answer


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Path(os.environ["STAND_IN"])))
