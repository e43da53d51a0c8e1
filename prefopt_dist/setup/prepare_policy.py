"""The policy in its engine: loaded with its adapters, its layers fused, some recomputed in the backward pass."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from prefopt_dist.config import Config
from prefopt_dist.distributed import out_of_memory, ranks, zero3
from prefopt_dist.model import activation_checkpointing, compiled_layers
from prefopt_dist.model.adapter import attach, load_saved
from prefopt_dist.model.cost import activation_memory
from prefopt_dist.model.fusion import Fusion, fuse
from prefopt_dist.model.load import load_sharded, under_zero3
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.monitoring.console import format_bytes, say
from prefopt_dist.setup import prepare_models
from prefopt_dist.setup.experts import expert_loads
from prefopt_dist.setup.prepare_models import Models
from prefopt_dist.training.optimizer import adamw


@out_of_memory.phase("loading of the policy")
def load_policy(
    config: Config, models: Models, keys_per_token: float, fusion: Fusion = "none"
) -> tuple[Any, activation_checkpointing.ActivationCheckpointing]:
    """Return the policy's engine, and which layers are recomputed in the backward pass (all ranks call it).

    Args:
        config: the configuration.
        models: of the run.
        keys_per_token: most gathered keys per token of a micro-batch.
        fusion: how the layers are fused.
    """
    zero = ranks.run_on_all_ranks(lambda: prepare_models.zero_settings(config.deepspeed.policy, "deepspeed.policy"))
    settings = zero3.policy_settings(
        prepare_models.with_model_buckets(zero, models.policy.config, models.adapter),
        dtype=models.dtype,
        max_grad_norm=config.optim.max_grad_norm,
    )
    torch.manual_seed(config.run.seed)
    lm = load_sharded(models.policy, dtype=models.dtype, settings=settings, path=models.path)
    if models.adapter is not None:
        torch.manual_seed(config.run.seed)  # whatever loading has drawn: the same on any number of ranks
        with under_zero3(settings):  # DoRA reads whole weights
            attach(lm, models.adapter)
        if models.adapter.start is not None:
            ranks.run_on_all_ranks(partial(load_saved, lm, models.adapter.start))
    if fusion == "layers":
        compiled_layers.prepare(config.cache_dir)
    ranks.run_on_all_ranks(partial(fuse, lm, fusion))
    loads = ranks.run_on_all_ranks(lambda: expert_loads(config, models.policy.config, ranks.device()))
    scorer = Scorer(lm, models.path, cut=True, loads=loads, group=models.group).train()
    optim = config.optim
    optimizer = adamw(
        scorer,
        learning_rate=optim.learning_rate,
        weight_decay=optim.weight_decay,
        betas=optim.betas,
        eps=optim.eps,
    )
    engine = zero3.policy_engine(scorer, optimizer, settings)
    held, whole = zero3.shard_bytes(scorer)
    say(f"policy: each rank holds {format_bytes(held)} of {format_bytes(whole)} of parameters")
    if models.adapter is not None:
        say(f"lora: {zero3.trained_parameters(scorer):,} parameters are trained, the others are frozen")
    memory = activation_memory(models.policy.config, models.dtype, models.adapter, models.path, models.group.size)
    memory = replace(
        memory, keys_per_token=keys_per_token, longest=config.data.max_length, on_gpu=torch.cuda.is_available()
    )
    tokens = config.train.micro_batch_tokens
    available = activation_checkpointing.available_bytes(lm, settings["zero_optimization"])
    if torch.cuda.is_available():
        available = max(0, available - memory.attention_backward(tokens))
    checkpointing = activation_checkpointing.choose(
        memory, mode=config.model.checkpointing, tokens=tokens, available=available
    )
    activation_checkpointing.apply(lm, checkpointing.checkpointed)
    say(checkpointing.text())
    return engine, checkpointing
