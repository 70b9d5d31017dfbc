"""GET /v1/models: the model that is served, and its adapters."""

import time

from fastapi import FastAPI

from chatglm3.engines import AdapterFolders
from serve_app.errors import ApiError
from serve_app.schema import ModelCard, ModelList


class Models:
    """What a request's `model` can name."""

    def __init__(self, name: str, adapters: AdapterFolders) -> None:
        """`name` is the model's own, also where an adapter has it."""
        self._name = name
        self._adapters = adapters
        self._created = int(time.time())

    def adapter(self, name: str) -> str:
        """The adapter that is meant, "" for the model itself. ApiError if there is nothing of that name."""
        if name == self._name:
            return ""
        if name not in self._adapters.names():
            served = ", ".join(map(repr, [self._name, *self._adapters.names()][:20]))
            raise ApiError(
                404, f"model {name!r} is not served here; these are: {served}", param="model", code="model_not_found"
            )
        return name

    def cards(self) -> list[ModelCard]:
        """The model first."""
        others = [name for name in self._adapters.names() if name != self._name]
        return [self.card(name) for name in (self._name, *others)]

    def card(self, name: str) -> ModelCard:
        """The card of a model or an adapter. ApiError if there is nothing of that name."""
        return ModelCard(id=name, created=self._created, parent=self._name if self.adapter(name) else None)


def add_routes(api: FastAPI, models: Models) -> None:
    """Give `api` the routes."""

    @api.get("/v1/models", name="models")
    async def listed() -> ModelList:
        """The model that is served, and its adapters."""
        return ModelList(data=models.cards())

    @api.get("/v1/models/{model:path}", name="model")
    async def one(model: str) -> ModelCard:
        """The model or adapter called `model`."""
        return models.card(model)
