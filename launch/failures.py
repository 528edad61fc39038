"""One line, with the cure, for errors whose cause lies outside the program: storage, memory, and killed workers."""

import codecs
import errno
import sys

# What to do about an error of the system. Errors that are not listed may be faults of the program.
CURES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there, or ask for a larger quota",
    errno.EROFS: "mount the disk for writing, or choose a folder on another one",
    errno.EACCES: "give this user the right to it, or choose another folder",
    errno.EPERM: "give this user the right to it, or choose another folder",
    errno.EEXIST: "a file has the name of a folder: rename it, or choose another folder",
    errno.ENOTDIR: "a part of the path is a file: choose another folder",
    errno.EISDIR: "a folder has the name of a file: rename it",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "correct the symbolic links of the path",
    errno.EMFILE: "allow more open files: ulimit -n 65536",
    errno.ENFILE: "the machine has too many open files: end other programs",
    errno.EIO: "look at the disk and at the system's log (dmesg)",
    errno.ESTALE: "look at the network storage and mount it anew",
    errno.ETIMEDOUT: "look at the network storage",
    errno.ENOTCONN: "look at the network storage and mount it anew",
    errno.EHOSTDOWN: "look at the network storage",
    errno.EHOSTUNREACH: "look at the network storage",
}
CURE_MEMORY = (
    "end other programs, or lower data.num_workers, cache.num_workers, cache.batch_size or train.micro_batch_size"
)
CURE_GPU = (
    "lower train.micro_batch_size or cache.batch_size, set engine.gradient_checkpointing: full, or "
    "engine.offload_optimizer: true"
)
CURE_SHARED = "lower data.num_workers, or enlarge /dev/shm (docker run --shm-size=8g, or --ipc=host)"
CURE_WORKER = (
    "the system ends processes when memory or /dev/shm is short (dmesg names them): lower data.num_workers, end other "
    "programs, or enlarge /dev/shm"
)
# What gloo and NCCL say when the process at the other end of a connection is gone.
LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
CURE_LOST_RANK = "its own messages name the reason; the same command resumes"
UTF8 = codecs.lookup("utf-8")
CONTINUE = "then run the same command again"


def explain_failure(error: BaseException) -> str | None:
    """Return what has failed and the cure in one line, or None if the error may be a fault of the program."""
    text = _get_first_line(error)
    if "shared memory" in str(error) or "/dev/shm" in str(error) or "/torch_" in text:
        return f"/dev/shm is too small for the data workers: {text}; {CURE_SHARED}; {CONTINUE}"
    if "DataLoader worker (pid" in text:
        return f"a data worker was ended from outside: {text}; {CURE_WORKER}; {CONTINUE}"
    if type(error).__name__ in ("OutOfMemoryError", "AcceleratorError") and "out of memory" in str(error):
        return f"the GPU has too little memory: {text}; {CURE_GPU}; {CONTINUE}"
    if isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_RANK):
        return f"another rank has ended, and this one cannot continue alone: {text}; {CURE_LOST_RANK}"
    memory = isinstance(error, MemoryError) or "can't allocate memory" in text or "Cannot allocate memory" in text
    if memory or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return f"the machine has too little memory: {text or 'no memory left'}; {CURE_MEMORY}; {CONTINUE}"
    if isinstance(error, UnicodeEncodeError) and codecs.lookup(error.encoding) == _get_names_codec() != UTF8:
        return f"the locale has no such file names: {text}; export PYTHONUTF8=1; {CONTINUE}"
    if isinstance(error, OSError) and error.errno in CURES:
        place = f"{error.filename}: " if error.filename is not None else ""
        return f"{place}{error.strerror}; {CURES[error.errno]}; {CONTINUE}"
    return None


def _get_names_codec() -> codecs.CodecInfo:
    """Return the codec of file names in this locale."""
    return codecs.lookup(sys.getfilesystemencoding())


def _get_first_line(error: BaseException) -> str:
    """Return the first line of an error's text; of a worker's error, which quotes a traceback, the last one."""
    lines = str(error).strip().splitlines() or [""]
    return lines[-1 if lines[0].startswith("Caught ") else 0].strip()
