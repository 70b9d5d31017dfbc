"""Where a run's checkpoints go, tried before anything starts; and Ray Train's list of them, mended where it is torn."""

import json
import re
from contextlib import suppress
from pathlib import Path

from pyarrow.fs import FileSelector, FileSystem, FileType

from cluster.errors import StageError

LIST = "checkpoint_manager_snapshot.json"
COPY = "checkpoints.json"
NAMES = r"checkpoint_\d{4}-\d{2}-\d{2}_"  # as Ray Train names a checkpoint's folder
OBJECT_STORES = {"s3", "gcs", "abfs"}  # an object is there whole or not at all


class CheckpointStore:
    """The folder of one run at an address that pyarrow knows. Ray Train writes checkpoints there and LIST, their list.

    It rewrites LIST in place: a disk that is full or a kill at that moment tears it, and with it all checkpoints
    would be lost. So COPY follows it, by a rename.
    """

    def __init__(self, address: str, run: str) -> None:
        """Raises StageError if nothing can be written there."""
        self.address, self.run = address, run
        try:
            self._files, root = FileSystem.from_uri(address)
            self.folder = f"{root.rstrip('/')}/{run}"
            self._files.create_dir(self.folder)
            self._write(".tried", b"")
            self._files.delete_file(f"{self.folder}/.tried")
        except (OSError, ValueError, NotImplementedError) as error:
            raise StageError(
                f"no checkpoint can be written to {address}: {' '.join(str(error).split())}; give --storage a folder "
                f"that is there on all nodes, or an address such as s3://bucket/path"
            ) from None

    def copy_list(self) -> None:
        """Let the copy follow Ray Train's list, where that can be torn."""
        if self._files.type_name not in OBJECT_STORES:
            self._write(f"{COPY}.partial", self._read(LIST) or b"")
            self._files.move(f"{self.folder}/{COPY}.partial", f"{self.folder}/{COPY}")

    def mend_list(self) -> int | None:
        """The step of the newest checkpoint, or None where there is none. A torn list is replaced by its copy."""
        found, kept = self._read(LIST), self._read(COPY)
        if found is None or _newest_step(found) is not None:
            return _newest_step(found)
        if kept is None:
            self._files.delete_file(f"{self.folder}/{LIST}")
            print(f"train: {self.folder}/{LIST} was torn before it listed a checkpoint")
        else:
            self._write(LIST, kept)
            print(f"train: {self.folder}/{LIST} was torn; {COPY} beside it has what it said before")
        return _newest_step(kept)

    def remove_orphans(self) -> None:
        """Delete checkpoints that were uploaded, but not listed when the run was killed; no run has them.

        Not while one goes on, which may upload. Nothing without a whole list: somebody may look for what is there.
        """
        found = self._read(LIST)
        if found is None or _newest_step(found) is None:
            return
        listed = {result["checkpoint_dir_name"] for result in json.loads(found)["checkpoint_results"]}
        for entry in self._files.get_file_info(FileSelector(self.folder)):
            if entry.type == FileType.Directory and re.match(NAMES, entry.base_name) and entry.base_name not in listed:
                self._files.delete_dir(entry.path)

    def keep(self, file: Path) -> None:
        """Have a copy of one of the run's files, for `fetch`."""
        if self._read(file.name) != file.read_bytes():
            self._write(file.name, file.read_bytes())

    def fetch(self, file: Path) -> None:
        """Bring a file back if it is lost."""
        if not file.exists() and (kept := self._read(file.name)) is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(kept)

    def _read(self, name: str) -> bytes | None:
        with suppress(FileNotFoundError), self._files.open_input_stream(f"{self.folder}/{name}") as file:
            return bytes(file.read())
        return None

    def _write(self, name: str, content: bytes) -> None:
        with self._files.open_output_stream(f"{self.folder}/{name}") as file:
            file.write(content)


def _newest_step(checkpoints: bytes | None) -> int | None:
    """Of a list of checkpoints; None where there is none, or it is torn."""
    try:
        return int(json.loads(checkpoints or b"")["latest_checkpoint_result"]["metrics"]["step"])
    except (ValueError, KeyError, TypeError):
        return None
