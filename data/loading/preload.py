"""Load what all loader workers share. Imported only by the server process that the workers are forked from.

The environment names the vocabularies to load, because the server takes no arguments.
"""

import gc
import os
from pathlib import Path

import sdxl_trainer.data.loading.dataset  # noqa: F401 (for the workers)
from sdxl_trainer.data.text.tokens import SOURCES_VARIABLE, preload_vocabulary

for source in filter(None, os.environ.get(SOURCES_VARIABLE, "").split(os.pathsep)):
    preload_vocabulary(Path(source))
# Without this, a garbage collection in a worker would write to the shared pages and so copy them.
gc.freeze()
