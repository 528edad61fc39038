"""The runs in a folder."""

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

from sdxl_trainer.train.watch.run_folder import is_run_folder
from sdxl_trainer.train.watch.run_reader import RunReader

MAX_OPEN = 24  # runs whose curves and messages stay in memory


class RunLibrary:
    """All runs in a folder, or the one run that the folder is itself."""

    def __init__(self, root: Path):
        self.root = root
        self._readers: dict[str, RunReader] = {}
        self._open: OrderedDict[str, RunReader] = OrderedDict()  # most recently used last

    def list_runs(self) -> list[dict[str, Any]]:
        """Return state and progress of every run for JSON."""
        self._scan()
        return [reader.summarize() for reader in self._readers.values()]

    def open_run(self, name: str) -> RunReader | None:
        """Return the reader of a run; None if there is no run of this name."""
        if name not in self._readers:
            self._scan()
        reader = self._readers.get(name)
        if reader is None or not reader.folder.is_dir():
            return None
        self._open[name] = reader
        self._open.move_to_end(name)
        if len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)[1].forget()
        return reader

    def _scan(self) -> None:
        """Find new runs, and drop those that were deleted."""
        folders = {name: folder for name, folder in self._list_folders() if _is_text(name)}
        for name in [*self._readers]:
            if folders.get(name) != self._readers[name].folder:
                del self._readers[name]
                self._open.pop(name, None)
        for name, folder in folders.items():
            if name not in self._readers:
                self._readers[name] = RunReader(folder, name)

    def _list_folders(self) -> list[tuple[str, Path]]:
        """List name and real path of each run folder."""
        root = self.root.resolve()
        if (root / "config.yaml").exists() or (root / "logs" / "metrics.jsonl").exists():
            return [(root.name, root)]
        try:
            with os.scandir(root) as entries:
                found = [(entry.name, Path(entry.path)) for entry in entries if entry.is_dir()]
        except OSError:
            return []
        folders = [(name, path.resolve() if path.is_symlink() else path) for name, path in sorted(found)]
        return [(name, path) for name, path in folders if name in self._readers or is_run_folder(path)]


def _is_text(name: str) -> bool:
    """Return whether a name is valid UTF-8, which a page can show and send back."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
