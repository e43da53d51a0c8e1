"""Folders that all nodes must see alike: what one writes, the others read."""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path

from prefopt_dist.distributed import ranks
from prefopt_dist.errors import UserError


def refuse_local_folder(folder: Path, key: str, *, remedy: str) -> None:
    """All ranks: refuses a folder of which some node has another one of the same name. It must exist on rank 0."""

    def leave() -> Path:
        mark = folder / f".seen-{secrets.token_hex(4)}"
        try:
            mark.touch()
        except OSError as e:
            raise UserError(f"{key}: {folder} cannot be written ({e.strerror}). {remedy}") from e
        return mark

    mark = ranks.decide(leave)
    try:

        def look() -> None:
            if not os.path.exists(mark):
                raise UserError(
                    f"{key}: {folder} on {socket.gethostname()} is not the folder that the first node has: "
                    f"it must be on a disk that all nodes share. {remedy}"
                )

        ranks.together(look)
    finally:
        if ranks.rank() == 0:
            mark.unlink(missing_ok=True)
