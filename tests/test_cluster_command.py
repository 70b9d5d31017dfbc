"""`python -m cluster` against a kubectl that writes down what it is asked; manifests are built by the real one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import doctor as examination
from cluster.__main__ import COMMANDS
from cluster.commands import run_command
from tests.kubectl_stand_in import StandIn
from tests.kubernetes import ROOT, objects, overlay

GOOD = {"stage": "merge", "config": {}, "facts": {}}
GPU = "requests.nvidia.com/gpu"
DEFAULT = {"storageclass.kubernetes.io/is-default-class": "true"}
QUICK = ("--poll_s", "0.01")


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    monkeypatch.chdir(ROOT)
    return stand_in


def cluster(*words: str) -> int:
    return run_command("python -m cluster", COMMANDS, list(words))


def job(deployment: str, of_ray: str = "", **state: Any) -> dict[str, Any]:
    status = {"jobDeploymentStatus": deployment, "jobStatus": of_ray, "jobId": "train-1", **state}
    return {"metadata": {"name": "train"}, "status": status}


def service(model: str, previous: str = "", **status: Any) -> dict[str, Any]:
    [made] = [item for item in objects(overlay("gpu", "serve")) if item["kind"] == "RayService"]
    made["spec"]["serveConfigV2"] = made["spec"]["serveConfigV2"].replace("/store/models/v1", model)
    made["metadata"] |= {"generation": 2, "annotations": {"chatglm3/previous-model": previous} if previous else {}}
    made["status"] = {
        "observedGeneration": 2,
        "conditions": [{"type": "Ready", "status": "True"}],
        "activeServiceStatus": {"rayClusterName": "chat-abc", "applicationStatuses": {"chat": {"status": "RUNNING"}}},
        **status,
    }
    return made


def ray_serve(kubectl: StandIn, model: str, *statuses: str) -> None:
    """What Ray Serve says of itself in the head pod."""
    kubectl.answer("get pods --selector=ray.io/cluster=chat-abc", {"items": [{"metadata": {"name": "head-1"}}]})
    on_head = "exec head-1 --container=ray-head --namespace chatglm3 --"
    kubectl.answer(f"{on_head} serve config", yaml.safe_dump({"name": "chat", "args": {"model": model}}))
    said = [yaml.safe_dump({"applications": {"chat": {"status": status, "message": ""}}}) for status in statuses]
    kubectl.answer(f"{on_head} serve status", *said)
    kubectl.answer(f"{on_head} wget", '{"status":"ok"}')


def receipts(kubectl: StandIn, **found: dict[str, Any]) -> None:
    """What lies on the store: models/NAME and evaluations/NAME, by name with an underscore."""
    on_head = "exec head-1 --container=ray-head --namespace chatglm3 --"
    kubectl.answer(f"{on_head} cat", {"error": "cat: No such file or directory"})
    kubectl.answer(f"{on_head} sha256sum", "0a1b  receipt.json")
    for name, receipt in found.items():
        kubectl.answer(f"{on_head} cat /store/{name.replace('_', '/')}/receipt.json", receipt)


def evaluation(model: str, digest: str = "0a1b", **facts: bool) -> dict[str, Any]:
    config = {"model": model, "gate": "/store/evaluations/v1"}
    return {"stage": "evaluate", "config": config, "inputs": {model: digest}, "facts": facts}


def test_render_shows_what_kustomize_builds(kubectl, capsys):
    assert cluster("render", "train", "--overlay", "gpu") == 0
    assert capsys.readouterr().out == overlay("gpu", "train")
    assert cluster("render", "train", "--overlay", "cpu") == 1
    assert capsys.readouterr().err == (
        "python -m cluster: error: k8s/overlays/cpu/train: there is no such folder; overlays there are: cpu-demo, gpu\n"
    )


def test_apply_sends_the_same_by_server_side_apply(kubectl, capsys):
    assert cluster("apply", "train", "--overlay", "gpu") == 0
    [command] = kubectl.asked("apply")
    assert command == "apply --server-side --force-conflicts --field-manager=chatglm3 --filename=-"
    assert kubectl.sent("apply") == overlay("gpu", "train")


def test_a_finished_job_makes_room_for_the_next_one_and_a_running_one_does_not(kubectl, capsys):
    kubectl.answer("get rayjob train", job("Complete", "SUCCEEDED"))
    assert cluster("apply", "train") == 0
    assert kubectl.asked("delete") == ["delete rayjob train --namespace chatglm3"]
    kubectl.answer("get rayjob train", job("Running", "RUNNING"))
    assert cluster("apply", "train") == 1
    assert "train has not ended; follow it: python -m cluster wait train" in capsys.readouterr().err
    assert len(kubectl.asked("apply")) == 1


def test_a_download_that_has_ended_makes_room_and_one_that_runs_does_not(kubectl):
    kubectl.answer("get job shards", {"metadata": {"name": "shards"}, "status": {"active": 1}})
    assert cluster("apply", "platform") == 0
    assert kubectl.asked("delete") == []
    ended = {"conditions": [{"type": "Complete", "status": "True"}]}
    kubectl.answer("get job shards", {"metadata": {"name": "shards"}, "status": ended})
    assert cluster("apply", "platform") == 0
    assert kubectl.asked("delete") == ["delete job shards --namespace chatglm3"]


def test_a_dry_run_changes_nothing(kubectl):
    kubectl.answer("get rayjob train", job("Complete", "SUCCEEDED"))
    assert cluster("apply", "train", "--dry_run") == 0
    assert kubectl.asked("delete") == []
    assert "--dry-run=server" in kubectl.asked("apply")[0]


def test_apply_does_not_undo_a_rollout_by_mistake(kubectl, capsys):
    kubectl.answer("get rayservice chat", service("/store/models/v2"))
    assert cluster("apply", "serve", "--overlay", "gpu") == 1
    assert "/store/models/v2 is served, serve.yaml of gpu says /store/models/v1" in capsys.readouterr().err
    assert cluster("apply", "serve", "--overlay", "gpu", "--other_model") == 0
    kubectl.answer("get rayservice chat", service("/store/models/v1"))
    assert cluster("apply", "serve", "--overlay", "gpu") == 0


def test_wait_follows_a_job_to_its_success_with_its_output(kubectl, capfd):
    states = [job("Initializing"), job("Running", "RUNNING"), job("Complete", "SUCCEEDED")]
    kubectl.answer("get rayjob train", *states)
    kubectl.answer("logs", "step 1 loss 2.3")
    assert cluster("wait", "train", *QUICK) == 0
    said = capfd.readouterr().out
    assert [line for line in said.splitlines() if line.startswith("train:")] == [
        "train: Initializing",
        "train: Running, RUNNING",
        "train: Complete, SUCCEEDED",
    ]
    assert "step 1 loss 2.3" in said
    assert kubectl.asked("logs") == ["logs --follow --namespace chatglm3 job/train"]


@pytest.mark.parametrize(
    ("deployment", "of_ray"), [("Failed", "FAILED"), ("Failed", ""), ("Complete", "STOPPED"), ("ValidationFailed", "")]
)
def test_wait_fails_when_the_job_did_not_succeed(kubectl, capsys, deployment, of_ray):
    ended = job(deployment, of_ray, reason="AppFailed", message="Job failed:\nno receipt.json: run prepare first")
    kubectl.answer("get rayjob train", job("Running", "RUNNING"), ended)
    assert cluster("wait", "train", *QUICK) == 1
    error = capsys.readouterr().err
    assert f"train has not succeeded, {of_ray or deployment} (AppFailed): no receipt.json: run prepare first" in error
    assert "kubectl logs job/train --namespace chatglm3" in error


def test_wait_outlasts_an_api_server_that_is_away_for_a_moment(kubectl, capsys):
    kubectl.answer("get rayjob train", job("Initializing"), {"error": "etcd is busy"}, job("Complete", "SUCCEEDED"))
    assert cluster("wait", "train", *QUICK) == 0
    assert "train: asking again, kubectl get: etcd is busy" in capsys.readouterr().err


def test_wait_shows_the_output_of_each_retry(kubectl):
    retry = job("Running", "RUNNING", jobId="train-2", failed=1)
    states = [job("Running", "RUNNING"), job("Retrying"), retry, job("Complete", "SUCCEEDED", failed=1)]
    kubectl.answer("get rayjob train", *states)
    assert cluster("wait", "train", *QUICK) == 0
    assert len(kubectl.asked("logs")) == 2


def test_wait_follows_the_output_again_when_its_connection_broke(kubectl, capfd):
    kubectl.answer("get rayjob train", *[job("Running", "RUNNING")] * 40, job("Complete", "SUCCEEDED"))
    kubectl.answer("logs", {"error": "unexpected EOF"}, "step 2 loss 2.1")
    assert cluster("wait", "train", *QUICK) == 0
    assert "step 2 loss 2.1" in capfd.readouterr().out
    first, second = kubectl.asked("logs")
    assert second.startswith(f"{first} --since=") and second.endswith("s")


def test_wait_gives_up_after_its_time_and_names_a_job_that_is_not_there(kubectl, capsys):
    kubectl.answer("get rayjob train", job("Suspended"))
    assert cluster("wait", "train", "--timeout_s", "0.05", *QUICK) == 1
    assert "train: Suspended (its queue has no room yet) after 0.05 s; it goes on" in capsys.readouterr().err
    kubectl.answer("get rayjob train", "")
    assert cluster("wait", "train") == 1
    assert "there is no job train in chatglm3; start it: python -m cluster apply train" in capsys.readouterr().err


def test_status_says_what_runs_and_what_waits(kubectl, capsys):
    waiting = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available: 3 Insufficient gpu."}
    kubectl.answer("get rayjobs", {"items": [job("Failed", "FAILED", failed=2)]})
    failed = {"chat": {"status": "DEPLOY_FAILED", "message": "no model"}}
    upgrade = {"rayClusterName": "chat-new", "applicationStatuses": failed}
    kubectl.answer("get rayservices", {"items": [service("/store/models/v1", pendingServiceStatus=upgrade)]})
    kubectl.answer("get pods", {"items": [{"metadata": {"name": "w1"}, "status": {"conditions": [waiting]}}]})
    assert cluster("status") == 0
    assert capsys.readouterr().out.splitlines() == [
        "train: Failed, FAILED, 2 tries failed",
        "chat: ready, /store/models/v1 on chat-abc, chat-new is to take over",
        "  chat: RUNNING",
        "  chat: DEPLOY_FAILED, no model",
        "  chat: Ray Serve does not try again by itself; mended, start anew: kubectl delete rayservice chat "
        "-n chatglm3; python -m cluster apply serve",
        "pod w1 waits: 0/3 nodes are available: 3 Insufficient gpu.",
    ]


def test_a_rollout_changes_the_model_alone_and_waits_until_it_answers(kubectl, capsys):
    kubectl.answer("get rayservice", service("/store/models/v1"), service("/store/models/v2"))
    ray_serve(kubectl, "/store/models/v2", "DEPLOYING", "RUNNING")
    receipts(kubectl, models_v2=GOOD, evaluations_v2=evaluation("/store/models/v2", gate_passed=True))
    assert cluster("rollout", "/store/models/v2", *QUICK) == 0
    assert capsys.readouterr().out.splitlines() == [
        "chat: /store/models/v1 -> /store/models/v2",
        "chat: DEPLOYING",
        "rollout: /store/models/v2 answers; back to /store/models/v1: python -m cluster rollback",
    ]
    [patch] = kubectl.asked("patch")
    test, replace, note = json.loads(patch.split("--patch ")[1])
    before, after = (yaml.safe_load(change["value"]) for change in (test, replace))
    assert (test["op"], replace["path"]) == ("test", "/spec/serveConfigV2")
    before["applications"][0]["args"]["model"] = "/store/models/v2"
    assert after == before
    assert note["value"] == {"chatglm3/previous-model": "/store/models/v1"}


def test_a_rollout_on_a_new_cluster_touches_its_pods_too(kubectl):
    kubectl.answer("get rayservice", service("/store/models/v1"), service("/store/models/v2"))
    ray_serve(kubectl, "/store/models/v2", "RUNNING")
    receipts(kubectl, models_v2=GOOD)
    assert cluster("rollout", "/store/models/v2", "--new_cluster", "--unevaluated", *QUICK) == 0
    changes = json.loads(kubectl.asked("patch")[0].split("--patch ")[1])
    assert changes[-1]["path"] == "/spec/rayClusterConfig/headGroupSpec/template/metadata/annotations"
    assert changes[-1]["value"]["chatglm3/model"] == "/store/models/v2"
    assert changes[-1]["value"]["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, "/store/models/v2 on the cluster was not written by merge"),
        ({"models_v2": GOOD}, "/store/models/v2 was not evaluated in /store/evaluations/v2; evaluate it"),
        (
            {"models_v2": GOOD, "evaluations_v2": evaluation("/store/models/v1")},
            "/store/evaluations/v2 is about /store/models/v1, not /store/models/v2",
        ),
        (
            {"models_v2": GOOD, "evaluations_v2": evaluation("/store/models/v2", gate_passed=False)},
            "/store/models/v2 is worse than /store/evaluations/v1, says /store/evaluations/v2/report.html",
        ),
        (
            {"models_v2": GOOD, "evaluations_v2": evaluation("/store/models/v2", "of before", gate_passed=True)},
            "/store/models/v2 was merged again since its evaluation in /store/evaluations/v2",
        ),
    ],
    ids=["no model", "not evaluated", "another's evaluation", "worse", "merged again"],
)
def test_a_model_that_is_not_known_to_be_good_is_not_rolled_out(kubectl, capsys, found, said):
    kubectl.answer("get rayservice", service("/store/models/v1"))
    ray_serve(kubectl, "/store/models/v1", "RUNNING")
    receipts(kubectl, **found)
    assert cluster("rollout", "/store/models/v2", *QUICK) == 1
    assert said in capsys.readouterr().err
    assert kubectl.asked("patch") == []


def test_a_rollout_that_fails_says_so_and_how_to_go_back(kubectl, capsys):
    kubectl.answer("get rayservice", service("/store/models/v1"), service("/store/models/v2"))
    ray_serve(kubectl, "/store/models/v2", "DEPLOYING", "DEPLOY_FAILED")
    receipts(kubectl, models_v2=GOOD)
    assert cluster("rollout", "/store/models/v2", "--unevaluated", *QUICK) == 1
    error = capsys.readouterr().err
    assert "/store/models/v2 does not answer: DEPLOY_FAILED; go back with: python -m cluster rollback" in error


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ({"observedGeneration": 1}, "the operator has not seen the change yet"),
        ({"pendingServiceStatus": {"rayClusterName": "chat-new"}}, "the new cluster chat-new is not ready"),
        ({"conditions": [{"type": "Ready", "status": "False"}]}, "the service is not ready"),
        ({"activeServiceStatus": {}}, "chat has no head pod"),
    ],
)
def test_what_a_rollout_waits_for_is_said_when_its_time_is_over(kubectl, capsys, status, said):
    first = service("/store/models/v1", previous="/store/models/v0")
    kubectl.answer("get rayservice", first, service("/store/models/v0", **status))
    assert cluster("rollback", "--timeout_s", "0.05", *QUICK) == 1
    assert f"/store/models/v0 does not answer: {said}" in capsys.readouterr().err


def test_rollback_goes_to_the_model_before_and_can_be_taken_back(kubectl, capsys):
    kubectl.answer("get rayservice", service("/store/models/v2", "/store/models/v1"), service("/store/models/v1"))
    ray_serve(kubectl, "/store/models/v1", "RUNNING")
    assert cluster("rollback", *QUICK) == 0
    changes = json.loads(kubectl.asked("patch")[0].split("--patch ")[1])
    assert "model: /store/models/v1" in changes[1]["value"]
    assert changes[2]["value"]["chatglm3/previous-model"] == "/store/models/v2"
    kubectl.answer("get rayservice", service("/store/models/v1"))
    assert cluster("rollback") == 1
    assert "nothing was rolled out to chat before" in capsys.readouterr().err


def healthy(kubectl: StandIn) -> None:
    """A cluster on which the gpu overlay would run."""
    kubectl.answer("version", {"serverVersion": {"major": "1", "minor": "35+", "gitVersion": "v1.35.2-gke.1"}})
    container = {"image": "quay.io/kuberay/operator:v1.7.0", "args": ["--feature-gates=RayCronJob=true"]}
    operator = {"metadata": {"namespace": "kuberay-system"}, "status": {"readyReplicas": 1}}
    operator["spec"] = {"template": {"spec": {"containers": [container]}}}
    kubectl.answer("get deployments", {"items": [operator]})
    crds = [{"metadata": {"name": f"{kind}.ray.io"}, "spec": "authOptions"} for kind in ("rayjobs", "rayservices")]
    kubectl.answer("get customresourcedefinitions", {"items": crds})
    kubectl.answer("get nodes", {"items": [{"status": {"allocatable": {"nvidia.com/gpu": "8"}}}]})
    kubectl.answer("get persistentvolumeclaim", "")
    efs = {"metadata": {"name": "efs", "annotations": DEFAULT}, "provisioner": "efs.csi.aws.com"}
    kubectl.answer("get storageclasses", {"items": [efs]})
    kubectl.answer("get namespace", {"metadata": {}})
    quota = {"hard": {GPU: "16", "requests.cpu": "256", "requests.memory": "2Ti"}, "used": {}}
    kubectl.answer("get resourcequotas", {"items": [{"metadata": {"name": "chatglm3"}, "status": quota}]})
    kubectl.answer("get secret", {"metadata": {}})


def test_doctor_finds_nothing_on_a_cluster_that_is_ready(kubectl, capsys):
    healthy(kubectl)
    assert cluster("doctor", "--overlay", "gpu") == 0, capsys.readouterr()
    out = capsys.readouterr().out
    assert "BAD" not in out
    assert "ok  GPUs: 8 on 1 nodes, train takes up to 8" in out


@pytest.mark.parametrize(
    ("command", "answer", "said"),
    [
        ("version", {"serverVersion": {"major": "1", "minor": "29", "gitVersion": "v1.29.0"}}, "checked against 1.31"),
        ("get deployments", {"items": []}, "operator: KubeRay is not installed: helm upgrade --install"),
        ("get nodes", {"error": "nodes is forbidden"}, "GPUs: cannot be looked at: kubectl get: nodes is forbidden"),
        ("get customresourcedefinitions", {"items": []}, "rayjobs.ray.io, rayservices.ray.io not installed"),
        (
            "get customresourcedefinitions",
            {"items": [{"metadata": {"name": f"{kind}.ray.io"}} for kind in ("rayjobs", "rayservices")]},
            "older than the operator",
        ),
        ("get nodes", {"items": [{"status": {"allocatable": {}}}]}, "0 on 1 nodes, train takes up to 8; what is"),
        ("get storageclasses", {"items": []}, "no storage class is the default; give store one of these"),
        (
            "get storageclasses",
            {"items": [{"metadata": {"name": "gp3", "annotations": DEFAULT}, "provisioner": "ebs.csi.aws.com"}]},
            "store must be shared by nodes, ebs.csi.aws.com cannot",
        ),
        (
            "get resourcequotas",
            {"items": [{"metadata": {"name": "chatglm3"}, "status": {"hard": {GPU: "8"}, "used": {GPU: "4"}}}]},
            "requests.nvidia.com/gpu has 4 of 8 left, train takes up to 8; serve takes up to 8: raise it",
        ),
        ("get secret valkey", "", "secret valkey: is not in chatglm3: make it"),
    ],
)  # fmt: skip
def test_doctor_names_what_is_wrong_and_the_remedy(kubectl, capsys, command, answer, said):
    healthy(kubectl)
    kubectl.answer(command, answer)
    assert cluster("doctor", "--overlay", "gpu") == 1
    out, error = capsys.readouterr()
    [line] = [line for line in out.splitlines() if line.startswith("BAD")]
    assert said in line
    assert "1 of these would keep gpu from running" in error


def test_doctor_wants_a_token_and_the_feature_gate_of_the_nightly_job(kubectl):
    without = {"kind": "RayJob", "spec": {"rayClusterSpec": {"rayVersion": "2.60.0"}}}
    finding = examination._auth({"train": [without]})
    assert (finding.is_well, finding.text.split(":")[0]) == (
        False,
        "whoever reaches the Ray ports of train runs code there",
    )
    healthy(kubectl)
    nightly = {"evaluate": [{"kind": "RayCronJob"}]}
    assert [finding.is_well for finding in examination._operator(nightly)] == [True, True]
    container = {"image": "quay.io/kuberay/operator:v1.7.0"}
    off = {"status": {"readyReplicas": 1}, "spec": {"template": {"spec": {"containers": [container]}}}}
    kubectl.answer("get deployments", {"items": [off]})
    assert [finding.is_well for finding in examination._operator(nightly)] == [True, False]


@pytest.mark.parametrize(
    ("quantity", "amount"),
    [("1500m", "1.5"), ("2Gi", "2147483648"), ("8", "8"), ("1.5", "1.5"), ("2Ti", "2199023255552")],
)
def test_quantities_are_read_as_kubernetes_does(quantity, amount):
    assert str(examination._amount(quantity)) == amount


def test_kubectls_own_errors_are_one_line_with_a_remedy(kubectl, capsys, monkeypatch):
    refused = "The connection to the server localhost:8080 was refused - did you specify the right host or port?"
    kubectl.answer("get rayjob", {"error": f"E1124 memcache.go\n{refused}"})
    assert cluster("wait", "train") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert refused in error
    assert "set KUBECONFIG" in error
    monkeypatch.setenv("PATH", "/nowhere")
    assert cluster("status") == 1
    assert "kubectl is not on PATH; install it" in capsys.readouterr().err


def test_the_command_starts_without_torch_and_ray():
    check = (
        "import sys; import cluster.manifests, cluster.following, cluster.rollouts, cluster.doctor, cluster.__main__; "
    )
    check += "sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
