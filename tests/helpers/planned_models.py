"""Models and machines of known sizes, for tests of the plan."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from prefopt_dist.config import Lora, Plan, load_deepspeed_json
from prefopt_dist.errors import UserError
from prefopt_dist.planning.fit import Needs, check_fit, fits_with_offloading
from prefopt_dist.planning.machine import Machine, planned_machine
from prefopt_dist.planning.phases import Phase
from prefopt_dist.planning.sizes import model_sizes
from prefopt_dist.planning.zero_settings import ZeroSettings
from prefopt_dist.setup.check_lora import adapter_of
from prefopt_dist.setup.prepare_models import with_model_buckets

GIB = 2**30
POLICY = load_deepspeed_json("deepspeed_configs/policy_zero3.json", "deepspeed.policy")
REFERENCE = load_deepspeed_json("deepspeed_configs/reference_zero3.json", "deepspeed.reference")
SMALL = LlamaConfig(
    vocab_size=100,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
    pad_token_id=0,
)
LARGE = {"vocab_size": 128_256, "num_key_value_heads": 8, "tie_word_embeddings": False, "dtype": "bfloat16"}
LLAMAS = {
    "8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32, **LARGE
    ),
    "70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64, **LARGE
    ),
}


def needs_of(name: str, **changes: Any) -> Needs:
    model = LLAMAS[name]
    zero, reference = (ZeroSettings.of(with_model_buckets(settings, model), 2) for settings in (POLICY, REFERENCE))
    sizes = model_sizes(model, torch.bfloat16, zero.persistence)
    return replace(Needs(sizes, zero, reference, 8192, 16_384, "auto"), **changes)


def h200(nodes: int) -> Machine:
    return planned_machine(Plan(gpu="h200", nodes=nodes))


def by_name(phase: Phase) -> dict[str, int]:
    return {part.name: part.bytes for part in phase.parts}


def with_adapters(name: str, **options: Any) -> Needs:
    adapter = adapter_of(Lora(**options), LLAMAS[name], "some/model")
    zero = ZeroSettings.of(with_model_buckets(POLICY, LLAMAS[name], adapter), 2)
    sizes = model_sizes(LLAMAS[name], torch.bfloat16, zero.persistence, adapter)
    return replace(needs_of(name), sizes=sizes, policy=zero)


def refused(needs: Needs, machine: Machine) -> str:
    with pytest.raises(UserError) as e:
        check_fit(needs, machine, fits_with_offloading(needs, machine))
    return str(e.value)
