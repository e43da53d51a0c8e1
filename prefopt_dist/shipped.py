"""Find the files that belong to the package but are not Python: scripts, recipes, DeepSpeed's settings.

In a clone they lie beside the package (launch/, slurm/, deepspeed_configs/), in an installed package inside it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

_INSTALLED = Path(__file__).parent / "shipped_files"
ROOT = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1]
"""Folder that has launch/, slurm/ and deepspeed_configs/"""
SCRIPTS = {"launch": "launch/run.sh", "submit": "slurm/submit"}
"""Scripts that the command `prefopt` runs, by their subcommand"""


def path_here(path: Path) -> str:
    """Return a path relative to the working folder, where it lies within, for people to read."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def run_script(name: str, arguments: Sequence[str]) -> NoReturn:
    """Replace this process by a script of SCRIPTS, which then uses this Python."""
    os.environ.setdefault("PREFOPT_PYTHON", sys.executable)
    script = ROOT / SCRIPTS[name]
    os.execvp("bash", ["bash", str(script), *arguments])
