"""Shards that are read from end to end only: the output of a command (`pipe:`), and protocols that webdataset opens.

webdataset starts the command. Training reads samples by position, so the stream is written to a local file.
"""

import shutil
from pathlib import Path
from typing import Any

PIPE = "pipe:"
# The protocols that webdataset opens and fsspec does not; tests/data/stores/test_streams.py compares both lists.
STREAMED_PROTOCOLS = {"pipe", "ais", "ftps", "htgs", "scp"}
UNKNOWN_BYTES = -1  # size of a stream
NOT_STARTED = {126, 127}  # statuses by which a shell reports a command that it cannot start
COPY_BYTES = 1 << 20


class StreamError(OSError):
    """A stream that ended with an error, or could not be opened."""


class RefusedStreamError(StreamError):
    """A stream that no second attempt would open."""


def is_streamed(name: str | Path) -> bool:
    """Return whether a source can only be read from end to end."""
    protocol, colon, _ = str(name).partition(":")
    return bool(colon) and protocol in STREAMED_PROTOCOLS


def copy_stream(url: str, file: Path) -> None:
    """Write a stream to a file, by webdataset's `gopen`.

    Raises:
        StreamError: the command failed, or could not be started.
        OSError: the file cannot be written.
    """
    from webdataset.gopen import gopen  # imports torch, which most commands do not need

    try:
        stream: Any = gopen(url)  # a Pipe
    except (ValueError, OSError) as error:  # WDS_SECURE=1, or the program that reads the protocol is not installed
        raise RefusedStreamError(str(error)) from None
    stream.ignore_errors = True  # webdataset's own errors repeat the whole command, which the URL already names
    with stream, open(file, "wb") as target:
        shutil.copyfileobj(stream, target, COPY_BYTES)
    if stream.status not in stream.ignore_status:
        error_class = RefusedStreamError if stream.status in NOT_STARTED else StreamError
        raise error_class(f"the command ended with status {stream.status}")
