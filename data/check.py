"""What can be told of the data settings before any network is loaded: sources, pictures, captions."""

from pathlib import Path

from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.bucket import BucketRule, list_buckets
from sdxl_trainer.data.index import Index, open_record_index
from sdxl_trainer.data.records import check_sources


def get_cache_folder(config: Config) -> Path:
    """Folder of the cache: `cache.dir`, else that of the first metadata file or image folder."""
    if config.cache.dir is not None:
        return config.cache.dir
    if config.data.metadata:
        return config.data.metadata[0].parent
    return config.data.image_dirs[0] if config.data.image_dirs else Path(".")


def get_bucket_rule(config: Config) -> BucketRule:
    """The bucket rule of the `data` section."""
    data = config.data
    return BucketRule(data.resolution_px, data.min_bucket_px, data.max_bucket_px, data.bucket_step_px, data.no_upscale)


def check_records(config: Config) -> tuple[Index | None, list[Problem]]:
    """Open the index of all records, and say what is wrong with the data settings or the data as a whole."""
    problems = check_sources(config.data.metadata, config.data.image_dirs)
    if not list_buckets(get_bucket_rule(config)):
        problems.append(Problem("data.resolution_px", config.data.resolution_px, "gives no bucket", "raise it"))
    if problems:
        return None, problems
    source = "data.metadata" if config.data.metadata else "data.image_dirs"
    shown = ", ".join(str(path) for path in config.data.metadata or config.data.image_dirs)
    try:
        index = open_record_index(get_cache_folder(config), config.data.metadata, config.data.image_dirs)
    except ValueError as error:
        return None, [Problem(source, shown, str(error), "mend the data")]
    if len(index) == 0:
        return None, [Problem(source, shown, "holds no pictures", "check the path and the file types")]
    if index.strings("caption").null_count == len(index):
        cure = "give each record `caption` or `tags`, or put a .txt file of the same stem beside each picture"
        return index, [Problem(source, shown, f"holds {len(index)} pictures and not one caption", cure)]
    return index, []
