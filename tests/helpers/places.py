"""The folders that tests read and start things from."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TESTS = REPOSITORY / "tests"
PYTHONPATH = os.pathsep.join(str(folder) for folder in (REPOSITORY, TESTS / "helpers", TESTS / "ranks"))
"""For processes that import what tests share; pytest has the same from pyproject.toml."""
