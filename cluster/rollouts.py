"""A new model behind the endpoint, checked before and after, and the way back."""

import json
import time
from typing import Annotated, Any

import yaml
from pydantic import Field

from cluster import kubectl
from cluster.config import Config
from cluster.errors import StageError
from cluster.following import NAMESPACE
from cluster.kubectl import Object
from cluster.manifests import model_of

PREVIOUS = "chatglm3/previous-model"
"""Annotation of the RayService: what `rollback` goes back to."""


class RollbackConfig(Config):
    """Serve the model again that was served before the last rollout."""

    service: str = "chat"
    """Name of the RayService."""
    namespace: str = NAMESPACE
    """Where it is."""
    new_cluster: bool = False
    """Start a second Ray cluster and change over when it is ready, with twice the GPUs meanwhile; else replicas are
    replaced in place, some at a time."""
    timeout_s: float = Field(1800, gt=0)
    """How long the model may take to be ready."""
    poll_s: float = Field(5, gt=0)
    """Ask every so many seconds."""


class RolloutConfig(RollbackConfig):
    """Serve another model: check its evaluation, change over, wait until it answers.

    Afterwards, write the model into the overlay's serve.yaml; `apply serve` refuses to go back by mistake.
    """

    model: Annotated[str, "positional"]
    """Folder that merge wrote, as the pods see it: /store/models/v2."""
    evaluation: str = ""
    """Folder that evaluate wrote for this model; unless given, the one of the model's name: /store/evaluations/v2. One
    whose gate did not pass is refused."""
    unevaluated: bool = False
    """Do without."""


def rollout(config: RolloutConfig) -> None:
    """Change the served model, and wait until the new one answers."""
    service = _service(config)
    if model_of(service) == config.model:
        print(f"rollout: {config.model} is what {config.service} serves already; nothing to do")
        return
    head = _head(service, config)
    _check_model(head, config)
    if not config.unevaluated:
        _check_evaluation(head, config)
    _change_over(service, config.model, config)
    print(f"rollout: {config.model} answers; back to {model_of(service)}: python -m cluster rollback")


def rollback(config: RollbackConfig) -> None:
    """Change back, and wait until the earlier model answers."""
    service = _service(config)
    previous = service["metadata"].get("annotations", {}).get(PREVIOUS)
    if not previous:
        raise StageError(f"nothing was rolled out to {config.service} before; name a model: python -m cluster rollout")
    _change_over(service, previous, config)
    print(f"rollback: {previous} answers again; write it into the overlay's serve.yaml")


def _change_over(service: Object, model: str, config: RollbackConfig) -> None:
    _patch(service, model, config)
    print(f"{config.service}: {model_of(service)} -> {model}", flush=True)
    deadline, told = time.monotonic() + config.timeout_s, ""
    while why_not := _not_ready(model, config):
        if why_not != told:
            print(f"{config.service}: {why_not}", flush=True)
            told = why_not
        if time.monotonic() > deadline or "DEPLOY_FAILED" in why_not:
            raise StageError(f"{model} does not answer: {why_not}; go back with: python -m cluster rollback")
        time.sleep(config.poll_s)


def _patch(service: Object, model: str, config: RollbackConfig) -> None:
    text = service["spec"]["serveConfigV2"]
    serve = yaml.safe_load(text)
    serve["applications"][0]["args"]["model"] = model
    changes: list[Object] = [
        {"op": "test", "path": "/spec/serveConfigV2", "value": text},  # somebody else's rollout meanwhile
        {"op": "replace", "path": "/spec/serveConfigV2", "value": yaml.safe_dump(serve, sort_keys=False)},
        _annotate(service["metadata"], "/metadata", PREVIOUS, model_of(service)),
    ]
    if config.new_cluster:  # any change of its pods makes KubeRay start another
        head = "/spec/rayClusterConfig/headGroupSpec/template/metadata"
        template = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"].get("metadata", {})
        changes.append(_annotate(template, head, "chatglm3/model", model))
    where = ["rayservice", config.service, "--namespace", config.namespace]
    kubectl.run("patch", *where, "--type=json", "--field-manager=chatglm3", "--patch", json.dumps(changes))


def _annotate(metadata: Object, path: str, name: str, value: str) -> Object:
    annotations = {**metadata.get("annotations", {}), name: value}
    return {"op": "add", "path": f"{path}/annotations", "value": annotations}


def _not_ready(model: str, config: RollbackConfig) -> str:
    """What the service is still waiting for; "" once `model` answers."""
    try:
        return _waits_for(model, config)
    except StageError as error:  # a head that is about to start refuses commands
        return str(error)


def _waits_for(model: str, config: RollbackConfig) -> str:
    service = _service(config)
    state = service.get("status", {})
    if state.get("observedGeneration", 0) < service["metadata"].get("generation", 0):
        return "the operator has not seen the change yet"
    if pending := (state.get("pendingServiceStatus") or {}).get("rayClusterName"):
        return f"the new cluster {pending} is not ready"
    if kubectl.condition(service, "Ready") != "True":
        return "the service is not ready"
    head = _head(service, config)
    if deployed_model(_on(head, config, "serve", "config")) != model:
        return "Ray Serve has not got the change yet"
    application = next(iter(yaml.safe_load(_on(head, config, "serve", "status"))["applications"].values()))
    if application["status"] != "RUNNING":
        return f"{application['status']} {' '.join(application.get('message', '').split())[-300:]}".strip()
    _on(head, config, "wget", "-q", "-O-", "http://localhost:8000/healthz")
    return ""


def deployed_model(shown: str) -> str:
    """The model of the first application that `serve config` shows; "" as long as there is none."""
    application = next(yaml.safe_load_all(shown), None)  # each one is a document, and none a sentence
    return str(application["args"]["model"]) if isinstance(application, dict) else ""


def _check_model(head: str, config: RolloutConfig) -> None:
    receipt = _receipt(head, config.model, config)
    if receipt is None or receipt["stage"] != "merge":
        raise StageError(f"{config.model} on the cluster was not written by merge; correct the path, or run merge")


def _check_evaluation(head: str, config: RolloutConfig) -> None:
    folder = config.evaluation or config.model.replace("/models/", "/evaluations/")
    remedy = "evaluate it (python -m cluster apply evaluate), name its --evaluation, or give --unevaluated"
    receipt = _receipt(head, folder, config)
    if receipt is None or receipt["stage"] != "evaluate":
        raise StageError(f"{config.model} was not evaluated in {folder}; {remedy}")
    if receipt["config"]["model"] != config.model:
        raise StageError(f"{folder} is about {receipt['config']['model']}, not {config.model}; {remedy}")
    weighed = receipt["inputs"].get(config.model.rstrip("/"))
    if weighed != _on(head, config, "sha256sum", f"{config.model}/receipt.json").split()[0]:
        raise StageError(f"{config.model} was merged again since its evaluation in {folder}; {remedy}")
    match receipt["facts"].get("gate_passed"):
        case False:
            raise StageError(f"{config.model} is worse than {receipt['config']['gate']}, says {folder}/report.html")
        case None:
            print(f"rollout: {folder} had no gate: nothing says whether {config.model} is worse than the one before")


def _receipt(head: str, folder: str, config: RolloutConfig) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(_on(head, config, "cat", f"{folder}/receipt.json"))
    except (StageError, ValueError):
        return None
    return found


def _service(config: RollbackConfig) -> Object:
    found = kubectl.find("rayservice", config.service, "--namespace", config.namespace)
    if found is None:
        raise StageError(
            f"there is no service {config.service} in {config.namespace}; start it: python -m cluster apply serve"
        )
    return found


def _head(service: Object, config: RollbackConfig) -> str:
    cluster = (service.get("status", {}).get("activeServiceStatus") or {}).get("rayClusterName", "")
    selector = f"--selector=ray.io/cluster={cluster},ray.io/node-type=head"
    pods = kubectl.find_all("pods", selector, "--namespace", config.namespace) if cluster else []
    if not pods:
        raise StageError(f"{config.service} has no head pod; look at: python -m cluster status")
    return str(pods[0]["metadata"]["name"])


def _on(head: str, config: RollbackConfig, *command: str) -> str:
    return kubectl.run("exec", head, "--container=ray-head", "--namespace", config.namespace, "--", *command)
