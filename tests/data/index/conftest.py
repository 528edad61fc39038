"""Fixtures of the tests of the index."""

import pytest

from sdxl_trainer.data.index import index as module


@pytest.fixture
def builds(monkeypatch):
    """Record the names of the index files that are built. Those that are only opened are not recorded."""
    names = []
    for name in ("_write_record_head", "write_sample_index"):
        write = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda path, *rest, write=write: (names.append(path.name), write(path, *rest))
        )
    return names
