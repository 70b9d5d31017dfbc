"""The manifests agree with the code they run, and with each other."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import ray
import yaml
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

from cluster import leaving
from cluster.__main__ import COMMANDS as CLUSTER_COMMANDS
from cluster.commands import parse_config
from cluster.manifests import StageName
from pipelines.__main__ import STAGES as COMMANDS
from serve_app import app
from serve_app.app import AppArgs
from tests.kubernetes import JOBS, MANIFESTS, OVERLAYS, ROOT, STAGES, mixed, objects, one, overlay, ray_cluster

# Names of the chart kuberay-operator 1.7.0 that one may set, as far as they are set here.
CHART = {"image": {"tag"}, "resources": {"requests", "limits"}, "metrics": {"enabled", "serviceMonitor"}}
GATES = [
    "RayClusterStatusConditions",
    "RayJobDeletionPolicy",
    "RayMultiHostIndexing",
    "RayServiceIncrementalUpgrade",
    "RayCronJob",
    "RayClusterMTLS",
    "RayClusterNetworkPolicy",
    "RayClusterHistoryServer",
]


def pin(name: str) -> str:
    return re.search(rf"^{name}==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]  # type: ignore[index]


def serve_config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(one(overlay(name, "serve"), "RayService")["spec"]["serveConfigV2"])
    return config


def deployment(name: str) -> dict[str, Any]:
    [application] = serve_config(name)["applications"]
    [found] = application["deployments"]
    return dict(found)


def run_yaml(name: str, stage: str, folder: Path) -> tuple[Path, str]:
    """The file that a stage's pods mount, written into `folder`, and its path in the pods."""
    text = overlay(name, stage)
    [config] = [item for item in objects(text) if item["kind"] == "ConfigMap"]
    [(key, content)] = config["data"].items()
    for pod in pods(text):
        [volume] = [item for item in pod["volumes"] if "configMap" in item]
        assert volume["configMap"]["name"] == config["metadata"]["name"]
        [mount] = [item for item in pod["containers"][0]["volumeMounts"] if item["name"] == volume["name"]]
    (folder / key).write_text(content)
    return folder / key, f"{mount['mountPath']}/{key}"


def pods(text: str) -> list[dict[str, Any]]:
    cluster = ray_cluster(text)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def settings(name: str, stage: str, folder: Path) -> Any:
    """What a stage would be called with, by its entrypoint and the file that is mounted."""
    file, inside = run_yaml(name, stage, folder)
    words = shlex.split(one(overlay(name, stage), "RayJob")["spec"]["entrypoint"])
    assert words[:4] == ["python", "-m", "pipelines", stage]
    flags = [str(file) if word == inside else word for word in words[4:]]
    assert str(file) in flags
    module, function = COMMANDS[stage][0].split(":")
    return parse_config("test", stage, getattr(importlib.import_module(module), function), flags, list(COMMANDS))


def quantity(text: str) -> float:
    return float(text.removesuffix("Gi").removesuffix("Mi")) / (1024 if text.endswith("Mi") else 1)


def test_one_version_of_ray_and_python_everywhere():
    dockerfile = (MANIFESTS / "Dockerfile").read_text()
    assert re.findall(r"ARG RAY_VERSION=(.*)", dockerfile) == [pin("ray")]
    assert re.findall(r"FROM rayproject/ray:\$\{RAY_VERSION\}-(.*)", dockerfile) == ["py311"]
    assert "on Python 3.11" in (ROOT / "constraints.txt").read_text().splitlines()[0]
    versions = {ray_cluster(overlay(name, stage))["rayVersion"] for name in OVERLAYS for stage in (*JOBS, "serve")}
    assert versions == {pin("ray")}


@pytest.mark.parametrize("name", OVERLAYS)
def test_head_workers_and_submitters_run_one_image(name):
    images = set()
    for stage in (*JOBS, "serve"):
        images |= {pod["containers"][0]["image"] for pod in pods(overlay(name, stage))}
        if stage != "serve":
            template = one(overlay(name, stage), "RayJob")["spec"]["submitterPodTemplate"]
            images.add(template["spec"]["containers"][0]["image"])
    images |= {
        item["spec"]["template"]["spec"]["containers"][0]["image"]
        for item in objects(overlay(name, "platform"))
        if item["kind"] == "Job"
    }
    assert len(images) == 1
    assert not images.pop().endswith(("latest", "chatglm3-ray"))


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_one_stage_writes_the_next_one_reads_from_the_same_volume(name, tmp_path):
    prepare, train, merge, evaluate = (settings(name, stage, tmp_path) for stage in JOBS)
    assert train.data == evaluate.data == prepare.out
    assert merge.adapter == train.out
    assert evaluate.model == merge.out
    [application] = serve_config(name)["applications"]
    assert application["args"]["model"] == merge.out
    paths = [prepare.raw, prepare.out, train.out, merge.out, evaluate.out]
    paths += [path for path in (prepare.tokenizer, train.base) if path != "tiny"]
    assert all(path.startswith("/store/") for path in paths)
    claim = one(overlay(name, "platform"), "PersistentVolumeClaim")["metadata"]["name"]
    for stage in (*JOBS, "serve"):
        for pod in pods(overlay(name, stage)):
            [volume] = [item for item in pod["volumes"] if "persistentVolumeClaim" in item]
            assert volume["persistentVolumeClaim"]["claimName"] == claim
            mounts = {item["name"]: item["mountPath"] for item in pod["containers"][0]["volumeMounts"]}
            assert mounts[volume["name"]] == "/store"


def test_weights_and_shards_land_where_the_stages_look_for_them(tmp_path):
    [weights] = [item for item in objects(overlay("gpu", "platform")) if item["kind"] == "Job"]
    script = weights["spec"]["template"]["spec"]["containers"][0]["command"][-1]
    assert script.rstrip().endswith(settings("gpu", "train", tmp_path).base)
    [shards] = [item for item in objects(overlay("cpu-demo", "platform")) if item["kind"] == "Job"]
    command = shards["spec"]["template"]["spec"]["containers"][0]["command"][-1]
    assert f'"{settings("cpu-demo", "prepare", tmp_path).raw}"' in command


@pytest.mark.parametrize("name", OVERLAYS)
def test_training_workers_find_room_on_the_pods(name, tmp_path):
    config = settings(name, "train", tmp_path)
    [group] = ray_cluster(overlay(name, "train"))["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    if config.use_gpu:
        assert config.workers == group["replicas"] * int(limits["nvidia.com/gpu"])
        # None has nothing to do: the rows of docs/kubernetes.md, of 2,000 tokens, in the largest blocks.
        assert config.batch_size // (16384 // 2000) % config.workers == 0
    # With all CPUs taken by training workers Ray Data would wait for ever.
    assert config.workers + 1 <= group["replicas"] * int(limits["cpu"])


def test_merge_works_on_a_worker_and_not_on_the_head():
    on_cpu, on_gpu = (one(overlay(name, "merge"), "RayJob")["spec"] for name in OVERLAYS)
    assert on_cpu["entrypointNumCpus"] == on_gpu["entrypointNumCpus"] == 1
    assert on_gpu["entrypointNumGpus"] == 1
    for stage in (*JOBS, "serve"):
        assert ray_cluster(overlay("gpu", stage))["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_serve_config_is_one_that_ray_and_the_application_take(name):
    config = serve_config(name)
    schema = ServeDeploySchema.model_validate(config)
    [application] = config["applications"]
    module, builder = application["import_path"].split(":")
    assert getattr(importlib.import_module(module), builder) is app.build
    args = AppArgs.model_validate(application["args"])
    found = deployment(name)
    assert getattr(app, found["name"]).name == found["name"]
    scaling = AutoscalingConfig.model_validate(found["autoscaling_config"])
    assert found["max_ongoing_requests"] == args.max_batch
    assert scaling.target_ongoing_requests == args.max_batch / 2
    known = set(type(schema.applications[0].deployments[0]).model_fields)
    assert set(found) <= known  # Ray ignores a name that it does not know


@pytest.mark.parametrize("name", OVERLAYS)
def test_all_replicas_fit_on_all_workers(name):
    found = deployment(name)
    [group] = ray_cluster(overlay(name, "serve"))["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    actor = found["ray_actor_options"]
    a_pod = int(limits["cpu"]) // actor["num_cpus"]
    if actor["num_gpus"]:
        a_pod = min(a_pod, int(limits["nvidia.com/gpu"]) // actor["num_gpus"])
    a_pod = min(a_pod, found.get("max_replicas_per_node", a_pod))
    assert a_pod >= 1
    # A new model's replica needs room beside the others, else none of them may end.
    surge = found.get("max_surge_percent", 0) > 0
    assert found["autoscaling_config"]["max_replicas"] + surge <= a_pod * group["maxReplicas"]
    assert "replicas" not in group  # the autoscaler's to say
    assert ray_cluster(overlay(name, "serve"))["autoscalerOptions"]["version"] == "v2"


@pytest.mark.parametrize("name", OVERLAYS)
def test_ports_are_the_same_in_serve_pods_routes_policies_and_monitors(name, tmp_path):
    port = serve_config(name)["http_options"]["port"]
    text = mixed(tmp_path / "serve", "serve", ("gateway",), name)
    for pod in pods(text):
        assert {"name": "serve", "containerPort": port} in pod["containers"][0]["ports"]
    [rule] = one(text, "HTTPRoute")["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": f"{one(text, 'RayService')['metadata']['name']}-serve-svc", "port": port}]
    platform = mixed(tmp_path / "platform", "platform", ("network-policy", "monitoring"), name)
    policies = [item for item in objects(platform) if item["kind"] == "NetworkPolicy"]
    opened = [entry["port"] for item in policies for rule in item["spec"]["ingress"] for entry in rule.get("ports", [])]
    assert opened.count(port) == 2  # the operator and the gateway
    named = {entry["name"] for entry in pods(text)[0]["containers"][0]["ports"]} | {"metrics"}  # KubeRay adds metrics
    scraped = {end["port"] for end in one(platform, "PodMonitor")["spec"]["podMetricsEndpoints"]}
    assert scraped == {"metrics", "as-metrics", "dash-metrics"} <= named
    assert {entry for entry in opened if isinstance(entry, str)} == scraped


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_wait_longer_than_streams_may_take(name):
    shutdown = deployment(name)["graceful_shutdown_timeout_s"]
    service = one(overlay(name, "serve"), "RayService")["spec"]
    _, worker = pods(overlay(name, "serve"))
    command = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:3] == ["python", "-m", "cluster.leaving"]
    assert importlib.util.find_spec(command[2])
    assert shutdown < int(command[3]) < worker["terminationGracePeriodSeconds"]
    assert shutdown < service["rayClusterDeletionDelaySeconds"]
    assert serve_config(name)["applications"][0]["args"]["request_timeout_s"] <= shutdown
    for pod in pods(overlay(name, "serve")):  # KubeRay's own probes look at Serve's proxy
        assert not {"readinessProbe", "livenessProbe", "startupProbe"} & set(pod["containers"][0])


@pytest.mark.parametrize("name", OVERLAYS)
def test_training_pods_on_spot_nodes_tell_ray_that_they_go_and_wait_for_its_workers(name, tmp_path, monkeypatch):
    text = mixed(tmp_path / "train", "train", ("spot",), name)
    head, worker = pods(text)
    command = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:3] == ["python", "-m", "cluster.leaving"]
    assert int(command[3]) < worker["terminationGracePeriodSeconds"]
    assert "lifecycle" not in head["containers"][0]
    names = [RayTrainWorker.__name__, "ServeReplica:chat:ChatServer", "TrainController", "_StatsActor"]
    monkeypatch.setattr(leaving, "list_actors", lambda filters: [SimpleNamespace(class_name=name) for name in names])
    assert leaving._at_work("node") == 2
    # The endpoint's own hook, which waits for streams, stays.
    _, serving = pods(mixed(tmp_path / "serve", "serve", ("spot",), name))
    assert serving["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][3] == "150"


def test_api_keys_are_mounted_where_the_endpoint_looks_for_them():
    [application] = serve_config("gpu")["applications"]
    for pod in pods(overlay("gpu", "serve")):
        mounts = {item["mountPath"]: item["name"] for item in pod["containers"][0]["volumeMounts"]}
        volume = mounts[str(Path(application["args"]["api_keys"]).parent)]
        assert {"name": volume, "secret": {"secretName": "api-keys"}} in pod["volumes"]
    header = (MANIFESTS / "components/api-keys/kustomization.yaml").read_text()
    assert f"--from-file={Path(application['args']['api_keys']).name}" in header


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize("stage", [*JOBS, "serve"])
def test_pods_may_run_where_pod_security_is_restricted(name, stage):
    text = overlay(name, stage)
    found = pods(text)
    if stage != "serve":
        found.append(one(text, "RayJob")["spec"]["submitterPodTemplate"]["spec"])
    found += [item["spec"]["template"]["spec"] for item in objects(text) if item["kind"] == "StatefulSet"]
    found += [item["spec"]["template"]["spec"] for item in objects(overlay(name, "platform")) if item["kind"] == "Job"]
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]  # the quota wants it
    for cluster in [ray_cluster(text)] if stage == "serve" else []:
        assert cluster["autoscalerOptions"]["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_a_change_of_run_yaml_starts_no_new_serving_cluster():
    text = overlay("gpu", "serve")
    assert [item for item in objects(text) if item["kind"] == "ConfigMap"] == []
    assert "/etc/chatglm3/" not in text


@pytest.mark.parametrize("stage", JOBS)
def test_jobs_end_and_free_their_nodes(stage):
    spec = one(overlay("gpu", stage), "RayJob")["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["activeDeadlineSeconds"] > spec["preRunningDeadlineSeconds"] > 0
    assert "deletionStrategy" not in spec  # which Kueue's webhook refuses


def test_budgets_find_their_pods_by_what_no_other_pod_carries():
    text = overlay("cpu-demo", "serve")
    head, worker = (
        group["template"]["metadata"]["labels"]
        for group in (ray_cluster(text)["headGroupSpec"], *ray_cluster(text)["workerGroupSpecs"])
    )
    for item in [item for item in objects(text) if item["kind"] == "PodDisruptionBudget"]:
        wanted = dict(item["spec"]["selector"]["matchLabels"])
        assert wanted.pop("ray.io/node-type") in ("head", "worker")
        assert wanted.items() <= head.items()
        assert wanted.items() <= worker.items()
        assert item["spec"]["minAvailable"] == 1


def test_the_operators_values_are_names_of_its_chart():
    values = yaml.safe_load((MANIFESTS / "operator/values.yaml").read_text())
    assert [gate["name"] for gate in values.pop("featureGates")] == GATES
    for name, inner in values.items():
        assert set(inner) <= CHART[name]


def test_environment_variables_are_some_that_ray_reads():
    library = Path(ray._raylet.__file__).read_bytes()
    cluster = ray_cluster(overlay("gpu", "serve"))
    for entry in cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]:
        assert entry["name"].removeprefix("RAY_").encode() in library or is_read_by_serve(entry["name"])


def is_read_by_serve(name: str) -> bool:
    return f'"{name}"' in Path(ray.serve.__file__).with_name("_private").joinpath("constants.py").read_text()


def test_haproxys_variables_are_some_that_serve_reads_and_its_program_is_in_the_image(tmp_path):
    text = mixed(tmp_path / "serve", "serve", ["haproxy"])
    [variables] = [item["data"] for item in objects(text) if item["metadata"]["name"] == "haproxy"]
    assert all(map(is_read_by_serve, variables))
    program = Path(variables["RAY_SERVE_HAPROXY_BINARY_PATH"]).relative_to("/home/ray/chatglm3")  # the image's WORKDIR
    assert os.access(ROOT / program, os.X_OK)


def test_the_dockerfile_is_linted_and_is_given_all_that_it_copies():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [hadolint, "--failure-threshold", "warning", MANIFESTS / "Dockerfile"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY --chown=1000:100 (.*) \S+$", (MANIFESTS / "Dockerfile").read_text(), re.M)
    sources = {source for line in copied for source in line.split()}
    assert sources == let_in
    assert all((ROOT / source).exists() for source in sources)
    [made] = re.findall(r"&& mkdir -p ((?:[\w/ ]+(?:\\\n)?)+)", (MANIFESTS / "Dockerfile").read_text())
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {str(parent) for word in made.replace("\\", "").split() for parent in (Path(word), *Path(word).parents)}
    assert folders - {"."} == {package.replace(".", "/") for package in packages}


def test_what_the_dashboards_and_alerts_ask_for_is_measured():
    from serve_app.metrics import INSTRUMENTS, PREFIX

    ours = {f"ray_{PREFIX}{item.name}" for item in INSTRUMENTS}
    panels = Path(importlib.util.find_spec("ray.dashboard.modules.metrics").submodule_search_locations[0])  # type: ignore[union-attr, index]
    rays = "".join(file.read_text() for file in panels.glob("dashboards/*.py"))
    folder = MANIFESTS / "components/monitoring"
    asked = "".join((folder / name).read_text() for name in ("training.json", "alerts.yaml"))
    names = set(re.findall(r"\bray_[a-z0-9_]+", asked)) - {"ray_train_run_name"}
    assert len(names) > 12
    for name in names:
        base = re.sub(r"_(bucket|count|sum|total)$", "", name)
        assert base in ours or name in rays, name


def test_the_dashboard_of_serving_is_the_applications_own():
    ours = MANIFESTS / "components/monitoring/serving.json"  # kustomize reads nothing outside its folder
    assert ours.read_bytes() == (ROOT / "serve_app/grafana.json").read_bytes()
    assert len(json.loads((MANIFESTS / "components/monitoring/training.json").read_text())["panels"]) == 9


def test_the_command_knows_every_stage():
    assert get_args(StageName) == STAGES


@pytest.mark.parametrize("name", ["docs/kubernetes.md", "docs/kubernetes.zh-CN.md"])
def test_what_the_documents_tell_people_to_type_is_there(name):
    text = (ROOT / name).read_text()
    for path in set(re.findall(r"(?<![\w/.])((?:k8s|docs|benchmarks|tests)/[\w./-]*\w)", text)):
        assert (ROOT / path).exists() or path == "k8s/overlays/ours", path
    commands = re.findall(r"python -m cluster (\w+)(?: (platform|prepare|train|merge|evaluate|serve)\b)?", text)
    assert {command for command, _ in commands} == set(CLUSTER_COMMANDS)
    assert {stage for command, stage in commands if command == "apply" and stage} == set(STAGES)
    for overlay_name in set(re.findall(r"--overlay (\S+?)`?\s", text)):
        assert (MANIFESTS / "overlays" / overlay_name).is_dir(), overlay_name
    components = set(re.findall(r"`([a-z0-9-]+)`", text[text.index("| `gpu-train`") : text.index("`RayCronJob`")]))
    inner = {"gpu", "finish-job", "finish-service"}
    assert components == {path.name for path in (MANIFESTS / "components").iterdir()} - inner
    made = {item["metadata"]["name"] for stage in STAGES for item in objects(overlay("gpu", stage))}
    made |= {item["metadata"]["name"] for item in objects(overlay("cpu-demo", "platform"))}
    for kind, found in re.findall(r"(job|rayservice)[/ ]([a-z]+)\b", "\n".join(re.findall(r"kubectl[^\n`]*", text))):
        assert found in made, f"{kind} {found}"
    assert "service/chat-serve-svc 8000" in text


def test_both_languages_say_the_same_commands():
    blocks = [
        [re.sub(r"\s*#.*", "", block) for block in re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(), re.S)]
        for name in ("docs/kubernetes.md", "docs/kubernetes.zh-CN.md")
    ]
    assert blocks[0] == blocks[1]
