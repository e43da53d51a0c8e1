"""Append results to a file one by one, so that a kill loses none that is finished: a checksum on each line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from prefopt_dist.files import digest


def read_lines(file: Path) -> list[Any]:
    """Return the values of the whole lines; a line that a kill has torn is ended, so that others can follow it."""
    os.listdir(file.parent)  # a network file system may not know yet that the file exists
    found: list[Any] = []
    content = file.read_bytes() if file.exists() else b""
    for line in content.split(b"\n"):
        text, _, check = line.rpartition(b"\t")
        if text and digest(text) == check.decode(errors="replace"):
            found.append(json.loads(text))
    if content and not content.endswith(b"\n"):
        with file.open("ab") as end:
            end.write(b"\n")
    return found


def append_line(file: Path, value: Any) -> None:
    """Append a JSON value; it is in the hands of the operating system when this returns."""
    text = json.dumps(value)
    with file.open("ab") as end:
        end.write(f"{text}\t{digest(text)}\n".encode())
