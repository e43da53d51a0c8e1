"""A full disk, told with the folder and the remedy instead of a traceback of whichever library met it first."""

import errno
import shutil
from collections.abc import Iterable
from pathlib import Path

_ERRORS = (errno.ENOSPC, errno.EDQUOT)
_WORDS = ("No space left on device", "os error 28", "Disk quota exceeded", "no room for")
"""Of libraries that make an exception of their own of it."""
_WRITERS = ("PytorchStreamWriter", "inline_container", "not committed")
"""What torch says of any failed write: a full disk only where the disk is full now."""
_FULL_BYTES = 1 << 20


def told(fault: BaseException, folders: Iterable[tuple[str, Path]]) -> str | None:
    """What to say of `fault` where it comes of a full disk, None where it does not.

    folders: dotted key and folder of all that a job writes.
    """
    faults, link = [], fault
    while link is not None and link not in faults:
        faults.append(link)
        link = link.__cause__ or link.__context__  # type: ignore[assignment]
    full = [(key, folder) for key, folder in folders if _free(folder) < _FULL_BYTES]
    text = " ".join(str(f) for f in faults)
    certain = any(isinstance(f, OSError) and f.errno in _ERRORS for f in faults) or any(w in text for w in _WORDS)
    if not certain and not (full and any(word in text for word in _WRITERS)):
        return None
    # Of a copy the second name is the one that was written.
    files = [str(f.filename2 or f.filename) for f in faults if isinstance(f, OSError) and f.filename]
    place = ", ".join(f"{key}: the disk of {folder} is full" for key, folder in full[:1])
    return (
        f"{place or 'a disk is full, or its quota used up'} ({(files or [text.splitlines()[0]])[0]}). What was "
        "committed before is sound: free some space, or move the folder and name its new place, and start again."
    )


def _free(folder: Path) -> int:
    """Bytes that are left where the folder is or would be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
