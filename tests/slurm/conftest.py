"""A site with stubs of Slurm's commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from slurm_site import Site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)
