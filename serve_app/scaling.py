"""Autoscaling by what waits to be read: ten long prompts are more work than a hundred short ones."""

from typing import Any

from ray.serve.config import AutoscalingContext

WAITING_TOKENS = "waiting_tokens"


class ByWaitingTokens:
    """A policy for `autoscaling_config.policy`: as many replicas as bring what waits down to `tokens` a replica.

    Ongoing requests still count (the deployment's target_ongoing_requests): what needs more replicas decides. Limits
    and delays are Serve's.
    """

    def __init__(self, tokens: int = 16_384) -> None:
        """`tokens`: prompt tokens that a replica may have before it; at 16,000 a second, that many is a second."""
        if tokens < 1:
            raise ValueError(f"policy_kwargs tokens must be at least 1, not {tokens}")
        self._tokens = tokens

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """How many replicas are wanted, and no state."""
        waiting = sum((context.aggregated_metrics or {}).get(WAITING_TOKENS, {}).values())
        assert context.config, "Serve gives the deployment's autoscaling_config"
        requests = context.total_num_requests / context.config.get_target_ongoing_requests()
        return max(waiting / self._tokens, requests), {}
