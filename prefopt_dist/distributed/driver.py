"""Why torch finds no GPU on a machine that should have one: a build without CUDA, or a driver that is too old."""

from __future__ import annotations

import re
from pathlib import Path

import torch

OLDEST_DRIVERS = {13: 580, 12: 525}
"""The oldest branch of NVIDIA's Linux driver that runs programs built for a major version of CUDA (CUDA's release
notes). PyPI's torch 2.13 is built for CUDA 13.0."""
VERSION_FILE = Path("/proc/driver/nvidia/version")
"""The loaded driver's version, also inside containers."""
WHEELS = "https://download.pytorch.org/whl"


def installed_driver() -> str | None:
    """Return the version of the loaded driver, such as 550.54.15; None where none is loaded."""
    try:
        text = VERSION_FILE.read_text()
    except OSError:
        return None
    found = re.search(r"Kernel Module\s.*?(\d{3,}\.\d[\d.]*)", text)
    return None if found is None else found[1]


def why_no_gpu() -> str:
    """Return why this torch finds no GPU, with the remedy, as sentences."""
    cuda = torch.version.cuda
    if cuda is None:
        return "it is built without CUDA. Install a torch that is built for CUDA, such as PyPI's."
    major, driver = int(cuda.split(".")[0]), installed_driver()
    oldest = OLDEST_DRIVERS.get(major)
    if driver is None:
        needed = "" if oldest is None else f", {oldest} or newer for CUDA {cuda}"
        return f"no NVIDIA driver is loaded. Install one{needed}; in a container, also start it with the GPUs."
    if oldest is None or int(driver.split(".")[0]) >= oldest:
        return f"CUDA {cuda} with driver {driver}. See whether nvidia-smi finds the GPUs, and CUDA_VISIBLE_DEVICES."
    return (
        f"CUDA {cuda} needs NVIDIA's driver {oldest} or newer, and {driver} is loaded. Update the driver; or use an "
        f"image with a torch for an older CUDA; or install such a torch of the same version: pip install torch=="
        f"{torch.__version__.partition('+')[0]} --index-url {WHEELS}/cu126 (for other builds see {WHEELS}; those for "
        f"CUDA 12 run on driver {OLDEST_DRIVERS[12]} or newer)."
    )
