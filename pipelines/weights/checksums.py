"""Checksums of a model folder: SHA256SUMS for `sha256sum --check` and `merge --verify`."""

import re
from pathlib import Path

from cluster import storage
from cluster.errors import StageError

SUMS = "SHA256SUMS"


def write_sums(folder: Path) -> None:
    """Write the checksums of all other files in the folder."""
    text = "".join(f"{storage.file_digest(folder / name)}  {name}\n" for name in sorted(_names(folder)))
    (folder / SUMS).write_text(text, encoding="utf-8")


def verify(folder: Path) -> int:
    """Check a folder against its SHA256SUMS; returns how many files are right. StageError names those that are not."""
    sums = _read_sums(folder)
    faults = []
    for name, digest in sums.items():
        if not (folder / name).is_file():
            faults.append(f"{name} is missing")
        elif storage.file_digest(folder / name) != digest:
            faults.append(f"{name} has changed")
    faults += [f"{name} is not from merge" for name in sorted(_names(folder) - sums.keys())]
    if faults:
        raise StageError(f"--verify {folder}: {'; '.join(faults)}; copy the folder again, or merge again")
    return len(sums)


def _names(folder: Path) -> set[str]:
    """What is in the folder besides the checksums."""
    return {path.name for path in folder.iterdir()} - {SUMS}


def _read_sums(folder: Path) -> dict[str, str]:
    """File name -> sha256. StageError for what merge does not write, such as paths that lead out of the folder."""
    file = folder / SUMS
    if not file.is_file():
        raise StageError(f"--verify {folder} holds no {SUMS}: merge writes it into every model folder")
    sums = {}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        found = re.fullmatch(r"([0-9a-f]{64})  ([^/\\]+)", line)
        if not found or found[2] in (".", ".."):
            raise StageError(f"{file}, line {number} is not a checksum and the name of a file here; copy it again")
        sums[found[2]] = found[1]
    if not sums:
        raise StageError(f"{file} is empty; copy the folder again, or merge again")
    return sums
