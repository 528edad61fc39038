"""Cures of bad latents: what repairs them depends on who made them, and on where they lie."""

from collections.abc import Sequence

from sdxl_trainer.data.images.image_files import LATENT_SUFFIX
from sdxl_trainer.data.stores.remote import is_remote

SHARD_SUFFIX = ".tar"


def describe_bad_cure(found: Sequence[str], listed: Sequence[str] = ()) -> str:
    """Return what repairs bad latents, and images that cannot be encoded.

    Args:
        found: reasons of samples that no manifest lists, each beginning with a file or URL and a colon.
        listed: reasons of latents that the cache's manifest lists.
    """
    files = list(dict.fromkeys(reason.partition(": ")[0] for reason in (*found, *listed)))
    remote = [file for file in files if is_remote(file)]
    local = [file for file in dict.fromkeys(reason.partition(": ")[0] for reason in found) if not is_remote(file)]
    foreign = [file for file in local if file.endswith((LATENT_SUFFIX, SHARD_SUFFIX))]
    cures = []
    if len(remote) == 1:
        cures.append(f"write {remote[0]} again and upload it: nothing here can repair it")
    elif remote:
        others = len(remote) - 1
        cures.append(f"write {remote[0]} and {others:,} more again and upload them: nothing here can repair them")
    if foreign:
        cures.append(
            "write the files again with the program that made them, or delete them and run bash launch/cache.sh"
        )
    if len(local) > len(foreign):
        cures.append("repair or remove the images")
    if any(not is_remote(reason.partition(": ")[0]) for reason in listed):
        cures.append("run bash launch/cache.sh with --repair, which encodes them again")
    return "; ".join(cures)
