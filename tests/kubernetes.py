"""The manifests as they are built, for the tests that look at them."""

import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
MANIFESTS = ROOT / "k8s"
KUBECTL = Path(sys.executable).with_name("kubectl")
OVERLAYS = ("cpu-demo", "gpu")
JOBS = ("prepare", "train", "merge", "evaluate")
STAGES = ("platform", *JOBS, "serve")


@functools.cache
def built(folder: Path) -> str:
    """What `kubectl kustomize` makes of a folder."""
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def overlay(name: str, stage: str) -> str:
    """A stage of an overlay."""
    return built(MANIFESTS / "overlays" / name / stage)


def mixed(folder: Path, stage: str, components: Sequence[str], settings: str = "gpu") -> str:
    """A stage with some components, as an overlay of one's own in `folder` would have it."""
    folder.mkdir()
    manifests = os.path.relpath(MANIFESTS, folder.resolve())
    if stage == "platform":
        last = [f"overlays/{settings}/common"]
    else:
        last = [f"overlays/{settings}/settings", f"components/finish-{'service' if stage == 'serve' else 'job'}"]
    # The queues of a whole cluster have no namespace, which settings would give them.
    behind = [name for name in components if name == "kueue-queues"]
    before = [name for name in components if name not in behind]
    order = [*(f"components/{name}" for name in before), *last, *(f"components/{name}" for name in behind)]
    kustomization = {
        "resources": [f"{manifests}/stages/{stage}"],
        "components": [f"{manifests}/{part}" for part in order],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization, sort_keys=False))
    return built(folder)


def objects(text: str) -> list[dict[str, Any]]:
    """YAML documents as objects."""
    return [document for document in yaml.safe_load_all(text) if document]


def one(text: str, kind: str) -> dict[str, Any]:
    """The one object of a kind."""
    [found] = [item for item in objects(text) if item["kind"] == kind]
    return found


def ray_cluster(text: str) -> dict[str, Any]:
    """The Ray cluster of a RayJob or RayService."""
    [found] = [
        item["spec"].get("rayClusterSpec") or item["spec"]["rayClusterConfig"]
        for item in objects(text)
        if item["kind"] in ("RayJob", "RayService")
    ]
    return found
