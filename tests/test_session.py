"""The private Ray session of a stage, beside other clusters on the machine."""

import os

import pytest
import ray
from ray.util.state import get_actor
from ray.util.state.exception import RayStateApiException

pytestmark = pytest.mark.slow


@ray.remote(num_cpus=0)
class Watcher:
    """Asks as Ray Train's guard of a run's resources does, which takes an actor that nobody knows for dead."""

    def alive(self) -> bool:
        return get_actor(ray.get_runtime_context().get_actor_id(), timeout=10) is not None


def test_no_other_cluster_is_asked_whether_an_actor_of_a_private_session_lives(ray_cluster: None) -> None:
    # Ray's own choice is port 8265, where the dashboard of any other cluster answers that it knows no such actor.
    with pytest.raises(RayStateApiException, match=r"127\.0\.0\.1:9/"):
        ray.get(Watcher.remote().alive.remote())
    assert "RAY_API_SERVER_ADDRESS" not in os.environ  # `ray job submit` goes by it
