"""The memory that a job needs, by its configuration and by its model's configuration."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from prefopt_dist.batching.micro_batch import ComputePath
from prefopt_dist.config import Config
from prefopt_dist.objectives.factory import make_objective
from prefopt_dist.planning.fit import Needs
from prefopt_dist.planning.generation_memory import GenerationSettings
from prefopt_dist.planning.sizes import model_sizes
from prefopt_dist.planning.zero_settings import ZeroSettings
from prefopt_dist.setup.check_lora import adapter_of
from prefopt_dist.setup.prepare_models import DTYPES, with_model_buckets, zero_settings


def job_needs(config: Config, model: PreTrainedConfig, keys_per_token: float, path: ComputePath = "shared") -> Needs:
    """Return what the job needs.

    Args:
        config: the configuration.
        model: the model's configuration.
        keys_per_token: gathered keys per token of a micro-batch.
        path: how micro-batches are computed.
    """
    dtype = DTYPES[config.model.dtype]
    objective = make_objective(config.loss, dtype)
    adapter = adapter_of(config.lora, model, config.model.name_or_path)
    policy = with_model_buckets(zero_settings(config.deepspeed.policy, "deepspeed.policy"), model, adapter)
    reference = with_model_buckets(zero_settings(config.deepspeed.reference, "deepspeed.reference"), model)
    for_policy = ZeroSettings.of(policy, dtype.itemsize)
    for_reference = ZeroSettings.of(reference, dtype.itemsize)
    if config.reference.offload == "cpu":
        for_reference = for_reference.offloading(False, True)
    sizes = model_sizes(model, dtype, for_policy.persistence, adapter, path, config.train.sequence_parallel)
    activations = replace(sizes.activations, keys_per_token=keys_per_token, longest=config.data.max_length)
    return Needs(
        sizes=replace(sizes, activations=activations),
        policy=for_policy,
        reference=for_reference,
        tokens=config.train.micro_batch_tokens,
        reference_tokens=config.reference_micro_batch_tokens if objective.needs_reference else None,
        checkpointing=config.model.checkpointing,
        reference_follows=config.reference.micro_batch_tokens is None,
        generation=_sampled(config),
    )


def _sampled(config: Config) -> GenerationSettings | None:
    """Return how generate, rounds and evaluate.prompts sample; None without rewards, or where servers sample."""
    generate = config.generate
    if not generate.rewards or generate.engine == "server":
        return None
    return GenerationSettings(
        batch_tokens=generate.batch_tokens,
        prompt_tokens=max(1, config.data.max_length - generate.max_new_tokens),
        new_tokens=generate.max_new_tokens,
        n=generate.n if config.evaluate.prompts is None else min(generate.n, config.evaluate.samples),
        uses_top_p=generate.top_p < 1,
    )
