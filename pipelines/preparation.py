"""Raw question-answer shards in; checked, split instruction rows and a report to look at out."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import Field

from chatglm3 import load_tokenizer
from chatglm3.documents import format_digest
from cluster import storage
from cluster.config import Config
from cluster.errors import StageError
from cluster.progress import track
from pipelines.data_report import RowStatistics, write_report
from pipelines.recipe import Recipe, Row, multidoc_row, on_dev_side, seed_row, without_dev_documents
from pipelines.shards import BadRow, Sample, find_shards, normal, read_shard

ROWS_PER_FILE = 10_000


class PrepareConfig(Config):
    """Check Multi-Doc-QA shards, split them by document and write instruction rows for training.

    Writes OUT/train/*.jsonl, OUT/dev/*.jsonl, report.html to look at, report.json, and quarantine.jsonl with each bad
    row's file, line and reason.
    """

    raw: str = "out/raw"
    """Folder of shards: JSON Lines files named *.json."""
    out: str = "out/data"
    """Folder to write."""
    preset: Literal["multidoc", "seed"] = "multidoc"
    """multidoc: numbered documents with distractors, cited answers; seed: the predecessor's single document."""
    tokenizer: str = "tiny"
    """Model folder whose tokenizer measures lengths (multidoc)."""
    max_tokens: int = Field(4096, ge=256)
    """Longest example in tokens; documents are cut to fit, the question and the answer never (multidoc)."""
    distractors: int = Field(4, ge=0)
    """Wrong documents beside the golden one, half of them hard ones where the data marks some (multidoc)."""
    refusal_share: float = Field(0.1, ge=0, le=1)
    """Share of rows without the golden document, whose answer is a refusal (multidoc)."""
    dev_share: float = Field(0.1, ge=0, lt=1)
    """Share of documents set aside, with all their questions, for evaluation."""
    max_bad_share: float = Field(0.05, ge=0, le=1)
    """Largest share of bad rows that is quarantined; above it the stage fails."""
    strict: bool = False
    """Fail at the first bad row instead."""
    seed: int = 42
    """Seed of the split and of every random choice."""


def prepare(config: PrepareConfig) -> str:
    """Turn raw shards into training rows and return the data folder."""
    shards = find_shards(config.raw)
    receipt = storage.receipt_of("prepare", config, inputs={str(path): storage.file_digest(path) for path in shards})
    with storage.publish(config.out, receipt) as folder:
        counts = write_rows(config, shards, folder)
        receipt.counts.update(counts)
        receipt.facts.update(preset=config.preset, prompt_digest=format_digest(), dataset=_dataset_digest(folder))
    rows = f"{counts['train']} training and {counts['dev']} dev rows"
    print(f"prepare: {rows}, {counts['bad']} bad, {counts['duplicates']} duplicates -> {config.out}/report.html")
    if not counts["dev"]:
        print("prepare: no document fell on the dev side; raise --dev_share if you want to evaluate")
    return config.out


def write_rows(config: PrepareConfig, shards: list[Path], folder: Path) -> dict[str, int]:
    """Write rows, quarantine and report under `folder`; returns the counts. Raises StageError for too bad input."""
    make_row = _row_maker(config)
    statistics = RowStatistics()
    bad: list[BadRow] = []
    seen: set[bytes] = set()
    with ExitStack() as files:
        writers = {side: _RowWriter(folder / side, files) for side in ("train", "dev")}
        quarantine = files.enter_context((folder / "quarantine.jsonl").open("w", encoding="utf-8"))
        for item in _read(shards):
            statistics.seen += 1
            if isinstance(item, BadRow):
                _reject(item, config, bad, quarantine)
            elif (key := _key(item)) in seen:
                statistics.duplicates += 1
            else:
                seen.add(key)
                side = "dev" if on_dev_side(item.positive, config.dev_share, config.seed) else "train"
                if side == "train":
                    item = without_dev_documents(item, config.dev_share, config.seed)
                row = make_row(item)
                writers[side].write(row)
                statistics.add(side, row, item)
    _check_share(config, bad, statistics.seen)
    if not statistics.rows["train"]:
        raise StageError(f"--raw {config.raw}: no row is left for training; look at the shards or lower --dev_share")
    write_report(folder, config.model_dump(), statistics, bad)
    return {**statistics.rows, "bad": len(bad), "duplicates": statistics.duplicates, "seen": statistics.seen}


def _read(shards: list[Path]) -> Iterator[Sample | BadRow]:
    for path in track(shards, "prepare"):
        yield from read_shard(path)


def _row_maker(config: PrepareConfig) -> Any:
    if config.preset == "seed":
        return seed_row
    tokenizer = load_tokenizer(config.tokenizer)
    recipe = Recipe(config.distractors, config.refusal_share, config.max_tokens, config.seed)
    return lambda sample: multidoc_row(sample, recipe, tokenizer)


def _key(sample: Sample) -> bytes:
    """Samples with the same question, answer and document are one."""
    parts = (sample.question, sample.answer, sample.positive)
    return hashlib.sha256("\0".join(map(normal, parts)).encode()).digest()


def _reject(row: BadRow, config: PrepareConfig, bad: list[BadRow], quarantine: IO[str]) -> None:
    if config.strict:
        raise StageError(f"{_place(row)}: {row.reason}; mend the row, or leave out --strict to quarantine it")
    bad.append(row)
    quarantine.write(json.dumps(row.__dict__, ensure_ascii=False) + "\n")


def _check_share(config: PrepareConfig, bad: list[BadRow], seen: int) -> None:
    if len(bad) > config.max_bad_share * seen:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in Counter(b.reason for b in bad).most_common(3))
        raise StageError(
            f"--raw {config.raw}: {len(bad)} of {seen} rows are bad ({reasons}; the first is {_place(bad[0])}); "
            f"mend them or raise --max_bad_share {config.max_bad_share}"
        )


def _place(row: BadRow) -> str:
    return f"{row.file}:{row.line}" if row.line else row.file


class _RowWriter:
    """JSON Lines files of ROWS_PER_FILE rows in one folder."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        folder.mkdir()
        self.folder, self.files, self.count = folder, files, 0

    def write(self, row: Row) -> None:
        if self.count % ROWS_PER_FILE == 0:
            path = self.folder / f"part-{self.count // ROWS_PER_FILE:05d}.jsonl"
            self.file = self.files.enter_context(path.open("w", encoding="utf-8"))
        self.file.write(_one_line(json.dumps(row, ensure_ascii=False)) + "\n")
        self.count += 1


def _one_line(text: str) -> str:
    """JSON text with Unicode's other line ends escaped: many readers, Ray Data's among them, split lines there."""
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085")


def _dataset_digest(folder: Path) -> str:
    """sha256 over the names and contents of all row files: the identity of the data set."""
    files = sorted(folder.glob("*/*.jsonl"))
    lines = [f"{path.relative_to(folder)} {storage.file_digest(path)}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
