"""The estimate of activations against what autograd really keeps, and the choice that rests on it."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from prefopt_dist.batching.layout import most_keys_per_token
from prefopt_dist.batching.packing import gathered_keys, pack, packed_tokens
from prefopt_dist.config import Lora
from prefopt_dist.data.unit import Unit
from prefopt_dist.distributed import zero3
from prefopt_dist.errors import UserError
from prefopt_dist.model import activation_checkpointing, attention
from prefopt_dist.model.adapter import Adapter, attach
from prefopt_dist.model.cost import (
    ActivationMemory,
    activation_memory,
    active_parameters,
    adapter_parameters,
    forward_cost,
    layer_parameters,
)
from prefopt_dist.model.load import own_attention
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.planning.sizes import model_sizes
from prefopt_dist.setup.check_lora import adapter_of

GIB = 2**30
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "phi3": Phi3Config(**SHAPE),
    "gemma2": Gemma2Config(**SHAPE, head_dim=16, attn_logit_softcapping=None),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=5, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(
        **SHAPE, head_dim=16, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=40, norm_topk_prob=True
    ),
}


def bytes_kept(own: set[int], forward: Callable[[], object]) -> int:
    """Bytes of the storages that a forward pass keeps for the backward pass, without those at `own` addresses."""
    found: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        forward()
    return sum(s.nbytes() for s in found.values())


def kept(config: PreTrainedConfig, checkpointed: int, tokens: int, adapter: Adapter | None = None) -> int:
    """Bytes that a real forward pass over one unshared sequence keeps, weights and the head's block apart."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention.NAME)
    if adapter is not None:
        attach(lm, adapter)
    scorer = Scorer(lm).train()
    activation_checkpointing.apply(lm, checkpointed)
    own = {p.untyped_storage().data_ptr() for p in [*lm.parameters(), *lm.buffers()]}
    ids = torch.randint(1, 300, (tokens,), generator=torch.Generator().manual_seed(0)).numpy().astype("int32")
    micro_batch = pack([Unit(0, ids[: tokens // 2], (ids[tokens // 2 :],))], 1)
    return bytes_kept(own, lambda: scorer(micro_batch))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("checkpointed", [0, 3, 6])
def test_the_estimate_is_what_autograd_keeps(name: str, checkpointed: int) -> None:
    config, tokens = CONFIGS[name], 512
    memory = activation_memory(config, torch.float32)
    again = tokens * memory.per_token_layer if checkpointed else 0
    # What comes only in the backward pass is not among what is kept now, and half of the tokens reach the head.
    estimate = memory.bytes(tokens, checkpointed) - memory.block(tokens) - again
    ends = tokens * memory.per_token_ends
    assert 0.9 * (estimate - ends) <= kept(config, checkpointed, tokens) <= 1.1 * estimate


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("checkpointed", [0, 3])
def test_the_estimate_with_adapters(name: str, checkpointed: int) -> None:
    """A frozen layer keeps nothing for its weight; an adapter keeps its input and the r numbers between A and B."""
    config, tokens = CONFIGS[name], 512
    adapter = adapter_of(Lora(r=8), config, "some/model")
    memory, whole = (activation_memory(config, torch.float32, a) for a in (adapter, None))
    assert memory.per_token_layer < 1.1 * whole.per_token_layer
    again = tokens * memory.per_token_layer if checkpointed else 0
    estimate = memory.bytes(tokens, checkpointed) - memory.block(tokens) - again
    ends = tokens * memory.per_token_ends
    # The first layer's input has no gradient, so that it keeps less than the others, by which it is counted.
    assert 0.85 * (estimate - ends) <= kept(config, checkpointed, tokens, adapter) <= 1.1 * estimate


def kept_plain(config: PreTrainedConfig, rows: int, length: int) -> int:
    """Bytes that a real forward pass over padded rows keeps, weights and the head's block apart."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=own_attention(config))
    scorer = Scorer(lm, "plain").train()
    own = {p.untyped_storage().data_ptr() for p in [*lm.parameters(), *lm.buffers()]}
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 300, (length + 1,), generator=draw).numpy().astype("int32") for _ in range(rows)]
    micro_batch = pack([Unit(i, row[: length // 2], (row[length // 2 :],)) for i, row in enumerate(ids)], 1, "plain")
    assert micro_batch.tokens == rows * length
    return bytes_kept(own, lambda: scorer(micro_batch))


@pytest.mark.parametrize("length", [128, 512])
def test_the_scores_that_eager_attention_keeps(length: int) -> None:
    """For each token, layer and token of its row; twice the rows keep twice as much."""
    fields = {"head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16}
    config = Gemma2Config(**SHAPE | fields)
    memory = replace(activation_memory(config, torch.float32, path="plain"), longest=length)
    heads = config.num_attention_heads
    assert memory.per_token_key == pytest.approx(2 * 4 * heads, rel=0.02), "the capped scores, and their softmax"
    for rows in (1, 2):
        tokens = rows * length
        estimate = memory.bytes(tokens, 0) - memory.block(tokens)
        ends = tokens * memory.per_token_ends
        assert 0.9 * (estimate - ends) <= kept_plain(config, rows, length) <= 1.1 * estimate


def test_layers_that_differ_are_counted_each() -> None:
    """Two that carry state along the row and one that attends, of a family that only padded rows compute."""
    fields = {"layer_types": ["mamba", "attention", "mamba"], "num_hidden_layers": 3, "shared_intermediate_size": 160}
    recurrence = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
    config = GraniteMoeHybridConfig(**SHAPE | fields | recurrence, num_local_experts=0, num_experts_per_tok=0)
    memory = activation_memory(config, torch.float32, path="plain")
    estimate = memory.bytes(128, 0) - memory.block(128)
    found = kept_plain(config, 2, 64)
    assert 0.9 * (estimate - 128 * memory.per_token_ends) <= found <= 1.1 * estimate
    assert forward_cost(config).per_token > 0


def test_sdpa_keeps_no_scores() -> None:
    memory, shared = (activation_memory(CONFIGS["llama"], torch.float32, path=path) for path in ("plain", "shared"))
    assert memory.per_token_key == 0
    assert memory.per_token_layer == shared.per_token_layer
    assert replace(memory, longest=4096).bytes(512, 0) == memory.bytes(512, 0)
    # On the CPU it repeats keys and values for each query head, as ours does (planning/cpu_memory.py).
    repeated = model_sizes(CONFIGS["llama"], torch.float32, 0, path="plain").repeated_kv_bytes * memory.layers
    estimate = memory.bytes(512, 0) - memory.block(512)
    found = kept_plain(CONFIGS["llama"], 4, 128)
    assert 0.9 * (estimate - 512 * memory.per_token_ends) <= found <= 1.1 * (estimate + 512 * repeated)


class _Kernel(torch.autograd.Function):
    """What the flash kernel keeps: its operands, its result, and a float32 for each head and query."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


def kept_of_units(config: PreTrainedConfig, units: list[Unit], checkpointed: int) -> tuple[int, int]:
    """Bytes that a real forward pass keeps, weights, micro-batch and the head's block apart; tokens of the row."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention.NAME)
    lm.train()
    activation_checkpointing.apply(lm, checkpointed)
    micro_batch = pack(units, 2)
    tensors = [t for t in [*vars(micro_batch).values(), *vars(micro_batch.gathered).values()] if torch.is_tensor(t)]
    own = {t.untyped_storage().data_ptr() for t in [*lm.parameters(), *lm.buffers(), *tensors]}
    forward = partial(
        lm.base_model,
        input_ids=micro_batch.input_ids,
        position_ids=micro_batch.position_ids,
        segments=micro_batch.segments,
        gathered=micro_batch.gathered,
        use_cache=False,
    )
    return bytes_kept(own, forward), micro_batch.tokens


def units_of_one_prompt(prompt: int, response: int, pairs: int, first: int = 0) -> list[Unit]:
    """Pairs of one prompt, whose responses begin with different tokens."""
    ids = np.arange(1 + first, 1 + first + prompt, dtype=np.int32) % 290
    texts = [np.r_[i % 290, np.arange(response - 1)].astype(np.int32) % 290 for i in range(2 * pairs)]
    return [Unit(first + i, ids, (texts[2 * i], texts[2 * i + 1])) for i in range(pairs)]


GROUPED = LlamaConfig(**SHAPE | {"num_key_value_heads": 2})
BATCHES = {
    "24 pairs of one long prompt": units_of_one_prompt(200, 6, 24),
    "24 pairs of one short prompt": units_of_one_prompt(20, 30, 24),
    "one pair": units_of_one_prompt(150, 150, 1),
    "8 pairs of 8 prompts": [u for i in range(8) for u in units_of_one_prompt(40, 20, 1, first=50 * i)],
    "two prompts of 8 pairs": [u for i in range(2) for u in units_of_one_prompt(100, 10, 8, first=100 * i)],
}


@pytest.mark.parametrize("checkpointed", [0, 3])
@pytest.mark.parametrize("config", [CONFIGS["llama"], GROUPED], ids=["heads", "grouped heads"])
@pytest.mark.parametrize("batch", BATCHES)
def test_gathered_keys_and_values_are_counted(
    batch: str, config: PreTrainedConfig, checkpointed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's operands are real, its numbers are not: within 10 % of what autograd keeps, for each shape."""

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        out: torch.Tensor = _Kernel.apply(q, k, v)  # type: ignore[no-untyped-call]
        return out

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "varlen_supported", lambda *_: True)
    units = BATCHES[batch]
    measured, tokens = kept_of_units(config, units, checkpointed)
    memory = activation_memory(config, torch.float32)
    ratio = most_keys_per_token(units, tokens)
    assert ratio == pytest.approx(len(pack(units, 2).gathered.keys) / tokens)
    memory = replace(memory, keys_per_token=ratio)
    head = 3 * config.hidden_size * 4 * tokens  # what reaches the head is not among what is kept here
    again = tokens * memory.per_token_whole_layer if checkpointed else 0
    estimate = memory.bytes(tokens, checkpointed) - memory.block(tokens) - again - head
    print(f"{batch}: {ratio:.2f} keys a token, {measured:,} bytes kept, {estimate / measured - 1:+.1%} estimated")
    assert estimate == pytest.approx(measured, rel=0.1)


def test_a_long_prompt_of_many_pairs_keeps_more_than_its_tokens_say() -> None:
    units = BATCHES["24 pairs of one long prompt"]
    memory = activation_memory(CONFIGS["llama"], torch.float32)
    tokens = packed_tokens(units)
    ratio = most_keys_per_token(units, 8192)
    assert (tokens, gathered_keys(units)) == (200 + 48 * 5, 48 * 205)
    assert ratio == gathered_keys(units) / tokens
    more = replace(memory, keys_per_token=ratio).bytes(tokens, 0) - memory.bytes(tokens, 0)
    assert more == 6 * 2 * 64 * 4 * (gathered_keys(units) - tokens)
    half = most_keys_per_token([*units, *BATCHES["one pair"]], 2 * tokens)
    assert 1 < half < ratio, "a full micro-batch has other pairs too"
    assert most_keys_per_token([*units, *BATCHES["one pair"]], tokens) == pytest.approx(ratio)


def test_the_flash_kernel_s_backward_by_hand() -> None:
    """Llama 8B, 8,192 tokens: dQ in float32 for 32 heads of 128, dK and dV in bfloat16 for 32 heads instead of 8."""
    shape = {"hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32, "num_key_value_heads": 8}
    memory = activation_memory(LlamaConfig(**SHAPE | shape), torch.bfloat16)
    assert memory.flash_backward(8192) == 8192 * 4 * 4096 + 8192 * 2 * 2 * 4096
    assert replace(memory, keys_per_token=1.5).flash_backward(8192) == 8192 * 4 * 4096 + 12288 * 2 * 2 * 4096
    assert activation_memory(LlamaConfig(**SHAPE | shape), torch.float32).flash_backward(8192) == 0, "not its dtype"


CAPPED = Gemma2Config(**SHAPE | {"num_attention_heads": 8, "num_key_value_heads": 2}, head_dim=32)


def test_attention_in_blocks_by_hand() -> None:
    """Gemma 2 with its cap, 8 heads of 32 on 2: 20 bytes a score and head, 8 a number of a key and its value."""
    memory = activation_memory(CAPPED, torch.bfloat16)
    assert memory.flash_backward(8192) == 0
    assert memory.attention_block(8192) == 512 * 2**20, "8192² scores of 8 heads would take 10 GiB"
    score, key, padding = 20 * 8, 8 * 2 * (32 + 32), 128 * 2**20
    assert memory.attention_block(300) == 300 * 300 * score + 300 * key + 3 * 300 * key + padding, "three tiles of 128"
    assert memory.attention_block(8) == 8 * 8 * (8 * score + key), "eight tiles of eight queries, most of them padding"
    assert memory.attention_block(500_000) == 2 * 500_000 * key, "a tile has all keys that its queries see"
    gradients = 2 * 8 * 32 + 4 * 2 * (32 + 32)  # dQ in bfloat16, dK and dV in float32
    assert memory.attention_backward(8192) == 512 * 2**20 + 8192 * gradients


def test_attention_in_blocks_keeps_no_gathered_keys_on_a_gpu() -> None:
    memory = replace(activation_memory(CAPPED, torch.bfloat16), keys_per_token=20.0)
    layer = replace(memory, on_gpu=True).per_token_whole_layer
    assert layer == memory.per_token_layer
    assert layer < memory.per_token_whole_layer, "on the CPU long segments gather theirs"
    flash = replace(activation_memory(CONFIGS["llama"], torch.bfloat16), keys_per_token=20.0)
    assert replace(flash, on_gpu=True).per_token_whole_layer == flash.per_token_whole_layer
    assert flash.attention_block(8192) == 0


@pytest.mark.parametrize("checkpointed", [0, 3])
@pytest.mark.parametrize("batch", BATCHES)
def test_what_attention_in_blocks_keeps_is_counted(batch: str, checkpointed: int) -> None:
    """A cap goes by blocks on every device: within 10 % of what autograd keeps, for each shape."""
    measured, tokens = kept_of_units(CAPPED, BATCHES[batch], checkpointed)
    counted = activation_memory(CAPPED, torch.float32)
    memory = replace(counted, keys_per_token=most_keys_per_token(BATCHES[batch], tokens), on_gpu=True)
    head = 3 * CAPPED.hidden_size * 4 * tokens  # what reaches the head is not among what is kept here
    again = tokens * memory.per_token_whole_layer if checkpointed else 0
    estimate = memory.bytes(tokens, checkpointed) - memory.block(tokens) - again - head
    print(f"{batch}: {measured:,} bytes kept, {estimate / measured - 1:+.1%} estimated")
    assert estimate == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("dtype", "changes"), [(torch.float32, {}), (torch.bfloat16, {"head_dim": 12})])
def test_what_the_flash_kernel_does_not_take_goes_by_blocks(dtype: torch.dtype, changes: dict[str, int]) -> None:
    memory = activation_memory(LlamaConfig(**SHAPE | changes), dtype)
    assert not memory.gathers_on_gpu
    assert memory.attention_block(8192) == 512 * 2**20


class FakeGPU:
    """torch.cuda of a device of which `free` of `total` bytes are free."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int, total: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, total))


@pytest.mark.parametrize(("total", "reserved"), [(80 * GIB, 8 * GIB), (24 * GIB, 4 * GIB)])
def test_a_share_of_the_whole_gpu_stays_free(monkeypatch: pytest.MonkeyPatch, total: int, reserved: int) -> None:
    """However little is free: a tenth of the total, and 4 GiB at least; never below 0."""
    FakeGPU(monkeypatch, 12 * GIB, total)
    assert activation_checkpointing.usable_bytes() == 12 * GIB - reserved
    FakeGPU(monkeypatch, GIB, total)
    assert activation_checkpointing.usable_bytes() == 0


def test_a_tenth_of_the_free_memory_of_a_host_stays_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_checkpointing, "host_bytes", lambda: 10 * GIB)
    assert activation_checkpointing.usable_bytes() == 9 * GIB


def test_by_hand() -> None:
    """A Llama layer of width D keeps some tens of D bytes a token in bfloat16, a checkpointed one 2 D."""
    memory = activation_memory(LlamaConfig(**SHAPE | {"hidden_size": 1024, "intermediate_size": 3584}), torch.bfloat16)
    assert memory.layers == 6
    assert memory.per_token_checkpoint == 2 * 1024
    assert 35 < memory.per_token_layer / 1024 < 65


MEMORY = ActivationMemory(
    layers=4, per_token_layer=100.0, per_token_checkpoint=10.0, per_token_ends=5.0, vocabulary=1, per_logit=1
)


def test_as_few_layers_as_fit() -> None:
    full = MEMORY.bytes(1000, 0)
    assert full == 1000 * 406
    assert MEMORY.fewest_checkpointed(1000, full) == 0
    assert MEMORY.fewest_checkpointed(1000, full - 1) == 2  # one layer saves less than computing it again takes
    assert MEMORY.fewest_checkpointed(1000, MEMORY.bytes(1000, 4)) == 4
    assert MEMORY.fewest_checkpointed(1000, MEMORY.bytes(1000, 4) - 1) is None
    most = MEMORY.most_tokens(50_000)
    assert MEMORY.bytes(most, 4) <= 50_000 < MEMORY.bytes(most + 1, 4)


@pytest.mark.parametrize(("mode", "layers"), [("auto", 2), ("none", 0), ("all", 4)])
def test_the_rank_with_least_decides(monkeypatch: pytest.MonkeyPatch, mode: str, layers: int) -> None:
    monkeypatch.setattr(activation_checkpointing.ranks, "all_gather", lambda mine: [mine, MEMORY.bytes(1000, 2)])
    found = activation_checkpointing.choose(MEMORY, mode=mode, tokens=1000, available=10**9)  # type: ignore[arg-type]
    assert found.checkpointed == layers
    assert f"{layers} of 4 layers" in found.text()


def test_what_cannot_fit_is_refused_with_what_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_checkpointing.ranks, "all_gather", lambda mine: [mine])
    with pytest.raises(UserError, match=r"train\.micro_batch_tokens: 1000 tokens .* at most 342"):
        activation_checkpointing.choose(MEMORY, mode="auto", tokens=1000, available=50_000)
    with pytest.raises(UserError, match=r"0 bytes are free\. No number of tokens would fit: use more ranks, or set"):
        activation_checkpointing.choose(MEMORY, mode="auto", tokens=1000, available=0)


def test_some_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is the same with no, some and all layers recomputed."""
    from transformers import LlamaForCausalLM

    gradients = []
    for checkpointed in (0, 2, 6):
        torch.manual_seed(0)
        lm = LlamaForCausalLM._from_config(copy.deepcopy(CONFIGS["llama"]), attn_implementation=attention.NAME).train()
        activation_checkpointing.apply(lm, checkpointed)
        ids = torch.arange(5, 60).numpy().astype("int32")
        Scorer(lm)(pack([Unit(0, ids[:20], (ids[20:],))], 1)).sum().backward()
        gradients.append([p.grad for p in lm.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


def test_buckets_hold_a_layer_unless_the_file_says_otherwise() -> None:
    config = LlamaConfig(**SHAPE | {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8})
    # q, o: 1024²; k, v of 4 heads: 1024·512; gate, up, down: 1024·4096; two norms
    layer = 2 * 1024**2 + 2 * 1024 * 512 + 3 * 1024 * 4096 + 2 * 1024
    assert layer_parameters(config) == layer
    given = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 7}}
    zero = zero3.with_bucket_sizes(given, layer=layer, hidden=1024)["zero_optimization"]
    assert zero == {
        "stage": 3,
        "reduce_bucket_size": 7,
        "stage3_prefetch_bucket_size": layer,
        "stage3_param_persistence_threshold": 10240,
    }
    assert zero3.with_bucket_sizes({}, layer=5, hidden=1)["zero_optimization"]["reduce_bucket_size"] == 1_000_000
    adapter = adapter_of(Lora(r=128), config, "some/model")
    assert adapter is not None
    trained = 128 * (2 * (1024 + 1024) + 2 * (1024 + 512) + 3 * (1024 + 4096))
    assert adapter_parameters(config, adapter) == trained
    zero = zero3.with_bucket_sizes({}, layer=layer, hidden=1024, trained=trained)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (trained, layer)


def test_of_the_experts_those_count_that_a_token_meets() -> None:
    llama, mixtral = CONFIGS["llama"], CONFIGS["mixtral"]
    assert active_parameters(llama) == layer_parameters(llama)
    expert, router = 3 * 64 * 160, 5 * 64
    assert layer_parameters(mixtral) == layer_parameters(llama) + 4 * expert + router
    assert active_parameters(mixtral) == layer_parameters(llama) + expert + router
