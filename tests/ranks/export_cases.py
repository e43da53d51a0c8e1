"""Cases of universal_cases.py: checkpoints exported as model folders, bit for bit, by all ranks."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from resharding_jobs import BUFFER, SETTINGS, config_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prefopt_dist.checkpoint import export_weights, other_parts
from prefopt_dist.distributed import ranks
from prefopt_dist.model.folder import inspect_folder
from prefopt_dist.model.load import load_language_model
from prefopt_dist.setup import export_run, prepare_models


def exported(folder: Path) -> dict[str, Any]:
    """The checkpoints of two ranks as model folders in several files, written by all ranks and loaded back by them."""
    found = {}
    for name in SETTINGS:
        config = config_of(folder, name)
        models = prepare_models.load_models(config)
        source = folder / f"checkpoints-{name}" / "step-00000002"
        target = folder / f"exported-{name}-{ranks.world_size()}"
        wrote: list[str] = []
        with small_parts(wrote):
            export_run.export_checkpoint(config, models, source, RunFacts(), target=target, merged=False)
        files = sorted(path.name for path in target.glob("*.safetensors"))
        found[name] = {"files": files, "wrote": ranks.all_gather(wrote), "size": 0, "left": []}
        found[name]["wrong"] = ranks.run_on_rank_zero(lambda name=name, target=target: different(folder, name, target))
        index = target / "model.safetensors.index.json"
        if index.exists():
            found[name]["size"] = json.loads(index.read_text())["metadata"]["total_size"]
        found[name]["bytes"] = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        found[name]["left"] = sorted(path.name for path in folder.glob(".exported*"))
    return found


class RunFacts:
    """As much of a run folder as an export reads."""

    facts: ClassVar[dict[str, Any]] = {"run_id": "r"}
    metrics = Path("no-metrics.jsonl")


@contextmanager
def small_parts(wrote: list[str]) -> Iterator[None]:
    """Inside, an export has files of few layers, and the names of this rank's are added to `wrote`."""
    write, most = export_weights._write_part, export_weights.PART_BYTES

    def noted(tensors: Any, lm: Any, folder: Path, name: str, names: Any, *, first: bool) -> Any:
        wrote.append(name)
        return write(tensors, lm, folder, name, names, first=first)

    copy = other_parts.copy_part

    def noted_copy(tensors: Any, target: Path) -> Any:
        wrote.append(target.name)
        return copy(tensors, target)

    export_weights._write_part, export_weights.PART_BYTES = noted, 20_000
    other_parts.copy_part = noted_copy
    try:
        yield
    finally:
        export_weights._write_part, export_weights.PART_BYTES = write, most
        other_parts.copy_part = copy


def different(folder: Path, name: str, target: Path) -> list[str]:
    """The exported tensors that are not bit for bit those of the checkpoint (rank 0)."""
    saved = torch.load(folder / f"{name}.pt")["saved"]
    saved = {n.removeprefix("lm.").removesuffix("/fp32"): t for n, t in saved.items() if n.endswith("/fp32")}
    if name == "lora":
        held = load_file(target / "adapter_model.safetensors")
        held = {n.removeprefix("base_model.model.").replace(".weight", ".default.weight"): t for n, t in held.items()}
    elif name == "images":
        exported = inspect_folder(target, "export.dir")
        held = load_language_model(exported, exported.config, torch.float32).state_dict()
    else:
        held = AutoModelForCausalLM.from_pretrained(target, dtype="auto").state_dict()
    wrong = [n for n, t in saved.items() if not torch.equal(held[n], t.to(held[n].dtype))]
    wrong += changed_beside_training(folder, name, target)
    return wrong + sorted(n for n in held.keys() - saved.keys() - {"lm_head.weight"} if BUFFER not in n)


def changed_beside_training(folder: Path, name: str, target: Path) -> list[str]:
    """Tensors that no update changes, and that are not those of the folder that training started from."""
    if name not in ("buffers", "images"):
        return []
    before, after = (
        {n: t for file in place.glob("*.safetensors") for n, t in load_file(file).items()}
        for place in (folder / f"model-{name}", target)
    )
    kept = [n for n in before if BUFFER in n or "vision" in n or "projector" in n]
    assert kept
    return [n for n in kept if not torch.equal(before[n], after[n])] + sorted(before.keys() ^ after.keys())
