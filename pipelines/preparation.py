"""Raw question-answer shards in; checked, cleaned, split training rows and a report to look at out."""

import hashlib
import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from chatglm3 import load_tokenizer
from chatglm3.documents import format_digest
from cluster import session, storage
from cluster.config import Config
from cluster.errors import StageError
from pipelines.rows.corpus import read_documents, write_corpus
from pipelines.rows.data_report import Account, write_report
from pipelines.rows.data_statistics import Statistics
from pipelines.rows.lines import Piece, cut
from pipelines.rows.planning import Choices, Plan, make_plan
from pipelines.rows.recipe import Recipe
from pipelines.rows.row_files import Order, one_line, write_part
from pipelines.rows.shards import BadRow, find_shards, unreadable
from pipelines.rows.streaming import Item, Result, stream
from pipelines.rows.survey import Findings, Rules, examine, join


class PrepareConfig(Config):
    """Check raw shards, drop copies, split by document and write rows for training.

    Rows are Multi-Doc-QA (`QA`, `positive_doc`, `negative_doc`), the predecessor's `instruction` and `output`, or
    ChatGLM3's `conversations` with tools and `loss`. Writes OUT/train/*.jsonl, OUT/dev/*.jsonl, report.html to look at,
    report.json, sources.jsonl (which line each row came from) and quarantine.jsonl (each bad line and why it is bad).
    """

    raw: str = "out/raw"
    """Folder of shards: JSON Lines files named *.json."""
    jsonl: bool = False
    """Read *.jsonl files too."""
    out: str = "out/data"
    """Folder to write. Nodes of a cluster must share it and --raw."""
    preset: Literal["multidoc", "seed", "chat"] = "multidoc"
    """What document questions become. multidoc: numbered documents with distractors, quoted and cited answers; seed:
    the predecessor's single document; chat: nothing, only conversations are taken."""
    tokenizer: str = "tiny"
    """Model folder whose tokenizer measures lengths: give the model that is to be trained."""
    max_tokens: int = Field(4096, ge=256, le=32768)
    """Longest example in tokens; documents are cut to fit, the question and the answer never."""
    distractors: dict[int, float] = Field({2: 0.2, 4: 0.4, 6: 0.2, 9: 0.2}, min_length=1)
    """Wrong documents beside the golden one, and how often so many; a single number is for all rows (multidoc)."""
    hard_share: float = Field(0.5, ge=0, le=1)
    """Share of them that look right: marked as hard by the data, or else nearest to the question by BM25 (multidoc)."""
    hard_from: Literal["row", "corpus"] = "row"
    """Where they come from. row: the row's own negatives; corpus: the golden documents of all other rows too, for data
    with few negatives or none (multidoc)."""
    golden_only_share: float = Field(0.1, ge=0, le=1)
    """Share of samples whose golden document stands alone (multidoc)."""
    refusal_share: float = Field(0.15, ge=0, le=1)
    """Share of samples without the golden document, whose answer is a refusal (multidoc)."""
    twin_share: float = Field(0.05, ge=0, le=1)
    """Share of samples that give two rows: one to answer, and one to refuse, with the hardest distractor in the golden
    document's place (multidoc)."""
    quotes: bool = True
    """Answers begin with the words of the document that they rest on (multidoc)."""
    quote_recall: float = Field(0.5, gt=0, le=1)
    """Share of the answer's character pairs that a quote must hold; below it the answer goes without (multidoc)."""
    replay: str = ""
    """Folder of general conversations to mix into training, against forgetting; *.jsonl files are read there too."""
    replay_share: float = Field(0.1, gt=0, lt=1)
    """Their share of the training samples, if the folder has as many."""
    near_copies: float = Field(0.8, gt=0.5, le=1)
    """Jaccard similarity from which documents are nearly the same: they stand on one side of the split, and a question
    asked twice of them is dropped. 1 looks for exact copies only."""
    mask_personal_data: bool = False
    """Put words for phone numbers, identity card numbers and e-mail addresses."""
    triples: int = Field(0, ge=0)
    """Write OUT/triples too, for training a retriever: question, document, and so many hard negatives at most."""
    dev_share: float = Field(0.1, ge=0, lt=1)
    """Share of document groups set aside, with all their questions, for evaluation; none with more than twice this
    share of the rows."""
    max_bad_share: float = Field(0.05, ge=0, le=1)
    """Largest share of bad rows, or of bytes in unreadable files, that is quarantined; above it the stage fails."""
    strict: bool = False
    """Fail at the first bad row instead."""
    workers: int = Field(0, ge=0)
    """CPUs to use; 0: all of the cluster. The rows do not depend on it."""
    seed: int = Field(42, ge=0)
    """Seed of the split and of every random choice."""

    @field_validator("distractors", mode="before")
    @classmethod
    def _one_number_for_all(cls, value: Any) -> Any:
        return {value: 1.0} if isinstance(value, int) else value

    @model_validator(mode="after")
    def _shares_add_up(self) -> Self:
        if min(self.distractors) < 0 or min(self.distractors.values()) < 0:
            raise ValueError("distractors maps numbers from 0 up to their shares, for example {2: 0.5, 4: 0.5}")
        if abs(sum(self.distractors.values()) - 1) > 0.01:
            raise ValueError(f"the shares of distractors add up to {sum(self.distractors.values()):g}, not to 1")
        if self.golden_only_share + self.refusal_share + self.twin_share > 1.0001:
            raise ValueError("golden_only_share, refusal_share and twin_share add up to more than 1")
        return self


def prepare(config: PrepareConfig) -> str:
    """Turn raw shards into training rows and return the data folder."""
    storage.check_output(config.out, "prepare", filter(None, (config.raw, config.replay)))
    shards = find_shards(config.raw, config.jsonl)
    replay = find_shards(config.replay, jsonl=True, flag="--replay") if config.replay else []
    tokenizer = load_tokenizer(config.tokenizer).fingerprint
    session.connect()
    files = [*shards, *replay]
    receipt = storage.receipt_of("prepare", config)
    with storage.publish(config.out, receipt) as folder, _beside(storage.file_digest, files) as digests:
        account = write_data(config, files, len(shards), folder)
        receipt.inputs.update(zip(_names(files, 0), digests, strict=True))
        dataset = _dataset_digest(folder)
        write_report(folder, account, dataset, config.model_dump())
        receipt.facts.update(preset=config.preset, prompt_digest=format_digest(), tokenizer=tokenizer, dataset=dataset)
        receipt.counts.update(_counts(account))
    _announce(config, receipt.counts)
    return config.out


def write_data(config: PrepareConfig, files: list[Path], num_raw: int, folder: Path) -> Account:
    """Write rows, sources and quarantine under `folder`; returns an account of them.

    `files` are the raw shards and, from the `num_raw`th on, those to replay. Raises StageError for too bad input.
    """
    names, reasons = _names(files, num_raw), [unreadable(path) for path in files]
    refused = [BadRow(name, 0, why, "", why) for name, why in zip(names, reasons, strict=True) if why]
    if refused and config.strict:
        _refuse(refused[0])
    readable = [index for index, reason in enumerate(reasons) if not reason]
    pieces = [(index, piece) for index in readable for piece in cut(files[index], name=names[index])]
    found = survey_pieces(config, pieces, num_raw)
    found.bad = [*refused, *found.bad]
    sizes = [path.stat().st_size for path in files]
    _check_share(config, found, sum(itertools.compress(sizes, reasons)) / max(sum(sizes), 1))
    shard_of_piece = np.array([index for index, _ in pieces], int)
    plan = make_plan(found, shard_of_piece, num_raw, Choices(**config.model_dump(include=_fields(Choices))))
    if not any(part.side == "train" for part in plan.parts):
        raise StageError(f"--raw {config.raw}: no row is left for training; look at the shards or lower --dev_share")
    _write_lines(folder / "quarantine.jsonl", (asdict(row) for row in found.bad))
    _write_lines(folder / "sources.jsonl", _sources(plan, found, [piece.name for _, piece in pieces]))
    for side in ("train", "dev"):
        (folder / side).mkdir()
    statistics = Statistics()
    order = _order(config, files, plan, folder)
    with _corpus(config, plan, order) as order:
        for part in stream(write_part, plan.parts, "write rows", config.workers, order=order):
            statistics.add(part)
    num_bad = len(found.bad) - len(refused)
    return Account(
        lines={"read": found.lines, "blank": found.blank, "good": len(found.records), "bad": num_bad},
        files_refused=len(refused),
        bad=dict(Counter(row.kind for row in found.bad if row.line).most_common()),
        dropped=dict(plan.dropped),
        leaks=plan.leaks | {"dev_documents_in_training_prompts": statistics.documents_seen(plan.dev_documents)},
        statistics=statistics,
        quarantine=found.bad,
    )


def survey_pieces(config: PrepareConfig, pieces: list[tuple[int, Piece]], num_raw: int) -> Findings:
    """The first pass. Raises StageError at the first bad row if the config is strict."""
    jobs = [
        (number, piece, Rules(config.preset if shard < num_raw else "chat", **config.model_dump(include=_LENGTH)))
        for number, (shard, piece) in enumerate(pieces)
    ]
    parts = []
    for part in stream(_examine, jobs, "check rows", config.workers):
        parts.append(part)
        if config.strict and part.bad:
            _refuse(join([piece for _, piece in pieces[: len(parts)]], parts).bad[0])
    return join([piece for _, piece in pieces], parts)


_LENGTH = {"tokenizer", "max_tokens", "mask_personal_data"}


def _names(files: list[Path], num_raw: int) -> list[str]:
    """What reports call the files: raw shards by their names, the others by their paths."""
    # A file's name may be any bytes, and is to be written as UTF-8.
    names = [path.name if index < num_raw else str(path) for index, path in enumerate(files)]
    return [os.fsencode(name).decode("utf-8", "backslashreplace") for name in names]


@contextmanager
def _beside(function: Callable[[Item], Result], items: list[Item]) -> Iterator[Iterator[Result]]:
    """The results of `function`, which a thread works at meanwhile; after an error the rest is left undone."""
    thread = ThreadPoolExecutor(1)
    futures = [thread.submit(function, item) for item in items]
    try:
        yield (future.result() for future in futures)
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


def _examine(job: tuple[int, Piece, Rules]) -> Findings:
    number, piece, rules = job
    return examine(piece, number, rules)


def _refuse(row: BadRow) -> NoReturn:
    raise StageError(f"{row.place}: {row.reason}; mend the row, or leave out --strict to quarantine it")


def _check_share(config: PrepareConfig, found: Findings, unreadable_share: float) -> None:
    """Raise StageError where too many rows are bad, or too great a share of the bytes lies in unreadable files."""
    rows = len(found.records) + len(found.bad)
    if max(len(found.bad) / max(rows, 1), unreadable_share) > config.max_bad_share:
        reasons = ", ".join(f"{count} x {why}" for why, count in Counter(b.kind for b in found.bad).most_common(3))
        raise StageError(
            f"--raw {config.raw}: {len(found.bad)} of {rows} rows are bad ({reasons}; the first is "
            f"{found.bad[0].place}); mend them or raise --max_bad_share {config.max_bad_share}"
        )


def _order(config: PrepareConfig, files: list[Path], plan: Plan, folder: Path) -> Order:
    return Order(
        folder=str(folder.resolve()),
        shards=[str(path.resolve()) for path in files],
        recipe=Recipe(**config.model_dump(include=_fields(Recipe))),
        dev_documents=plan.dev_documents,
        negatives=config.triples,
        **config.model_dump(include={"preset", "tokenizer", "mask_personal_data"}),
    )


@contextmanager
def _corpus(config: PrepareConfig, plan: Plan, order: Order) -> Iterator[Order]:
    """`order` with an index of all golden documents, if hard distractors are to come from there, as long as needed."""
    if config.hard_from == "row":
        yield order
        return
    with tempfile.TemporaryDirectory(dir=order.folder) as folder:
        for side, golden in plan.golden.items():
            chunks = [golden.sources[start : start + 1000] for start in range(0, len(golden.sources), 1000)]
            settings = {"shards": order.shards, "mask": config.mask_personal_data}
            parts = stream(read_documents, chunks, "index documents", config.workers, **settings)
            texts = (text for part in parts for text in part)
            if chunks:
                write_corpus(Path(folder, side), texts, golden.digests, golden.groups, golden.sources)
        yield replace(order, corpus=folder)


def _sources(plan: Plan, found: Findings, name_of_piece: list[str]) -> Iterator[dict[str, Any]]:
    for piece, line, key in found.records[["piece", "line", "key"]][plan.order].tolist():
        yield {"id": key.decode(), "file": name_of_piece[piece], "line": line}


def _fields(kind: type[Choices | Recipe]) -> set[str]:
    return {field.name for field in fields(kind)}


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(map(one_line, rows))


def _counts(account: Account) -> dict[str, int]:
    sides = {side: account.statistics.rows[side] for side in ("train", "dev")}
    return {**sides, **account.lines, **{name.replace(" ", "_"): n for name, n in account.dropped.items()}}


def _announce(config: PrepareConfig, counts: Mapping[str, float]) -> None:
    rows = f"{counts['train']} training and {counts['dev']} dev rows"
    copies = f"{counts['exact_copies']} exact and {counts['near_copies']} near copies"
    print(f"prepare: {rows}, {counts['bad']} bad, {copies} dropped -> {config.out}/report.html")
    found = counts["dev"] / (counts["train"] + counts["dev"])
    if config.dev_share and not found:
        print("prepare: no document fell on the dev side; raise --dev_share if you want to evaluate")
    elif not config.dev_share / 2 <= found <= config.dev_share * 2:
        print(
            f"prepare: {found:.0%} of the rows are on the dev side, --dev_share is {config.dev_share:.0%}: documents "
            f"go there in groups of nearly equal ones, with all their questions; another --seed draws others"
        )


def _dataset_digest(folder: Path) -> str:
    """sha256 over the names and contents of all row files: the identity of the data set."""
    files = sorted([*folder.glob("train/*.jsonl"), *folder.glob("dev/*.jsonl")])
    lines = [f"{path.relative_to(folder)} {storage.file_digest(path)}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
