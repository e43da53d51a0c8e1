"""Files that others read: written whole or not at all."""

import hashlib
import json
import os
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefopt_dist.errors import UserError

_CHUNK_BYTES = 4 << 20
_FORGOTTEN_SECONDS = 24 * 3600


def fsync_folder(path: Path) -> None:
    """Make the folder's entries (new names, renames, removals) durable."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data`: a reader sees the old content or the new, also after a power cut.

    Text is written as UTF-8. On a failure (a full disk) the old file stays and no temporary one is left.
    """
    content = data.encode() if isinstance(data, str) else data
    # Beside the target, because a rename is atomic only within one file system. Not mkstemp: its mode
    # is 0600 whatever the umask, and colleagues of the same group could not read the run.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def sweep(folder: Path, pattern: str) -> None:
    """Removes what writers that were killed left under temporary names a day ago or earlier.

    By age, because another job may be writing under such a name at this moment.
    """
    for left in folder.glob(pattern):
        with suppress(OSError):  # gone, or not ours to remove
            youngest = max(p.stat().st_mtime for p in [left, *left.glob("*")])
            if time.time() - youngest > _FORGOTTEN_SECONDS:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def checksum(path: Path) -> str:
    """BLAKE2b-128 of the file's content, in hexadecimal; read in chunks, so size does not matter."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, obj: Any) -> None:
    """`write_atomic` of strict JSON (a NaN is an error), indented for people."""
    write_atomic(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The file's JSON; what is no JSON is refused with the file's name and the line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as fault:
        raise UserError(f"{path}:{fault.lineno}: not valid JSON ({fault.msg})") from fault
    except UnicodeDecodeError as fault:
        raise UserError(f"{path}: not UTF-8 text ({fault.reason} at byte {fault.start})") from fault
