"""Look at the processes below a process."""

from pathlib import Path


def list_descendants(process: int) -> list[int]:
    """Process ids of all children and children's children."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found, waiting = [], [process]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def get_variable(process: int, name: str) -> str | None:
    """A variable of a process's environment."""
    try:
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((word.decode().partition("=")[2] for word in variables if word.startswith(f"{name}=".encode())), None)
