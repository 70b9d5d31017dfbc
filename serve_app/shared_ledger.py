"""One ledger for all replicas: a deployment of its own, which Serve keeps alive, and a handle to it."""

import asyncio
import logging
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.keys import Limits
from serve_app.ledger import LocalLedger, Standing

log = logging.getLogger(__name__)

PATIENCE_S = 1.0


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
class LedgerServer(LocalLedger):
    """Counts for everybody. If it is replaced, all buckets are full again: a minute's use is forgotten, no more."""

    def __init__(self) -> None:
        super().__init__()


class SharedLedger:
    """The LedgerServer as seen from a replica. While it cannot be reached, each replica counts alone."""

    def __init__(self, server: DeploymentHandle[Any]) -> None:
        self._server = server
        self._alone = LocalLedger()

    async def admit(self, name: str, limits: Limits) -> Standing:
        """See `Ledger.admit`."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                standing: Standing = await self._server.admit.remote(name, limits)
                return standing
        except (TimeoutError, RayError, RayServeException) as error:
            log.warning("the ledger of API keys does not answer (%r); this replica counts alone", error)
            return await self._alone.admit(name, limits)

    async def charge(self, name: str, limits: Limits, tokens: int) -> None:
        """See `Ledger.charge`."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._server.charge.remote(name, limits, tokens)
        except (TimeoutError, RayError, RayServeException) as error:
            log.warning("the ledger of API keys does not answer (%r); this replica counts alone", error)
            await self._alone.charge(name, limits, tokens)
