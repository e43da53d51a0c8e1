"""Part 4: measured peaks of device memory beside the plan's estimates, the release of the reference, offloading.

On the CPU the same code runs, but its peaks say nothing: one process runs all cases, and its heap keeps the largest.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import letters
import numpy as np
import torch
import worlds
from gpu_results import Place, Results, start_ranks, synchronize
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import meter
from benchmarks.pairs import MIXES, draw_lengths
from prefopt_dist.batching.micro_batch import MicroBatch
from prefopt_dist.batching.packing import pack
from prefopt_dist.config import Config, load_config
from prefopt_dist.data.unit import Unit
from prefopt_dist.distributed import zero3
from prefopt_dist.model.load import load_sharded
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import DPO
from prefopt_dist.planning import memory
from prefopt_dist.planning.fit import find_fit
from prefopt_dist.planning.machine import Machine
from prefopt_dist.planning.phases import Placement
from prefopt_dist.setup import prepare_models, prepare_policy, prepare_reference
from prefopt_dist.setup.memory_needs import job_needs

TOLERANCE = 0.15
"""|estimate − peak| over peak, as of the CPU's peaks in tests/ranks/test_plan_peaks.py"""
LEFT = 64 * 2**20
"""Bytes that may be left after a release: cuBLAS keeps its workspaces"""
TOKENS, TINY_TOKENS = 8192, 384


def write_world(place: Place) -> Path:
    folder = place.scratch / "memory"
    folder.mkdir()
    model = folder / "model"
    letters.write_model(model, hidden=32, layers=2, vocabulary=300)
    if not place.tiny:  # half a billion parameters with the shape of a 1B model's layers
        config = LlamaConfig.from_pretrained(model)
        config.update(
            {
                "vocab_size": 32_768,
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_hidden_layers": 8,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "max_position_embeddings": 16_384,
            }
        )
        with place.device:
            LlamaForCausalLM(config).to(place.dtype).save_pretrained(model)
    worlds.write_pairs(folder / "pairs.jsonl", 8)
    return folder


def config_for(place: Place, folder: Path, checkpointing: str, offload: bool = False) -> Config:
    file = folder / f"{checkpointing}-{offload}.yaml"
    deepspeed: dict[str, object] = {}
    if offload:
        settings = json.loads(Path("deepspeed_configs/policy_zero3.json").read_text())
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": place.cuda}
        (folder / "offload.json").write_text(json.dumps(settings))
        deepspeed = {"policy": str(folder / "offload.json")}
    worlds.write_run(
        file,
        folder / "model",
        folder / "pairs.jsonl",
        folder / "run",
        model={
            "name_or_path": str(folder / "model"),
            "dtype": str(place.dtype).removeprefix("torch."),
            "checkpointing": checkpointing,
        },
        train={"micro_batch_tokens": TINY_TOKENS if place.tiny else TOKENS},
        deepspeed=deepspeed,
    )
    return load_config(file)


def batches(place: Place) -> dict[str, MicroBatch]:
    """Micro-batches of about equally many tokens, by how their pairs share and how long they are."""
    draw = np.random.default_rng(0)
    total = TINY_TOKENS if place.tiny else TOKENS

    def tokens(n: int) -> np.ndarray:
        return draw.integers(3, 300, size=n, dtype=np.int32)

    def of_mix(mix: str) -> list[Unit]:
        units: list[Unit] = []
        left = total
        for lengths in draw_lengths(MIXES[mix], 512):
            prompt, chosen, rejected = (min(n, total // 4) for n in lengths)
            if prompt + chosen + rejected <= left:
                units.append(Unit(len(units), tokens(prompt), (tokens(chosen), tokens(rejected))))
                left -= prompt + chosen + rejected
        return units

    part = total // 50
    prompt = tokens(2 * part)
    long = [tokens(n) for n in (total // 4, total // 2 - total // 8, total // 2 - total // 8)]
    return {
        "pairs like UltraFeedback's": pack(of_mix("ultrafeedback-like"), 2),
        "24 pairs of one prompt": pack([Unit(i, prompt, (tokens(part), tokens(part))) for i in range(24)], 2),
        "pairs like HH's": pack(of_mix("hh-like"), 2),
        "one long pair": pack([Unit(0, long[0], (long[1], long[2]))], 2),
    }


class Measure:
    """Bytes above those allocated when it was made."""

    def __init__(self, place: Place) -> None:
        self.place = place
        synchronize(place)
        self.start = meter.start_peak()

    def now(self) -> int:
        synchronize(self.place)
        return meter.resident_now() - self.start

    def peak(self) -> int:
        synchronize(self.place)
        return meter.peak() - self.start

    def reset(self) -> None:
        synchronize(self.place)
        meter.start_peak()

    def allocator(self) -> dict[str, int]:
        """What the allocator holds above what is allocated."""
        if not self.place.cuda:
            return {}
        found = torch.cuda.memory_stats()
        return {"reserved_peak": found["reserved_bytes.all.peak"], "retries": found["num_alloc_retries"]}


def run(place: Place, results: Results) -> None:
    start_ranks()
    folder = write_world(place)
    release(place, results, folder)
    for checkpointing, offload in (("none", False), ("all", False), ("none", True)):
        training(place, results, folder, checkpointing, offload)


def estimated(place: Place, config: Config, model: Any, micro: MicroBatch) -> dict[str, int]:
    """The plan's bytes for a micro-batch, by phase, and those of its activations alone."""
    keys, tokens = len(micro.gathered.keys), micro.tokens
    wanted = replace(job_needs(config, model, max(1.0, keys / tokens)), tokens=tokens)
    fit = find_fit(wanted, Machine("here", 1, 1, 2**50, None, 1.0, place.cuda))
    layers = wanted.sizes.activations.layers if wanted.checkpointing == "all" else 0
    on = Placement(1, place.cuda)
    kept = memory.activation_bytes(wanted.sizes, on, tokens, layers)
    return {p.name: p.device for p in fit.phases} | {"activations": kept}


def training(place: Place, results: Results, folder: Path, checkpointing: str, offload: bool) -> None:
    """Peaks of one micro-batch and update; all cases share an engine, whose moments exist after a first update."""
    config = config_for(place, folder, checkpointing, offload)
    models = prepare_models.load_models(config)
    measure = Measure(place)
    engine, _ = prepare_policy.load_policy(config, models, 1.0)
    objective = DPO(0.1)
    chosen = list(batches(place).items())[: 1 if offload else 2 if place.tiny else None]
    how = f"checkpointing {checkpointing}" + (", optimizer offloaded" if offload else "")
    for i, (name, packed) in enumerate([chosen[0], *chosen]):
        label = f"training, {how}: {'first update, ' if i == 0 else ''}{name}"
        with results.case(label) as found:
            measure.reset()
            micro = packed.to(place.device)
            before = measure.now()
            engine.set_gradient_accumulation_boundary(True)
            terms = engine(micro, objective, torch.zeros(len(micro.rows), 2, dtype=torch.float64, device=place.device))
            kept = measure.now() - before
            engine.backward(terms.loss)
            backward = measure.peak()
            engine.step()
            del terms
            plans = estimated(place, config, models.policy.config, micro)
            planned = max(plans["training: backward"], plans["training: update"])
            deviation = planned / measure.peak() - 1
            found |= {
                "tokens": micro.tokens,
                "peak": measure.peak(),
                "peak_of_backward": backward,
                "planned": planned,
                "deviation": deviation,
                "kept_by_forward": kept,
                "planned_activations": plans["activations"],
                **measure.allocator(),
                "ok": abs(deviation) <= TOLERANCE if place.cuda else None,
            }
    zero3.release(engine)
    del engine
    with results.case(f"training, {how}: after the release") as found:
        found |= {"left": measure.now(), "ok": measure.now() <= LEFT if place.cuda else None}


def release(place: Place, results: Results, folder: Path) -> None:
    """The first pass's peak beside the plan, and what is left once its engine is released."""
    config = config_for(place, folder, "none")
    models = prepare_models.load_models(config)
    measure = Measure(place)
    with results.case("first pass and the release of the reference engine") as found:
        settings = prepare_reference.reference_settings(config, models)
        engine = zero3.reference_engine(
            Scorer(load_sharded(models.reference, dtype=models.dtype, settings=settings)), settings
        )
        loaded = measure.now()
        measure.reset()
        micro = batches(place)["pairs like UltraFeedback's"].to(place.device)
        with torch.no_grad():
            engine(micro)
        peak = measure.peak()
        plans = estimated(place, replace_reference_tokens(config, micro.tokens), models.policy.config, micro)
        zero3.release(engine)
        del engine
        left = measure.now()
        found |= {
            "loaded": loaded,
            "peak": peak,
            "planned": plans["first pass"],
            "deviation": plans["first pass"] / peak - 1 if peak else None,
            "left": left,
            **measure.allocator(),
            "ok": left <= LEFT if place.cuda else None,
        }


def replace_reference_tokens(config: Config, tokens: int) -> Config:
    return replace(config, reference=replace(config.reference, micro_batch_tokens=tokens))
