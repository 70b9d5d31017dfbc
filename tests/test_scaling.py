"""Replicas by the prompt tokens that wait, as Ray Serve's own controller asks for them."""

import pytest
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from serve_app.scaling import ByWaitingTokens


def context(waiting: list[int], requests: int) -> AutoscalingContext:
    """Two replicas with that much before them."""
    deployment = DeploymentID("ChatServer", "chat")
    replicas = [ReplicaID(name, deployment) for name in ("one", "two")]
    return AutoscalingContext(
        deployment_id=deployment,
        deployment_name="ChatServer",
        app_name="chat",
        current_num_replicas=2,
        target_num_replicas=2,
        running_replicas=replicas,
        total_num_requests=requests,
        total_queued_requests=0,
        aggregated_metrics={"waiting_tokens": dict(zip(replicas, waiting, strict=True))} if waiting else None,
        raw_metrics=None,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=AutoscalingConfig(target_ongoing_requests=16, max_replicas=8),
    )


@pytest.mark.parametrize(
    ("waiting", "requests", "replicas"),
    [([30_000, 10_000], 4, 4.0), ([0, 0], 48, 3.0), ([10_000, 0], 16, 1.0), ([], 8, 0.5)],
    ids=["a few long prompts", "many short ones", "little of both", "no figures yet"],
)
def test_the_larger_need_decides(waiting: list[int], requests: int, replicas: float):
    assert ByWaitingTokens(tokens=10_000)(context(waiting, requests)) == (replicas, {})


def test_it_is_found_by_the_name_that_stands_in_a_config_file():
    config = {"policy_function": "serve_app.scaling:ByWaitingTokens", "policy_kwargs": {"tokens": 10_000}}
    policy = AutoscalingConfig(max_replicas=8, policy=AutoscalingPolicy(**config)).policy
    assert _resolve_policy_callable(policy)(context([30_000, 10_000], 4)) == (4.0, {})


def test_a_target_that_is_none_is_refused():
    with pytest.raises(ValueError, match="must be at least 1, not 0"):
        ByWaitingTokens(tokens=0)
