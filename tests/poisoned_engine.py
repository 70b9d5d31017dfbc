"""The application with an engine that one request kills as a fatal error of a GPU does: its process lives on."""

import time
from collections.abc import Sequence

import torch
from ray.serve import Application

from chatglm3.engines.transformers_engine import TransformersEngine
from serve_app import app
from serve_app.app_args import AppArgs

POISON = 666
"""As max_tokens."""

_one_token_on = TransformersEngine._one_token_on


def _poisoned(engine: TransformersEngine, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
    if any(request.sampling.max_tokens == POISON for request in engine.running):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    time.sleep(0.01)  # a tiny model is at its answers' end before their readers are at the beginning
    return _one_token_on(engine, ids, positions)


TransformersEngine._one_token_on = _poisoned


class PoisonedArgs(AppArgs):
    """Bring this module into the replica's process, where they are unpickled."""


def build(args: PoisonedArgs) -> Application:
    return app.build(args)
