"""A stage of an overlay as Kubernetes objects: shown, or applied."""

from pathlib import Path
from typing import Annotated, Literal

import yaml

from cluster import kubectl
from cluster.config import Config
from cluster.errors import StageError
from cluster.kubectl import Object

StageName = Literal["platform", "prepare", "train", "merge", "evaluate", "serve"]
ENDED = ("Complete", "Failed", "ValidationFailed")
"""RayJobs' jobDeploymentStatus that is the last one."""


class OverlayConfig(Config):
    """Which manifests."""

    overlay: str = "cpu-demo"
    """Folder of k8s/overlays: cpu-demo, gpu, or one of yours."""
    manifests: str = "k8s"
    """Folder of the manifests."""


class RenderConfig(OverlayConfig):
    """Show what `apply` would send to Kubernetes. Needs no cluster."""

    stage: Annotated[StageName, "positional"]
    """platform, prepare, train, merge, evaluate or serve."""


class ApplyConfig(RenderConfig):
    """Apply a stage of an overlay.

    A finished job of the same name is deleted first, for a job runs once; one that runs is left alone. A serve.yaml
    that names another model than the one that is served is refused: that is what rollout is for.
    """

    dry_run: bool = False
    """Have the cluster check everything, and change nothing."""
    other_model: bool = False
    """Serve the model that serve.yaml names, at once, whatever is served now."""


def render(config: RenderConfig) -> None:
    """Print the objects of a stage."""
    print(rendered(config), end="")


def apply(config: ApplyConfig) -> None:
    """Apply the objects of a stage."""
    text = rendered(config)
    for object_ in objects(text):
        if object_["kind"] == "RayJob":
            _make_room(object_, config.dry_run)
        elif object_["kind"] == "Job" and not config.dry_run:
            _remove_ended(object_)
        elif object_["kind"] == "RayService" and not config.other_model:
            _check_model(object_, config)
    dry_run = ["--dry-run=server"] if config.dry_run else []
    # Ray's objects are too large for the annotation that client-side apply keeps. Rollouts change one field of ours.
    command = ["apply", "--server-side", "--force-conflicts", "--field-manager=chatglm3", *dry_run, "--filename=-"]
    print(kubectl.run(*command, stdin=text), end="")


def rendered(config: RenderConfig) -> str:
    """The objects of a stage, as YAML documents."""
    folder = Path(config.manifests) / "overlays" / config.overlay / config.stage
    if not folder.is_dir():
        overlays = ", ".join(sorted(path.name for path in folder.parents[1].glob("*") if path.is_dir()))
        known = f"overlays there are: {overlays}" if overlays else "run this in the checkout, or give --manifests"
        raise StageError(f"{folder}: there is no such folder; {known}")
    return kubectl.run("kustomize", str(folder))


def objects(text: str) -> list[Object]:
    """YAML documents as objects."""
    return [document for document in yaml.safe_load_all(text) if document]


def model_of(service: Object) -> str:
    """The model folder that a RayService's Serve config names."""
    [application] = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    return str(application["args"]["model"])


def _make_room(job: Object, dry_run: bool) -> None:
    name, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
    live = kubectl.find("rayjob", name, "--namespace", namespace)
    if live is None or dry_run:
        return
    if live.get("status", {}).get("jobDeploymentStatus") not in ENDED:
        raise StageError(
            f"{name} has not ended; follow it: python -m cluster wait {name}, "
            f"or end it: kubectl delete rayjob {name} --namespace {namespace}"
        )
    kubectl.run("delete", "rayjob", name, "--namespace", namespace)


def _remove_ended(job: Object) -> None:
    """Delete a Job that has ended: its pods cannot be changed, to another image for example. Ours do no work twice."""
    where = (job["metadata"]["name"], "--namespace", job["metadata"]["namespace"])
    live = kubectl.find("job", *where)
    if live and "True" in [kubectl.condition(live, how) for how in ("Complete", "Failed")]:
        kubectl.run("delete", "job", *where)


def _check_model(service: Object, config: ApplyConfig) -> None:
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    live = kubectl.find("rayservice", name, "--namespace", namespace)
    if live and model_of(live) != model_of(service):
        raise StageError(
            f"{model_of(live)} is served, serve.yaml of {config.overlay} says {model_of(service)}: write the first "
            f"there, or change over with: python -m cluster rollout {model_of(service)} (--other_model: at once)"
        )
