"""Cases of rank_cases.py on shards: what each rank holds, the logits, and what a release gives back."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import worlds
from rank_jobs import config_for, make_policy
from transformers import LlamaConfig, LlamaForCausalLM

from prefopt_dist.batching.micro_batch import Segment
from prefopt_dist.batching.packing import pack
from prefopt_dist.config import load_deepspeed_json
from prefopt_dist.data.unit import Unit
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.model.load import load_sharded, load_unsharded
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.setup import prepare_models


def shards(folder: Path) -> dict:
    """Half of the bytes on each of two ranks, logits as the unsharded model's, and nothing left after release."""
    config = config_for(folder, "shards")
    models = prepare_models.load_models(config)
    settings = zero3.reference_settings(
        {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
        dtype=torch.float32,
        offload="none",
    )
    engine = zero3.reference_engine(
        Scorer(load_sharded(models.policy, dtype=torch.float32, settings=settings)), settings
    )
    held, whole = zero3.shard_bytes(engine.module)
    ids = torch.arange(3, 43)[None]
    segments = (Segment(0, 0, 0, 40),)
    with torch.no_grad():
        got = engine.module.lm(input_ids=ids, position_ids=torch.arange(40)[None], segments=segments, use_cache=False)
        want = load_unsharded(models.policy, dtype=torch.float32)(
            input_ids=ids, position_ids=torch.arange(40)[None], segments=segments, use_cache=False
        )
    equal = bool(torch.equal(got.logits, want.logits))
    module, parameter = weakref.ref(engine.module), weakref.ref(next(engine.module.parameters()))
    zero3.release(engine)
    del engine, got
    gc.collect()
    return {
        "held": held,
        "whole": whole,
        "equal": equal,
        "module_alive": module() is not None,
        "parameter_alive": parameter() is not None,
    }


def memory(folder: Path) -> dict:
    """A model of more than 400 MB: what each rank holds of reference and policy, and what release gives back."""
    big = folder / "big"

    def write() -> None:
        worlds.write_model(big)
        config = LlamaConfig.from_pretrained(
            big, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=8, vocab_size=8000
        )
        LlamaForCausalLM(config).save_pretrained(big)

    ranks.run_on_rank_zero(write)
    config = config_for(folder, "memory", model={"name_or_path": str(big), "dtype": "float32"})
    models = prepare_models.load_models(config)
    zero: dict[str, Any] = load_deepspeed_json(config.deepspeed.reference, "deepspeed.reference")
    settings = zero3.reference_settings(zero, dtype=torch.float32, offload="none")
    gc.collect()
    start = psutil.Process().memory_info().rss
    engine = zero3.reference_engine(
        Scorer(load_sharded(models.policy, dtype=torch.float32, settings=settings)), settings
    )
    held, whole = zero3.shard_bytes(engine.module)
    units = [Unit(0, np.arange(3, 40, dtype=np.int32), (np.arange(50, 90, dtype=np.int32),))]
    with torch.no_grad():
        engine(pack(units, 1))
    gc.collect()
    before = psutil.Process().memory_info().rss
    module, parameter = weakref.ref(engine.module), weakref.ref(next(engine.module.parameters()))
    zero3.release(engine)
    del engine
    gc.collect()
    after = psutil.Process().memory_info().rss
    alive = module() is not None or parameter() is not None
    policy = make_policy(config, models)
    policy_held, policy_whole = zero3.shard_bytes(policy.module)
    ids, positions = torch.arange(3, 43)[None], torch.arange(40)[None]
    inputs = {"input_ids": ids, "position_ids": positions, "segments": (Segment(0, 0, 0, 40),), "use_cache": False}
    policy.module.eval()
    with torch.no_grad():
        got = policy.module.lm(**inputs).logits
        want = load_unsharded(models.policy, dtype=torch.float32)(**inputs).logits
    mine = {
        "rank": ranks.rank(),
        "reference": [held, whole],
        "policy": [policy_held, policy_whole],
        "given_back": (before - after) / held,
        "left": (after - start) / held,
        "alive": alive,
        "logits_equal": bool(torch.equal(got, want)),
    }
    return {"ranks": ranks.all_gather(mine)}
