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
        standing: Standing = await self._asked("admit", name, limits)
        return standing

    async def reserve(self, name: str, limits: Limits, tokens: int) -> Standing:
        """See `Ledger.reserve`."""
        standing: Standing = await self._asked("reserve", name, limits, tokens)
        return standing

    async def settle(self, name: str, limits: Limits, tokens: int) -> None:
        """See `Ledger.settle`."""
        await self._asked("settle", name, limits, tokens)

    async def _asked(self, method: str, *arguments: Any) -> Any:
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await getattr(self._server, method).remote(*arguments)
        except (TimeoutError, RayError, RayServeException) as error:
            log.warning("the ledger of API keys does not answer (%r); this replica counts alone", error)
            return await getattr(self._alone, method)(*arguments)
