"""The Ray Serve application: replicas of a server that each hold one engine."""

import logging
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import click
import torch
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.context import _get_global_client  # the only way to the host that is listened on
from ray.serve.handle import DeploymentHandle

from chatglm3.chat import PromptFormat
from chatglm3.checkpoint import read_config
from chatglm3.engines.choice import native_folder
from chatglm3.errors import ModelError
from chatglm3.folder import model_folder, read_json
from chatglm3.tokenizer import load_tokenizer
from chatglm3.weights import open_weights
from cluster.errors import StageError
from cluster.storage import RECEIPT, read_receipt
from serve_app import front
from serve_app.adapter_args import AdapterCheck, check_adapters
from serve_app.app_args import AppArgs
from serve_app.document_reader import DocumentStyle, document_style
from serve_app.engine_server import LAST_WORDS_S, EngineReplica, EngineServer, engine_of_this_replica, join_serve_log
from serve_app.metering import MeteredEngine
from serve_app.metrics import Metrics
from serve_app.port_check import refuse_taken_port
from serve_app.ray_metrics import RaySink
from serve_app.remote_engine import RemoteEngine
from serve_app.routes import make_api
from serve_app.shared_ledger import LedgerServer, SharedLedger

log = logging.getLogger(__name__)


def build(args: AppArgs) -> Application:
    """The application, for `serve run serve_app.app:build model=DIR` and for `import_path` in a Serve config file.

    Opens the model folder here too, without reading the weights: what is wrong with it is then one line, and not the
    end of a traceback for each replica that tried.
    """
    refuse_taken_port()
    try:
        folder = _finished_folder(args.model)
        read_config(folder)
        open_weights(folder)
        if args.engine == "vllm":
            native_folder(folder)
        load_tokenizer(folder)
        prompt_format, style = _asked_as(folder, args.model)
        files = front.check_files(args)
        adapters = check_adapters(args.adapters, args.adapter_dir, prompt_format, style, args.engine)
    except (ModelError, StageError) as error:
        raise click.ClickException(str(error)) from None
    # Replicas run in other working folders, so the path must not be relative.
    located = args.model_copy(
        update={"model": str(folder.resolve()), "name": args.name or Path(args.model).name, **files, **adapters}
    )
    # Limits are a key's, wherever its requests end up: one ledger counts for all replicas.
    ledger = LedgerServer.bind() if args.api_keys else None  # type: ignore[attr-defined]  # Serve's decorator adds it
    # Without num_gpus all replicas would take their node's first GPU. A config file's own ray_actor_options take the
    # place of these.
    gpus = {"num_gpus": args.tensor_parallel if torch.cuda.is_available() else 0}
    application: Application
    if args.separate_engines:
        engines = EngineServer.options(ray_actor_options=gpus).bind(located)  # type: ignore[attr-defined]
        # A request that waits for an engine is one of its own; and it must find a place where engines take all CPUs.
        http = {"max_ongoing_requests": 1000, "ray_actor_options": {"num_cpus": 0}}
        application = ChatServer.options(**http).bind(located, ledger, engines)  # type: ignore[attr-defined]
    else:
        application = ChatServer.options(ray_actor_options=gpus).bind(located, ledger)  # type: ignore[attr-defined]
    return application


def _finished_folder(model: str) -> Path:
    """The model's folder. ModelError for an adapter, and where merge has not come to its end."""
    folder = model_folder(model)
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{model} is an adapter, but a model is needed here; fold it into its base first: "
            f"python -m pipelines merge --adapter {model} --out DIR"
        )
    if read_json(folder / "config.json").get("model_type") == "glm" and read_receipt(folder) is None:
        raise ModelError(f"{model} has no {RECEIPT}: merge did not finish there; run it again")
    return folder


@serve.deployment(max_ongoing_requests=32, max_queued_requests=64, max_constructor_retry_count=2)
@serve.ingress()
class ChatServer(EngineReplica):
    """The HTTP API, and one engine unless `engines` has them. Replicas, GPUs and queues are options of the deployment,
    in the config file."""

    def __init__(
        self,
        args: AppArgs,
        ledger: DeploymentHandle[Any] | None = None,
        engines: DeploymentHandle[Any] | None = None,
    ) -> None:
        join_serve_log()
        self._args = args
        self._ledger = SharedLedger(ledger) if ledger else None
        self._metrics = Metrics(args.name, [RaySink(serve.get_replica_context().replica_tag)])
        _warn_of_open_door(args)
        engine = RemoteEngine(engines, args) if engines else engine_of_this_replica(args, LAST_WORDS_S)
        self._prompt_format, self._style = _asked_as(args.model, args.model)
        check = AdapterCheck(engine.adapters, self._prompt_format, self._style)
        self._engine = MeteredEngine(engine, self._metrics, args.max_prompt_tokens, check)

    def __serve_build_asgi_app__(self) -> FastAPI:
        args = self._args
        api = make_api(
            self._engine,
            load_tokenizer(args.model),
            args.name,
            self._prompt_format,
            self._style,
            max_body_bytes=args.max_body_bytes,
            max_prompt_tokens=args.max_prompt_tokens,
            on_answer=self._metrics.answered,
        )
        front.install(api, args, self._engine, self._metrics, ledger=self._ledger, behind_serve=True)
        return api


def _warn_of_open_door(args: AppArgs) -> None:
    serving = _get_global_client()
    assert serving, "a replica is part of a Serve instance"
    host = serving.http_config.host
    if not args.api_keys and host and not _is_loopback(host):
        log.warning(
            "EVERYBODY WHO REACHES %s MAY USE THIS MODEL: it listens beyond this machine, without API keys. Make some "
            "(python -m serve_app keys add NAME --file FILE) and give api_keys: FILE, or listen on 127.0.0.1",
            host,
        )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def _asked_as(folder: str | Path, name: str) -> tuple[PromptFormat, DocumentStyle]:
    """How the model in `folder` was taught to be asked, and to read documents.

    ModelError, which calls it `name`, if no prompt of this version is the one that it was taught.
    """
    receipt = read_receipt(folder)
    # A folder that no stage of ours wrote is asked as a chat.
    facts = receipt.facts if receipt else {}
    return facts.get("prompt_format", "chat"), document_style(facts, name)
