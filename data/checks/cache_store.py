"""Checks of a cache on a store, and its mirror, which they bring up to date."""

from collections.abc import Iterator

from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.index.selection import get_cache_folder, get_store_url
from sdxl_trainer.data.stores.cache_mirror import pull_cache
from sdxl_trainer.data.stores.remote import StoreError
from sdxl_trainer.data.stores.streams import is_streamed


def open_mirror(config: Config) -> list[Problem]:
    """Bring the mirror of a cache on a store up to date. Return the problems found; none for a cache on disk."""
    url = get_store_url(config)
    if url is None:
        return []
    problems = list(check_store_settings(config, url))
    if problems:
        return problems
    folder = get_cache_folder(config)
    try:
        pull_cache(url, folder)
    except (FileNotFoundError, StoreError) as error:
        return [build_store_problem(url, error)]
    except OSError as error:
        cure = "choose a run.dir that you may write, on a disk with space"
        return [Problem("run.dir", folder, f"cannot hold the manifest of {url}: {error.strerror}", cure)]
    return []


def check_store_settings(config: Config, url: str) -> Iterator[Problem]:
    """Yield a problem for each setting that a cache on a store rules out."""
    if is_streamed(url) or url.startswith(("http://", "https://")):
        cure = "give the URL of a bucket, such as s3://bucket/latents, or a folder"
        yield Problem("cache.dir", url, "cannot be written: a cache needs a store with folders", cure)
    if config.cache.format != "shards":
        rule = "cannot be used on a store: one object for each image would take too many requests"
        yield Problem("cache.format", config.cache.format, rule, "set cache.format: shards")
    if config.cache.on_missing == "encode":
        cure = "set it to skip or error, and run bash launch/cache.sh before the training"
        yield Problem("cache.on_missing", "encode", "cannot add to a cache on a store", cure)


def build_store_problem(url: str, error: Exception) -> Problem:
    """Build the problem of a cache on a store that cannot be read or written."""
    if isinstance(error, FileNotFoundError):
        bucket = "/".join(url.split("/")[:3])
        rule, cure = f"cannot be used: there is no bucket {bucket}", "create the bucket, or correct the name"
    else:
        rule = f"cannot be used: {str(error).removeprefix(f'{url}: ')}"
        cure = "check the credentials and their right to list, read, write and delete objects, and the address"
    return Problem("cache.dir", url, rule, cure)
