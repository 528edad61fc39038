"""Load the modules, vocabularies and rules of tags that all loader workers share.

Only the server process that forks the workers imports this module. Environment variables name the files, because the
server takes no arguments.
"""

import gc
import json
import os
from pathlib import Path

import sdxl_trainer.data.loading.dataset  # noqa: F401 (for the workers)
from sdxl_trainer.data.text.tag_rules import RULES_VARIABLE, TagSources, load_sources
from sdxl_trainer.data.text.tokens import SOURCES_VARIABLE, preload_vocabulary

for source in filter(None, os.environ.get(SOURCES_VARIABLE, "").split(os.pathsep)):
    preload_vocabulary(Path(source))
if named := os.environ.get(RULES_VARIABLE):
    load_sources(TagSources(*json.loads(named)))
# Without this, garbage collection in a worker would write to the shared pages and thereby copy them.
gc.freeze()
