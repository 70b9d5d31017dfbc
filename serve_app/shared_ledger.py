"""One ledger for all replicas: a deployment of its own, which Serve keeps alive, and a handle to it."""

import asyncio
import logging
from dataclasses import replace
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.keys import Limits
from serve_app.ledger import LocalLedger, Standing

log = logging.getLogger(__name__)

PATIENCE_S = 1.0
PATIENCE_TO_SETTLE_S = 10.0


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
        return await self._asked("admit", name, limits)

    async def reserve(self, name: str, limits: Limits, tokens: int) -> Standing:
        """See `Ledger.reserve`."""
        return await self._asked("reserve", name, limits, tokens)

    async def settle(self, name: str, limits: Limits, tokens: int, reserved: Standing | None = None) -> None:
        """See `Ledger.settle`. The answer has been sent, so nobody waits for it."""
        if reserved and reserved.is_alone:
            await self._alone.settle(name, limits, tokens)
            return
        try:
            async with asyncio.timeout(PATIENCE_TO_SETTLE_S):
                await self._server.settle.remote(name, limits, tokens)
        except (TimeoutError, RayError, RayServeException) as error:
            log.warning("the ledger of API keys does not answer (%r); %d tokens of %s uncounted", error, tokens, name)

    async def _asked(self, method: str, *arguments: Any) -> Standing:
        standing: Standing
        try:
            async with asyncio.timeout(PATIENCE_S):
                standing = await getattr(self._server, method).remote(*arguments)
                return standing
        except (TimeoutError, RayError, RayServeException) as error:
            log.warning("the ledger of API keys does not answer (%r); this replica counts alone", error)
            standing = await getattr(self._alone, method)(*arguments)
            return replace(standing, is_alone=True)
