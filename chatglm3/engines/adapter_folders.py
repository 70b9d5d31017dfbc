"""Which LoRA adapters an engine can load, by name, and where they lie. Needs no torch."""

from collections.abc import Mapping
from pathlib import Path

from chatglm3.engines.request_errors import UnknownAdapter, UnusableAdapter
from chatglm3.folder import read_json


class AdapterFolders:
    """Adapters given by name, and those that lie in one folder, each called as its own folder is.

    That folder is read again at every question, so that an adapter can be added while the engine runs.
    """

    def __init__(self, named: Mapping[str, str | Path] | None = None, shelf: str | Path | None = None) -> None:
        self._named = {name: Path(folder) for name, folder in (named or {}).items()}
        self._shelf = Path(shelf) if shelf else None

    def __bool__(self) -> bool:
        """Whether there can be any, now or later."""
        return bool(self._named or self._shelf)

    @property
    def may_grow(self) -> bool:
        """Whether more can be added while the engine runs."""
        return self._shelf is not None

    def names(self) -> list[str]:
        """Names that `find` knows now."""
        return sorted(self._all())

    def find(self, name: str) -> Path:
        """The folder of an adapter. UnknownAdapter if there is none of that name."""
        try:
            return self._all()[name]
        except KeyError:
            raise UnknownAdapter(
                f"there is no adapter {name!r}; there are: {', '.join(self.names()) or 'none'}"
            ) from None

    def with_dora(self) -> list[str]:
        """Names of those that are DoRA, which not every engine can load."""
        return [name for name in self.names() if read_json(self.find(name) / "adapter_config.json").get("use_dora")]

    def _all(self) -> dict[str, Path]:
        shelf = self._shelf.iterdir() if self._shelf is not None and self._shelf.is_dir() else ()
        return {folder.name: folder for folder in shelf if (folder / "adapter_config.json").is_file()} | self._named


def written_at(folder: Path) -> int:
    """A number that changes when the adapter in a folder is written again. UnusableAdapter if the folder has gone."""
    try:
        times = [file.stat().st_mtime_ns for file in folder.iterdir() if file.name.startswith("adapter_")]
    except OSError as error:
        raise UnusableAdapter(f"adapter folder {folder} cannot be read: {error.strerror}") from None
    return max(times, default=0)
