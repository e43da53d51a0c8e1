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
    found |= {name: launches(device, cap) for name, cap in (("gemma2", 50.0), ("flash", None))}
    (folder / "found.json").write_text(json.dumps(found))


def launches(device: Any, cap: float | None) -> int:
    """Kernels of three layers of Gemma 2, forward and backward, for 16 pairs of UltraFeedback's lengths."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.launches import gemma2, packed
    from prefopt_dist.model import attention

    config = gemma2(cap=cap, head_dim=16)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention.NAME).cuda()
    row = packed("ultrafeedback-like", 16).to(torch.device("cuda", 0))
    before: int = device.launched()
    lm.train().base_model(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        segments=row.segments,
        gathered=row.gathered,
        use_cache=False,
    ).last_hidden_state.sum().backward()
    after: int = device.launched()
    return after - before


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
