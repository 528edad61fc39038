"""Upload of a model with its card to the Hugging Face hub, and the checks before it."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loguru import logger

from sdxl_trainer.cache.models.source import HUB_ID
from sdxl_trainer.configs.problems import FailedError, Problem, format_count

LOGIN_CURE = "log in with a token that may write: hf auth login, or HF_TOKEN in the environment"
UNAUTHORISED, FORBIDDEN, CONFLICT = 401, 403, 409  # statuses of HTTP


def check_hub_target(hub_id: str) -> Iterator[Problem]:
    """Yield a problem if nothing can be pushed to a hub id. Asks the hub who the user is, and changes nothing."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # the first depends on the library for HTTP

    if not HUB_ID.fullmatch(hub_id):
        yield Problem("--push", hub_id, "is no hub id", "give YOUR_NAME/YOUR_MODEL, with letters, digits, - _ and .")
        return
    token = get_token()
    if not token:
        yield Problem("--push", hub_id, "needs a token of the hub, and there is none", LOGIN_CURE)
        return
    try:
        user = HfApi().whoami(token=token)
    except OfflineModeIsEnabled:
        yield Problem("--push", hub_id, "needs the network, and HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
        return
    except (HTTPError, OSError, ValueError) as error:
        if get_status(error) in (UNAUTHORISED, FORBIDDEN):
            yield Problem("--push", hub_id, "is refused: the hub does not accept the token", LOGIN_CURE)
        else:
            rule = f"cannot be reached: {describe_error(error)}"
            yield Problem("--push", hub_id, rule, "check the network, and HF_ENDPOINT if it is set")
        return
    yield from check_rights(hub_id, user)


def check_rights(hub_id: str, user: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem if the user may not write to the namespace of a hub id.

    Args:
        user: the hub's answer to who the user is.
    """
    own = [str(user.get("name", "")), *(str(group.get("name", "")) for group in user.get("orgs") or [])]
    if hub_id.partition("/")[0] not in own:
        yield Problem("--push", hub_id, "is in the namespace of somebody else", f"yours are: {', '.join(own)}")
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        yield Problem("--push", hub_id, "needs a token that may write, and this one may only read", LOGIN_CURE)


def push_files(hub_id: str, files: Mapping[str, Path], title: str, private: bool) -> str:
    """Upload files in one commit, which makes the repository if it is new, and return its address.

    Args:
        files: path in the repository → file.
        private: of a new repository.

    Raises:
        FailedError: the hub refuses, or the network fails. The hub keeps the parts that have arrived whole.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HTTPError

    size = sum(file.stat().st_size for file in files.values())
    logger.info("uploading {} ({:.3g} GB) to {}", format_count(len(files), "file"), size / 1e9, hub_id)
    try:
        hub = HfApi()
        address = hub.create_repo(hub_id, private=private or None, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
        hub.create_commit(hub_id, operations, commit_message=f"Upload {title}")
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        reason = describe_error(error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error)
        raise FailedError(f"the upload to {hub_id} failed: {reason}") from error
    return str(address)


def get_status(error: Exception) -> int | None:
    """Return the status of HTTP that an error of the hub carries; None without one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def describe_error(error: BaseException) -> str:
    """Return the first line of an error that says something, without the address of the request."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def list_model_files(model: Path, leave_out: str = "") -> dict[str, Path]:
    """Return the files of a model as they go into the repository: a file by its name, a folder's by their paths.

    Hidden files and unfinished ones, whose names begin with a dot, stay here.
    """
    if model.is_file():
        return {model.name: model}
    found = {}
    for parent, folders, names in os.walk(model):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if not name.startswith("."):
                found[path.relative_to(model).as_posix()] = path
    return found
