"""Jobs on the cluster followed to their end, and everything that is there at a glance."""

import math
import subprocess
import sys
import time
from typing import Annotated

from pydantic import Field

from cluster import kubectl
from cluster.config import Config
from cluster.errors import StageError
from cluster.kubectl import Object
from cluster.manifests import ENDED, model_of

NAMESPACE = "chatglm3"
PATIENCE_S = 300
"""How long the API server may be away from somebody who waits for a job."""


class WaitConfig(Config):
    """Follow a job to its end, with its output. The exit code is 0 if it succeeded, else 1."""

    job: Annotated[str, "positional"]
    """Its name: prepare, train, merge or evaluate."""
    namespace: str = NAMESPACE
    """Where it is."""
    timeout_s: float = Field(0, ge=0)
    """Give up after so many seconds; the job goes on. 0: never."""
    poll_s: float = Field(5, gt=0)
    """Ask for its state every so many seconds."""


class StatusConfig(Config):
    """What runs and what has ended: jobs, the endpoint, and pods that wait."""

    namespace: str = NAMESPACE
    """Where to look."""


def wait(config: WaitConfig) -> None:
    """Follow a RayJob until it has succeeded; raises StageError where it has not."""
    started, told, logs, followed = time.monotonic(), "", None, ""
    seen = started
    while True:
        job = _find_patiently(config) if told else kubectl.find("rayjob", config.job, "--namespace", config.namespace)
        if job is None:
            raise StageError(
                f"there is no job {config.job} in {config.namespace}; start it: python -m cluster apply {config.job}"
            )
        state = job.get("status", {})
        if (line := describe_job(job)) != told:
            print(told := line, flush=True)
        if state.get("jobDeploymentStatus") == "Running":
            # Each retry has a new id, and a new pod that submits it.
            if state.get("jobId", "") != followed:
                logs, followed = _follow(config), state.get("jobId", "")
            elif logs and logs.poll():  # the connection broke: better that a line comes twice than not at all
                logs = _follow(config, f"--since={math.ceil(time.monotonic() - seen) + 1}s")
            seen = time.monotonic()
        if state.get("jobDeploymentStatus") in ENDED:
            break
        if config.timeout_s and time.monotonic() - started > config.timeout_s:
            _end(logs, 0)
            raise StageError(f"{line} after {config.timeout_s:g} s; it goes on, and so does: cluster wait {config.job}")
        time.sleep(config.poll_s)
    _end(logs, 15)
    if state["jobDeploymentStatus"] != "Complete" or state.get("jobStatus") != "SUCCEEDED":
        raise StageError(_why(job, config))


def _find_patiently(config: WaitConfig) -> Object | None:
    """The job; the API server may be away meanwhile, as in an upgrade: the job goes on without it."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            return kubectl.find("rayjob", config.job, "--namespace", config.namespace)
        except StageError as error:
            if time.monotonic() > until:
                raise
            print(f"{config.job}: asking again, {error}", file=sys.stderr, flush=True)
            time.sleep(config.poll_s)


def status(config: StatusConfig) -> None:
    """Print a line for each job, service and waiting pod."""
    where = ("--namespace", config.namespace)
    lines = [describe_job(job) for job in kubectl.find_all("rayjobs", *where)]
    lines += [line for service in kubectl.find_all("rayservices", *where) for line in describe_service(service)]
    for pod in kubectl.find_all("pods", *where, "--field-selector=status.phase=Pending"):
        lines.append(f"pod {pod['metadata']['name']} waits: {_why_pending(pod)}")
    print("\n".join(lines) or f"nothing runs in {config.namespace}; begin with: python -m cluster apply platform")


def describe_job(job: Object) -> str:
    """A RayJob in a line."""
    state = job.get("status", {})
    deployment = state.get("jobDeploymentStatus") or "New"
    of_ray = f", {state['jobStatus']}" if state.get("jobStatus") else ""
    retry = f", {state['failed']} tries failed" if state.get("failed") else ""
    queued = " (its queue has no room yet)" if deployment == "Suspended" else ""
    return f"{job['metadata']['name']}: {deployment}{of_ray}{retry}{queued}"


def describe_service(service: Object) -> list[str]:
    """A RayService in a line, and one for each application that has something to say."""
    state = service.get("status", {})
    active, pending = state.get("activeServiceStatus") or {}, state.get("pendingServiceStatus") or {}
    ready = "ready" if kubectl.condition(service, "Ready") == "True" else "not ready"
    upgrade = f", {pending['rayClusterName']} is to take over" if pending.get("rayClusterName") else ""
    cluster = active.get("rayClusterName", "no cluster yet")
    lines = [f"{service['metadata']['name']}: {ready}, {model_of(service)} on {cluster}{upgrade}"]
    for part in (active, pending):
        for name, application in (part.get("applicationStatuses") or {}).items():
            message = " ".join(str(application.get("message", "")).split())
            lines.append(f"  {name}: {application.get('status')}{f', {message[-300:]}' if message else ''}")
            if application.get("status") == "DEPLOY_FAILED":
                about = service["metadata"]
                delete = f"kubectl delete rayservice {about['name']} -n {about.get('namespace', NAMESPACE)}"
                again = f"mended, start anew: {delete}; python -m cluster apply serve"
                lines.append(f"  {name}: Ray Serve does not try again by itself; {again}")
    return lines


def _follow(config: WaitConfig, *since: str) -> subprocess.Popen[bytes]:
    """The output of the pod that submits the job, which is the job's own, on our stdout."""
    job = f"job/{config.job}"
    return subprocess.Popen(["kubectl", "logs", "--follow", "--namespace", config.namespace, job, *since])


def _end(logs: subprocess.Popen[bytes] | None, patience_s: float) -> None:
    if logs is None:
        return
    try:
        logs.wait(patience_s)
    except subprocess.TimeoutExpired:
        logs.kill()
        logs.wait()


def _why(job: Object, config: WaitConfig) -> str:
    state = job["status"]
    ended = state.get("jobStatus") or state["jobDeploymentStatus"]
    reason = f" ({state['reason']})" if state.get("reason") else ""
    message = (state.get("message") or "").strip().splitlines()
    said = f": {message[-1]}" if message else ""
    log = f"kubectl logs job/{config.job} --namespace {config.namespace}"
    return f"{config.job} has not succeeded, {ended}{reason}{said}; its output: {log}; mended, apply it again"


def _why_pending(pod: Object) -> str:
    conditions = pod.get("status", {}).get("conditions") or []
    found = next((item.get("message") for item in conditions if item.get("status") == "False"), None)
    return str(found or "for its containers to start")
