"""Load the modules and vocabularies that all loader workers share.

Only the server process that forks the workers imports this module. An environment variable names the vocabularies,
because the server takes no arguments.
"""

import gc
import os
from pathlib import Path

import sdxl_trainer.data.loading.dataset  # noqa: F401 (for the workers)
from sdxl_trainer.data.text.tokens import SOURCES_VARIABLE, preload_vocabulary

for source in filter(None, os.environ.get(SOURCES_VARIABLE, "").split(os.pathsep)):
    preload_vocabulary(Path(source))
# Without this, garbage collection in a worker would write to the shared pages and thereby copy them.
gc.freeze()
