"""Folders with a receipt: what a stage reads and writes. They appear whole or not at all."""

import glob
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cluster.config import Config
from cluster.errors import StageError

RECEIPT = "receipt.json"
OLD = "-old"
PACKAGES = ("ray", "torch", "transformers", "peft", "bitsandbytes")


@dataclass
class Receipt:
    """What receipt.json says: who wrote the folder, from what, and what the next stage must know."""

    stage: str
    config: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)
    """Path of each input -> sha256 of its content (of its receipt, for a folder of ours)."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What later stages read instead of guessing: prompt_format, base, tokenizer, ..."""
    counts: dict[str, int | float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Folder:
    """A finished stage folder."""

    path: Path
    receipt: Receipt

    @property
    def digest(self) -> str:
        """sha256 of the receipt, which itself pins the folder's inputs and settings."""
        return file_digest(self.path / RECEIPT)


def open_folder(path: str | Path, *stages: str) -> Folder:
    """The folder that one of `stages` (any, if none is named) wrote at `path`.

    Raises StageError when it is missing, has no receipt (that stage did not finish) or is another stage's.
    """
    path = Path(path)
    wanted = " or ".join(stages) or "a stage"
    if not path.is_dir():
        raise StageError(f"{path}: there is no such folder; run {wanted} first, or correct the path")
    receipt = read_receipt(path)
    if receipt is None:
        raise StageError(f"{path} has no {RECEIPT}: {wanted} did not finish there; run it again, or correct the path")
    if stages and receipt.stage not in stages:
        raise StageError(f"{path} was written by {receipt.stage}, but a folder written by {wanted} is needed here")
    return Folder(path, receipt)


def read_receipt(path: str | Path) -> Receipt | None:
    """The receipt in a folder, or None where there is none (a downloaded model, say)."""
    file = Path(path) / RECEIPT
    if not file.is_file():
        return None
    try:
        return Receipt(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise StageError(f"{file} is damaged ({error}); run the stage that wrote the folder again") from None


@contextmanager
def publish(
    out: str | Path, receipt: Receipt, resume: str = "", seal: Callable[[Path], object] | None = None
) -> Iterator[Path]:
    """A temporary folder to write into; on a clean exit it gets the receipt and becomes `out` by one rename.

    After an error nothing is left, unless there is `resume`, a digest of what is made: then what is written stays for
    the next run with the same one, as it does if a run is killed, and stderr says where. A finished folder at `out` is
    replaced; one of somebody else's is refused. `seal` is called with the folder just before it is renamed, receipt
    and all.
    """
    out = check_output(out, receipt.stage, receipt.inputs)
    started = time.monotonic()
    prefix = f".{out.name}.partial-"
    kept = out.parent / f"{prefix}{resume[:8]}" if resume else None
    remove_leftovers(out, kept)
    partial = kept or Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    partial.mkdir(exist_ok=True)
    try:
        yield partial
        # mkdtemp and safetensors keep others out, but pods of other users must read the folder.
        partial.chmod(0o755)
        for path in partial.rglob("*"):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() else 0o644)
        receipt.versions = {name: found for name in PACKAGES if (found := _version(name))}
        receipt.seconds = receipt.seconds or round(time.monotonic() - started, 1)
        text = json.dumps(receipt.__dict__, ensure_ascii=False, indent=2, default=str)
        (partial / RECEIPT).write_text(text + "\n", encoding="utf-8")
        if seal:
            seal(partial)
        if out.exists():
            out.rename(partial.with_name(partial.name + OLD))
        partial.rename(out)
    except BaseException:
        remove_leftovers(out, kept)
        if kept:
            print(
                f"{receipt.stage}: finished files stay in {kept}, and the same command goes on behind them; delete "
                f"the folder to have their room, or to begin anew",
                file=sys.stderr,
            )
        raise
    remove_leftovers(out)


def check_output(out: str | Path, stage: str, inputs: Iterable[str] = ()) -> Path:
    """`out` as a path that `stage` may write. Raises StageError before any work is done where it may not."""
    out = Path(out)
    _finish_replacing(out)
    for path in inputs:
        source = Path(path).resolve()
        if out.resolve() in (source, *source.parents):
            is_or_holds = "is also an input" if source == out.resolve() else f"holds the input {path}"
            raise StageError(f"--out {out} {is_or_holds}, which would be lost; name another folder")
    earlier = read_receipt(out) if out.is_dir() else None
    if earlier and earlier.stage != stage:
        raise StageError(f"--out {out} holds what {earlier.stage} wrote; name another folder for {stage}")
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not out.is_absolute():
        raise StageError(
            f"--out {out} is relative, and a Ray job's working folder is thrown away; give an absolute path"
        )
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / RECEIPT).exists()):
        raise StageError(
            f"--out {out} exists and was not written by a stage; name another folder or remove it yourself"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StageError(f"--out {out} cannot be written: {error.strerror}; name another folder") from None
    return out


def remove_leftovers(out: Path, kept: Path | None = None) -> None:
    """Delete what a killed run left beside `out`, but `kept`. Two runs at once into one folder are not supported."""
    _finish_replacing(out)
    for folder in _leftovers(out):
        if folder == kept:
            continue
        if folder.is_symlink():
            folder.unlink()
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _finish_replacing(out: Path) -> None:
    """Do what a run that was killed between its two renames had yet to do, lest both folders count as leftovers."""
    for old in _leftovers(out):
        if old.name.endswith(OLD) and not os.path.lexists(out):
            new = old.with_name(old.name.removesuffix(OLD))
            (new if new.exists() else old).rename(out)


def _leftovers(out: Path) -> list[Path]:
    # mkdtemp draws eight characters. A wider pattern would take the leftovers of a folder named OUT.partial-...
    names = f".{glob.escape(out.name)}.partial-????????"
    return [path for pattern in (names, names + OLD) for path in out.parent.glob(pattern)]


def receipt_of(stage: str, config: Config, **known: Any) -> Receipt:
    """A new receipt of `stage` for `publish`."""
    return Receipt(stage=stage, config=config.model_dump(), **known)


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
