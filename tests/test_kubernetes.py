"""The manifests build and are valid, in every combination, on the oldest and the newest Kubernetes they are for."""

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from itertools import chain, combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from cluster.doctor import NEWEST, OLDEST
from tests.kubernetes import JOBS, MANIFESTS, OVERLAYS, STAGES, mixed, objects, overlay

VERSIONS = [".".join(map(str, version)) for version in (OLDEST, NEWEST)]
SECRETS = ("Secret/valkey", "Secret/api-keys", "Secret/s3", "Secret/registry")
OF_STAGE = {
    "platform": ("weights", "network-policy", "monitoring", "kueue-queues"),
    "prepare": ("token-auth", "kueue"),
    "train": ("gpu-train", "token-auth", "kueue", "s3", "spot"),
    "merge": ("gpu-train", "token-auth", "kueue"),
    "evaluate": ("gpu-train", "token-auth", "kueue", "cron", "spot"),
    "serve": ("gpu-serve", "gcs-ft", "token-auth", "api-keys", "haproxy", "spot", "gateway", "incremental-upgrade"),
}


def combined(stage: str) -> Iterator[tuple[str, ...]]:
    """Every combination of a stage's components, but the two that exclude each other."""
    components = OF_STAGE[stage]
    for chosen in chain.from_iterable(combinations(components, count) for count in range(len(components) + 1)):
        if not {"gateway", "incremental-upgrade"} <= set(chosen):
            yield chosen


@pytest.fixture(scope="session")
def validator(shared: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("validate_manifests", shared / "k8s" / "validate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def findings(validator: ModuleType, shared: Path) -> Any:
    def check(*texts: str, version: str = VERSIONS[-1]) -> list[str]:
        checker = validator.Checker(
            shared / "k8s" / "schemas", version, gates={"RayCronJob": True}, external=(*SECRETS, "Secret/api-keys")
        )
        checker.check_text("\n---\n".join(texts), "bundle")
        return [str(finding) for finding in checker.finish()]

    return check


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize("stage", [*JOBS, "serve"])
def test_a_stage_of_an_overlay_beside_its_platform_is_valid(findings, name, stage, version):
    assert findings(overlay(name, "platform"), overlay(name, stage), version=version) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_the_platform_alone_is_valid(findings, version):
    assert findings(overlay("cpu-demo", "platform"), version=version) == []


@pytest.mark.parametrize("stage", [stage for stage in OF_STAGE if stage != "platform"])
def test_components_are_valid_alone_and_in_every_combination(findings, stage, tmp_path):
    platform = overlay("cpu-demo", "platform")
    for number, components in enumerate(combined(stage)):
        text = mixed(tmp_path / str(number), stage, components)
        for version in VERSIONS:
            assert findings(platform, text, version=version) == [], components


def test_components_of_the_platform_are_valid_alone_and_in_every_combination(findings, tmp_path):
    train = overlay("gpu", "train")
    for number, components in enumerate(combined("platform")):
        text = mixed(tmp_path / str(number), "platform", components)
        for version in VERSIONS:
            assert findings(text, train, version=version) == [], components


def test_all_of_the_gpu_overlay_together_is_valid(findings):
    everything = [overlay("gpu", stage) for stage in OF_STAGE]
    unique = {(item["kind"], item["metadata"]["name"]): item for text in everything for item in objects(text)}
    assert findings(yaml.safe_dump_all(unique.values(), sort_keys=False)) == []


def test_the_validator_would_see_a_mistake(findings):
    """A check that finds nothing anywhere proves nothing."""
    text = overlay("cpu-demo", "train")
    assert findings(overlay("cpu-demo", "platform"), text.replace("claimName: store", "claimName: stor"))
    assert findings(
        overlay("cpu-demo", "platform"), re.sub(r"configMap:\n(\s+)name: run-\w+", r"configMap:\n\1name: run", text)
    )
    assert findings(overlay("cpu-demo", "platform"), text.replace("num-cpus", "num_cpus"))


@pytest.mark.parametrize(
    ("stage", "before"), [(stage, "cron" if stage == "evaluate" else OF_STAGE[stage][0]) for stage in STAGES]
)
def test_every_pod_with_our_image_has_the_secret_of_a_private_registry(findings, stage, before, tmp_path):
    text = mixed(tmp_path / "mixed", stage, [before, "private-registry"])
    platform = [text] if stage == "platform" else [mixed(tmp_path / "platform", "platform", []), text]
    assert findings(*platform) == []
    pods = [spec for item in objects(text) for spec in pods_of(item) if "chatglm3-ray" in json.dumps(spec)]
    assert pods
    assert all(spec["imagePullSecrets"] == [{"name": "registry"}] for spec in pods)


def pods_of(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod's spec in an object."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for inner in value.values():
            yield from pods_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pods_of(inner)


def test_every_component_is_used_by_a_combination():
    # Parts of others, what every stage ends with, and what is tried with every stage.
    inner = {"gpu", "finish-job", "finish-service", "private-registry"}
    there = {path.name for path in (MANIFESTS / "components").iterdir()}
    assert there - inner == {name for names in OF_STAGE.values() for name in names}
