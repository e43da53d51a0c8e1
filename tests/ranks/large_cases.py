"""Cases of universal_cases.py: the memory of a rank that converts, loads or exports a large model."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import worlds
from resharding_jobs import STATE
from transformers import LlamaConfig, LlamaForCausalLM

from prefopt_dist.checkpoint import export_weights, load, resharding, save
from prefopt_dist.checkpoint.shards import MasterWeights
from prefopt_dist.config import Config, load_config
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.setup import prepare_models, prepare_policy


def large_config(folder: Path) -> Config:
    """A model of 425 MB in float32, whose converted form has 1.3 GB."""
    big = folder / "big"

    def write() -> None:
        if not (big / "config.json").exists():
            worlds.write_model(big)
            config = LlamaConfig.from_pretrained(
                big, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=8
            )
            LlamaForCausalLM(config).save_pretrained(big)
        worlds.write_run(folder / "large.yaml", big, folder / "pairs.jsonl", folder / "run-large")

    ranks.run_on_rank_zero(write)
    return load_config(folder / "large.yaml")


def large_written(folder: Path) -> dict[str, Any]:
    engine, _ = prepare_policy.load_policy(large_config(folder), prepare_models.load_models(large_config(folder)), 1.0)
    engine.optimizer.initialize_optimizer_states()
    for master in engine.optimizer.fp32_partitioned_groups_flat:
        state = engine.optimizer.optimizer.state[master]
        for moment in ("exp_avg", "exp_avg_sq"):
            state.setdefault(moment, torch.zeros_like(master.data)).normal_()
        state.setdefault("step", torch.tensor(1.0))
    save.save(engine, folder / "large", step=1, state=STATE, facts={}, keep=2)
    zero3.release(engine)
    return {}


@contextmanager
def most_memory(found: dict[str, Any], name: str) -> Iterator[None]:
    """Inside, the most memory of this process's own (mapped files are not) above that at the beginning; in bytes."""

    def own() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])

    gc.collect()
    zero3._trim_heap()  # what is free in the heap would hide what is taken
    most = [own()] * 2
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            most[1] = max(most[1], own())

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    done.set()
    thread.join()
    found[name] = ranks.all_gather(max(most[1], own()) - most[0])


def large_exported(folder: Path) -> dict[str, Any]:
    """What writing the model's files adds to each rank's memory, beside the float32 whole that one rank once held."""
    found: dict[str, Any] = {}
    weights = MasterWeights(folder / "large" / "step-00000001", 2)
    lm = export_weights.empty_model(prepare_models.load_models(large_config(folder)).policy, torch.bfloat16, [])
    target = folder / "large-exported"
    ranks.run_on_rank_zero(lambda: target.mkdir() and None)
    most, export_weights.PART_BYTES = export_weights.PART_BYTES, 30_000_000
    with most_memory(found, "writing"):
        export_weights.write_share(weights, lm, torch.bfloat16, target, range(ranks.world_size()))
    export_weights.PART_BYTES = most
    ranks.all_gather(None)
    found["largest"] = max(path.stat().st_size for path in target.glob("*.safetensors"))
    found["bytes"] = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    return found


def large_resumed(folder: Path) -> dict[str, Any]:
    """What converting and loading add to each rank's memory."""
    root = folder / "large"
    manifest = load.find_newest(root)
    assert manifest is not None
    found: dict[str, Any] = {}
    with most_memory(found, "converting"):
        resharding.prepare(root / "step-00000001", manifest)
    engine, _ = prepare_policy.load_policy(large_config(folder), prepare_models.load_models(large_config(folder)), 1.0)
    found["elements"] = sum(p.ds_numel for p in engine.module.parameters())
    load.load(engine, root, manifest)  # Adam's moments are made here where they are not there yet
    with most_memory(found, "loading"):
        load.load(engine, root, manifest)
    zero3.release(engine)
    return found
