"""Peaks of resident memory of both passes on real ranks: torchrun tests/ranks/plan_cases.py FOLDER CASE …

A case is one pass of one size in processes of its own, as a peak of one would hide another's.
"""

import gc
import os
import sys
from pathlib import Path
from typing import Any

import case_runner
import numpy as np
import torch
import worlds
from transformers import LlamaConfig, LlamaForCausalLM

from prefopt_dist.batching.micro_batch import MicroBatch
from prefopt_dist.batching.packing import pack
from prefopt_dist.config import load_config
from prefopt_dist.data.unit import Unit
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.model.load import load_sharded
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives.dpo import DPO
from prefopt_dist.setup import prepare_models, prepare_policy, prepare_reference

TOKENS = 1024
"""Of a micro-batch of training; the first pass has twice as many."""
STEPS = 2
SHAPES = {
    "20M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6},
    "60M": {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 10, "num_attention_heads": 10},
    "120M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 15, "num_attention_heads": 12},
}
"""Llamas with two query heads for each of keys and values, and an untied head."""


def shape(name: str) -> LlamaConfig:
    fields = SHAPES[name]
    return LlamaConfig(
        vocab_size=8000,
        num_key_value_heads=fields["num_attention_heads"] // 2,
        tie_word_embeddings=False,
        pad_token_id=0,
        **fields,
    )


def write_world(folder: Path, name: str) -> Path:
    """The run's YAML; model folder with weights where they are asked for later."""
    model = folder / f"model-{name}"
    worlds.write_model(model)
    LlamaForCausalLM(shape(name)).save_pretrained(model)
    return model


def batch(tokens: int) -> MicroBatch:
    """Pairs of one length each, their prompt shared: a third each of prompt, chosen and rejected."""
    draw = np.random.default_rng(0)
    units, left = [], tokens
    while left > 0:
        n = min(left, 256)
        part = n // 3 + 1
        made = [draw.integers(3, 300, size=k, dtype=np.int32) for k in (n - 2 * part + 2, part, part)]
        units.append(Unit(len(units), made[0], (made[1], made[2])))
        left -= n
    return pack(units, 2)


class Peak:
    """The most resident memory since the start, in bytes above it."""

    def __init__(self) -> None:
        gc.collect()
        zero3._trim_heap()
        self.start = self._status("VmRSS")
        self.mapped = self._status("RssFile")
        self.seen: dict[str, list[int]] = {}
        self._reset()

    def mark(self, name: str) -> None:
        self.seen[name] = [self._status(field) - self.start for field in ("VmHWM", "VmRSS")]
        self.seen[name].append(self._status("RssFile") - self.mapped)
        self._reset()

    def result(self) -> dict[str, Any]:
        return {"ranks": ranks.all_gather(self.seen)}

    def _reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew

    def _status(self, field: str) -> int:
        return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def measured(folder: Path, name: str, which: str, checkpointing: str) -> dict[str, Any]:
    file = folder / f"{name}-{which}.yaml"
    model = folder / f"model-{name}"

    def write() -> None:
        write_world(folder, name)
        worlds.write_model(folder / "tiny")
        for run, of in ((file, model), (folder / "tiny.yaml", folder / "tiny")):
            worlds.write_run(
                run,
                of,
                folder / "pairs.jsonl",
                folder / "run",
                model={"name_or_path": str(of), "dtype": "float32", "checkpointing": checkpointing},
                train={"micro_batch_tokens": TOKENS},
            )

    # By a process of its own, or what it leaves in the heap would be in the baseline.
    if ranks.rank() == 0:
        pid = os.fork()
        if pid == 0:
            write()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    ranks.run_on_rank_zero(lambda: None)
    passed(folder / "tiny.yaml", which)  # so that all that is imported late is in the baseline
    return passed(file, which)


def passed(file: Path, which: str) -> dict[str, Any]:
    """A pass over a few micro-batches: this process's peaks above what it had before, by moment."""
    config = load_config(file)
    models = prepare_models.load_models(config)
    peak = Peak()
    if which == "reference":
        settings = prepare_reference.reference_settings(config, models)
        engine = zero3.reference_engine(
            Scorer(load_sharded(models.policy, dtype=torch.float32, settings=settings)), settings
        )
        peak.mark("load")
        with torch.no_grad():
            for _ in range(STEPS):
                engine(batch(2 * TOKENS))
        peak.mark("pass")
        zero3.release(engine)
        return peak.result()
    engine, _ = prepare_policy.load_policy(config, models, 1.0)
    peak.mark("load")
    objective = DPO(0.1, 0.0, 1e-6)
    micro = batch(TOKENS)
    for i in range(STEPS):
        for j in range(2):
            engine.set_gradient_accumulation_boundary(j == 1)
            terms = engine(micro, objective, torch.zeros(len(micro.rows), 2, dtype=torch.float64))
            engine.backward(terms.loss)
        peak.mark(f"backward-{i}")
        engine.step()
        peak.mark(f"update-{i}")
    zero3.release(engine)
    return peak.result()


CASES = {
    f"{which}-{name}-{checkpointing}": (lambda folder, n=name, w=which, c=checkpointing: measured(folder, n, w, c))
    for name in SHAPES
    for which in ("reference", "train")
    for checkpointing in ("none", "all")
}


if __name__ == "__main__":
    case_runner.serve(CASES, lambda folder: worlds.write_pairs(folder / "pairs.jsonl", 40))
    sys.exit(0)
