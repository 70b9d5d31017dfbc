"""Is a Kubernetes cluster ready for an overlay? Every check that fails says what to do."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from importlib.metadata import version
from typing import Any, get_args

from cluster import kubectl
from cluster.errors import StageError
from cluster.kubectl import Object
from cluster.manifests import OverlayConfig, RenderConfig, StageName, objects, rendered

OLDEST, NEWEST = (1, 31), (1, 37)
"""Kubernetes versions that the manifests are checked against."""
OPERATOR = "1.7"
GPU = "nvidia.com/gpu"
EXTENSIONS = ("ray.io", "kueue.x-k8s.io", "monitoring.coreos.com", "gateway.networking.k8s.io")
ONE_NODE_ONLY = ("rancher.io/local-path", "ebs.csi.aws.com", "pd.csi.storage.gke.io", "disk.csi.azure.com")
QUOTED = {"requests.cpu": "cpu", "requests.memory": "memory", f"requests.{GPU}": GPU}
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
INSTALL = "helm upgrade --install kuberay-operator, as the head of k8s/operator/values.yaml says"
CRDS = "the command is at the head of k8s/operator/values.yaml"


class DoctorConfig(OverlayConfig):
    """Look for what would keep an overlay from running on this cluster, and say what to do about each."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    subject: str
    is_well: bool
    text: str
    """What is so or, if it is not well, what is wrong and the remedy."""


def doctor(config: DoctorConfig) -> None:
    """Print what every check found; raises StageError if one failed."""
    needed = {
        stage: objects(rendered(RenderConfig(stage=stage, **config.model_dump()))) for stage in get_args(StageName)
    }
    failed = 0
    for finding in _checks(needed):
        failed += not finding.is_well
        print(f"{'ok  ' if finding.is_well else 'BAD '}{finding.subject}: {finding.text}", flush=True)
    if failed:
        raise StageError(f"{failed} of these would keep {config.overlay} from running; each line says what to do")


def _checks(needed: dict[str, list[Object]]) -> Iterator[Finding]:
    yield _kubernetes()
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "operator": lambda: _operator(needed),
        "CRDs": lambda: [_crds(needed)],
        "Ray versions": lambda: [_ray_versions(needed)],
        "GPUs": lambda: [_gpus(needed)],
        "storage": lambda: [_storage(needed["platform"])],
        "quota": lambda: _quota(needed),
        "secrets": lambda: _secrets(needed),
        "auth": lambda: [_auth(needed)],
    }
    for subject, check in checks.items():
        try:
            yield from check()
        except StageError as error:  # who has rights in one namespace alone may not look at nodes
            yield Finding(subject, False, f"cannot be looked at: {error}")


def _kubernetes() -> Finding:
    found = json.loads(kubectl.run("version", "-o", "json"))["serverVersion"]
    minor = (int(found["major"]), int(re.sub(r"\D", "", found["minor"])))
    tested = f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
    is_well = OLDEST <= minor <= NEWEST
    remedy = "" if is_well else f"; these manifests are checked against {tested}: upgrade, or try --dry_run first"
    return Finding("Kubernetes", is_well, f"{found['gitVersion']}{remedy}")


def _operator(needed: dict[str, list[Object]]) -> Iterator[Finding]:
    found = kubectl.find_all("deployments", "--all-namespaces", "--selector=app.kubernetes.io/name=kuberay-operator")
    if not found:
        yield Finding("operator", False, f"KubeRay is not installed: {INSTALL}")
        return
    container = found[0]["spec"]["template"]["spec"]["containers"][0]
    tag = container["image"].rsplit(":", 1)[-1].removeprefix("v")
    if not tag.startswith(OPERATOR):
        yield Finding("operator", False, f"KubeRay {tag}, but {OPERATOR} is needed: {INSTALL}")
    elif not found[0].get("status", {}).get("readyReplicas"):
        where = found[0]["metadata"]["namespace"]
        yield Finding("operator", False, f"is not ready: kubectl describe deployment kuberay-operator -n {where}")
    else:
        yield Finding("operator", True, f"KubeRay {tag}")
    if any(kind["kind"] == "RayCronJob" for stage in needed.values() for kind in stage):
        gates = " ".join([*container.get("args", []), *container.get("command", [])])
        is_well = "RayCronJob=true" in gates
        text = "RayCronJob=true" if is_well else f"RayCronJob is off, and nothing would start at night: {INSTALL}"
        yield Finding("feature gates", is_well, text)


def _crds(needed: dict[str, list[Object]]) -> Finding:
    kinds = {
        (part["kind"].lower(), part["apiVersion"].partition("/")[0]) for stage in needed.values() for part in stage
    }
    wanted = {f"{kind}s.{group}" for kind, group in kinds if group in EXTENSIONS}
    found = {item["metadata"]["name"]: item for item in kubectl.find_all("customresourcedefinitions")}
    if missing := sorted(wanted - set(found)):
        return Finding("CRDs", False, f"{', '.join(missing)} not installed; of Ray's: {CRDS}")
    if "authOptions" not in json.dumps(found["rayjobs.ray.io"]):
        return Finding("CRDs", False, f"are older than the operator, for helm leaves them as they are: {CRDS}")
    return Finding("CRDs", True, ", ".join(sorted(wanted)))


def _ray_versions(needed: dict[str, list[Object]]) -> Finding:
    clusters = [cluster for stage in needed.values() for cluster in _clusters(stage)]
    asked, here = {cluster["rayVersion"] for cluster in clusters}, version("ray")
    images = {pod["containers"][0]["image"] for cluster in clusters for pod, _ in _pods(cluster)}
    if asked != {here}:
        text = f"the manifests say {', '.join(sorted(asked))}, the code is tested with {here}: k8s/pods/pods.yaml"
        return Finding("Ray versions", False, text)
    if len(images) > 1:
        text = f"head and workers must run one image, these are {', '.join(sorted(images))}: `images` of the overlay"
        return Finding("Ray versions", False, text)
    return Finding("Ray versions", True, f"{here} everywhere, in {images.pop()}")


def _gpus(needed: dict[str, list[Object]]) -> Finding:
    wanted = {stage: _asked(parts, GPU) for stage, parts in needed.items()}
    stage = max(wanted, key=lambda name: wanted[name])
    nodes = kubectl.find_all("nodes")
    have = sum(_amount(node["status"].get("allocatable", {}).get(GPU, "0")) for node in nodes)
    text = f"{have} on {len(nodes)} nodes, {stage} takes up to {wanted[stage]}"
    if wanted[stage] > have:
        lacks = "the device plugin or GPU operator, or nodes that an autoscaler adds when asked"
        return Finding("GPUs", False, f"{text}; what is missing is {lacks}, or lower workers and max_replicas")
    return Finding("GPUs", True, text if wanted[stage] else "none needed")


def _storage(platform: list[Object]) -> Finding:
    [claim] = [part for part in platform if part["kind"] == "PersistentVolumeClaim"]
    name, namespace = claim["metadata"]["name"], claim["metadata"]["namespace"]
    live = kubectl.find("persistentvolumeclaim", name, "--namespace", namespace)
    if live and live["status"]["phase"] == "Bound":
        return Finding("storage", True, f"{name} is bound to {live['spec']['volumeName']}")
    classes = kubectl.find_all("storageclasses")
    asked = claim["spec"].get("storageClassName")
    chosen = [item for item in classes if item["metadata"]["name"] == asked or (not asked and _is_default(item))]
    if not chosen:
        names = ", ".join(item["metadata"]["name"] for item in classes) or "none"
        missing = f"there is no class {asked}" if asked else "no storage class is the default"
        return Finding("storage", False, f"{missing}; give {name} one of these (storageClassName): {names}")
    provisioner = chosen[0]["provisioner"]
    if "ReadWriteMany" in claim["spec"]["accessModes"] and provisioner in ONE_NODE_ONLY:
        text = f"{name} must be shared by nodes, {provisioner} cannot; choose a class of NFS, EFS, Filestore or CephFS"
        return Finding("storage", False, text)
    return Finding("storage", True, f"{name} will be made by {provisioner}")


def _quota(needed: dict[str, list[Object]]) -> Iterator[Finding]:
    [namespace] = {part["metadata"]["name"] for part in needed["platform"] if part["kind"] == "Namespace"}
    if kubectl.find("namespace", namespace) is None:
        return
    for quota in kubectl.find_all("resourcequotas", "--namespace", namespace):
        status = quota.get("status", {})
        for resource, limit in status.get("hard", {}).items():
            if resource not in QUOTED:
                continue
            free = _amount(limit) - _amount(status.get("used", {}).get(resource, "0"))
            wanted = {stage: _asked(parts, QUOTED[resource]) for stage, parts in needed.items() if stage != "platform"}
            short = [f"{stage} takes up to {amount}" for stage, amount in wanted.items() if amount > free]
            text = f"{resource} has {free} of {limit} left"
            if short:
                text += f", {'; '.join(short)}: raise it in the overlay's platform, or end what runs"
            yield Finding(f"quota {quota['metadata']['name']}", not short, text)


def _secrets(needed: dict[str, list[Object]]) -> Iterator[Finding]:
    for name, namespace in sorted({found for stage in needed.values() for found in _secret_names(stage)}):
        if kubectl.find("secret", name, "--namespace", namespace):
            yield Finding(f"secret {name}", True, f"is in {namespace}")
        else:
            text = f"is not in {namespace}: make it, as the head of the component that uses it says (k8s/components)"
            yield Finding(f"secret {name}", False, text)


def _auth(needed: dict[str, list[Object]]) -> Finding:
    open_to_all = [
        stage
        for stage, parts in needed.items()
        if any(cluster.get("authOptions", {}).get("mode") != "token" for cluster in _clusters(parts))
    ]
    if open_to_all:
        text = f"whoever reaches the Ray ports of {', '.join(open_to_all)} runs code there: add components/token-auth"
        return Finding("auth", False, text)
    return Finding("auth", True, "Ray asks for a token")


def _clusters(parts: list[Object]) -> Iterator[Object]:
    for part in parts:
        spec = part.get("spec", {})
        spec = spec.get("jobTemplate", spec) if part["kind"] == "RayCronJob" else spec
        if cluster := spec.get("rayClusterSpec") or spec.get("rayClusterConfig"):
            yield cluster


def _pods(cluster: Object) -> Iterator[tuple[Object, int]]:
    """Pod specs of a Ray cluster, and how many of each there are at most."""
    yield cluster["headGroupSpec"]["template"]["spec"], 1
    for group in cluster["workerGroupSpecs"]:
        yield group["template"]["spec"], group["maxReplicas"]


def _asked(parts: list[Object], resource: str) -> Decimal:
    """What the Ray clusters of a stage request of a resource at most."""
    pods = [found for cluster in _clusters(parts) for found in _pods(cluster)]
    return sum((_amount(_requests(pod).get(resource, "0")) * count for pod, count in pods), Decimal(0))


def _requests(pod: Object) -> dict[str, Any]:
    requests: dict[str, Any] = pod["containers"][0]["resources"]["requests"]
    return requests


def _amount(quantity: str) -> Decimal:
    """A Kubernetes quantity as a number."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", quantity).groups()  # type: ignore[union-attr]
    return Decimal(number) / 1000 if unit == "m" else Decimal(number) * UNITS.get(unit, 1)


def _is_default(storage_class: Object) -> bool:
    annotations = storage_class["metadata"].get("annotations", {})
    return bool(annotations.get("storageclass.kubernetes.io/is-default-class") == "true")


def _secret_names(value: Any, namespace: str = "") -> Iterator[tuple[str, str]]:
    """(name, namespace) of every Secret that objects refer to."""
    if isinstance(value, list):
        for item in value:
            yield from _secret_names(item, namespace)
    elif isinstance(value, dict):
        namespace = value.get("metadata", {}).get("namespace") or namespace
        for key, inner in value.items():
            if key in ("secretKeyRef", "secretRef"):
                yield inner["name"], namespace
            elif key == "secretName":
                yield inner, namespace
            elif key == "imagePullSecrets":
                yield from ((secret["name"], namespace) for secret in inner)
            else:
                yield from _secret_names(inner, namespace)
