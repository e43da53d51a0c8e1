"""Parts of `make test-gpu` on the pretended device: python tests/pretended/pretended_parts.py FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pretended


def main() -> None:
    device = pretended.install()
    import gpu_families
    import gpu_kernel
    import torch
    from gpu_results import Place, Results
    from models_for_tests import MODELS

    folder = Path(sys.argv[1])
    place = Place(torch.device("cuda", 0), True, folder)
    file = folder / "results.jsonl"
    gpu_kernel.run(place, Results(file, "kernel"))
    gpu_families.run(place, Results(file, "families"), MODELS)
    found: dict[str, Any] = {"mixed": refusal(lambda: torch.ones(2, device=place.device) + torch.ones(2))}
    with gpu_families.no_syncs(place):
        found["sync"] = refusal(torch.ones(2, device=place.device).sum().item)
    found["launched"] = device.launched()
    (folder / "found.json").write_text(json.dumps(found))


def refusal(call: object) -> str | None:
    """The message of the error that a call raises."""
    assert callable(call)
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return None


if __name__ == "__main__":
    main()
