"""Imported by the server that loader workers are forked from, and by nothing else: what all of them need, loaded once.

Which vocabularies, the environment says, because a server is given no arguments.
"""

import gc
import os
from pathlib import Path

import sdxl_trainer.data.loading.dataset  # noqa: F401 (for the workers)
from sdxl_trainer.data.text.tokens import SOURCES_VARIABLE, keep_vocabulary

for source in filter(None, os.environ.get(SOURCES_VARIABLE, "").split(os.pathsep)):
    keep_vocabulary(Path(source))
gc.freeze()  # a collection in a worker would touch, and so copy, what they share
