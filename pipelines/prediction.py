"""One question, or a conversation in the terminal, with the engine in this process or a model that is served."""

import asyncio
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Annotated

from pydantic import Field

from chatglm3 import ModelError, load_tokenizer, parse_reply
from chatglm3.chat import Message, PromptFormat, question_ids
from chatglm3.documents import documents_prompt
from chatglm3.endpoint import Endpoint, read_api_key
from chatglm3.engines import Engine, EngineError, RequestError, Sampling, load_engine
from chatglm3.reply import SEPARATOR, ReplyStream
from chatglm3.tokenizer import ChatGlmTokenizer
from cluster.config import Config
from cluster.errors import StageError
from pipelines.model_folders import open_model, warn_of_other_wording
from pipelines.one_or_more import ONE_OR_MORE
from pipelines.remote_conversation import RemoteConversation

HELP = "/clear forgets the conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer"


class PredictConfig(Config):
    """Ask a model one question, or without a QUESTION chat with it in the terminal.

    The model is a folder, or with --url one that is served. Only the answer is written to stdout.
    """

    question: Annotated[str | None, "positional"] = None
    """What to ask."""
    model: str = "out/model"
    """Model to ask: `tiny`, an official folder, or one that merge wrote; with --url the name of one served there."""
    url: str = ""
    """Server to ask instead of loading a folder, such as http://127.0.0.1:8000."""
    api_key_file: str = ""
    """File with the key to that server."""
    documents: Annotated[tuple[str, ...], ONE_OR_MORE] = ()
    """Text files to answer from, with commas between them; each is one document."""
    max_tokens: int = Field(512, ge=1)
    """Longest answer in tokens."""
    temperature: float = Field(0.0, ge=0)
    """0 always takes the most probable token; ChatGLM3's own demo uses 0.8."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw among the most probable tokens that together reach this probability."""
    seed: int | None = None
    """The same seed gives the same answer."""


def predict(config: PredictConfig) -> None:
    """Answer one question on stdout, or hold a conversation there."""
    documents = [_read(path) for path in config.documents]
    if config.url:
        return _predict_remotely(config, documents)
    model = open_model(config.model, "--model")
    warn_of_other_wording(model)
    sampling = Sampling(config.max_tokens, config.temperature, config.top_p, seed=config.seed)
    tokenizer = load_tokenizer(model.path)
    engine = load_engine("transformers", model.path, max_batch=1)  # for one person, it starts soonest
    try:
        conversation = Conversation(engine, tokenizer, model.prompt_format, sampling, documents)
        _converse(conversation, config.question, f"{model.name}, {model.prompt_format} format")
    except (RequestError, EngineError) as error:
        raise StageError(str(error)) from None
    finally:
        engine.close()


def _predict_remotely(config: PredictConfig, documents: list[str]) -> None:
    endpoint = Endpoint(config.url, read_api_key(config.api_key_file))
    asked = config.model_dump(include={"max_tokens", "temperature", "top_p", "seed"}, exclude_none=True)
    model = config.model if "model" in config.model_fields_set else asyncio.run(_main_model(endpoint))
    named = list(zip(config.documents, documents, strict=True))
    _converse(RemoteConversation(endpoint, model, asked, named), config.question, f"{model} at {config.url}")


async def _main_model(endpoint: Endpoint) -> str:
    async with endpoint:
        served = await endpoint.models()
    if not served:
        raise StageError(f"--url {endpoint.base} serves no model; start one, or name it by --model")
    return served[0]


def _converse(conversation: "Conversation | RemoteConversation", question: str | None, who: str) -> None:
    if question is None:
        print(f"{who}. {HELP}.", file=sys.stderr)
        chat(conversation)
    else:
        _print_answer(conversation, question)


class Conversation:
    """Questions to one model, which sees the earlier turns; in the bare format each question stands alone."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: ChatGlmTokenizer,
        prompt_format: PromptFormat,
        sampling: Sampling,
        documents: Sequence[str] = (),
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.prompt_format = prompt_format
        self.sampling = sampling
        self.documents = documents
        self.history: list[Message] = []
        self.sources: list[str] = []
        """Nothing: what an answer cites stands in its text."""

    async def ask(self, question: str) -> AsyncGenerator[str, None]:
        """Yield the answer in readable pieces. A turn that is not read to its end is forgotten.

        Raises RequestError when question and history do not fit into the model's context.
        """
        # The documents stand in the first turn; later ones see them there.
        text = documents_prompt(self.documents, question) if self.documents and not self.history else question
        messages = [*self.history, {"role": "user", "content": text}]
        prompt_ids = question_ids(self.tokenizer, messages, self.prompt_format)
        # A bare prompt is answered with text alone, a chat with ChatGLM3's metadata line before it.
        separator_id = self.tokenizer.control_id(SEPARATOR)
        reply, readable = "", ReplyStream(separator_id=separator_id) if self.prompt_format == "chat" else None
        async with aclosing(self.engine.generate(prompt_ids, self.sampling)) as deltas:
            async for delta in deltas:
                reply += delta.text
                yield readable.push(delta.text, delta.token_ids) if readable else delta.text
        if readable:
            yield readable.finish()
            self.history = [*messages, *parse_reply(reply).messages]


def chat(conversation: Conversation | RemoteConversation) -> None:
    """Read questions from stdin and answer them until it ends."""
    with suppress(ImportError):
        import readline  # noqa: F401  # gives input() line editing and the arrow keys
    while (question := _read_question()) != "/quit":
        if question == "/clear":
            conversation.history = []
        elif question:
            try:
                _print_answer(conversation, question)
            except RequestError as error:
                print(f"{error} (/clear forgets the conversation)", file=sys.stderr)
            except ModelError as error:
                print(error, file=sys.stderr)
            except KeyboardInterrupt:
                print("\n(stopped; this turn is forgotten)", file=sys.stderr)


def _read_question() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return "/quit"


def _print_answer(conversation: Conversation | RemoteConversation, question: str) -> None:
    async def print_pieces() -> str:
        answer = ""
        async with aclosing(conversation.ask(question)) as pieces:
            async for piece in pieces:
                print(piece, end="", flush=True)
                answer += piece
        return answer

    answer = asyncio.run(print_pieces())  # Ctrl-C cancels it, and with it the engine's request
    print()
    for source in conversation.sources:
        print(f"  {source}", file=sys.stderr)
    if not answer:
        print("(the model answered nothing)", file=sys.stderr)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"cannot be read ({error.strerror})"
        raise StageError(f"--documents {path} {reason}; name text files, with commas between them") from None
