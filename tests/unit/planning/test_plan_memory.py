"""`plan`: the bytes of each phase on a rank, by hand."""

from dataclasses import replace

import pytest
import torch
from planned_models import GIB, POLICY, REFERENCE, SMALL, by_name, h200, needs_of, with_adapters
from transformers import Gemma2Config

from prefopt_dist.config import Plan
from prefopt_dist.planning import memory
from prefopt_dist.planning.fit import find_fit
from prefopt_dist.planning.generation_memory import GenerationSettings, generation_phase
from prefopt_dist.planning.machine import Machine, planned_machine
from prefopt_dist.planning.phases import Placement
from prefopt_dist.planning.sizes import model_sizes
from prefopt_dist.planning.work import disk_needed
from prefopt_dist.planning.zero_settings import ZeroSettings


def test_a_tiny_model_by_hand() -> None:
    """V 100, d 8, one layer of 4 heads of 2 (2 of keys): 64+32+32+64 of attention, 3·8·16 of the MLP, 2·8 norms."""
    sizes = model_sizes(SMALL, torch.bfloat16, 8)
    layer = 64 + 32 + 32 + 64 + 3 * 8 * 16 + 2 * 8
    n, small = 2 * 100 * 8 + 3 * layer + 8, 7 * 8
    assert (sizes.parameters, sizes.head, sizes.persistent) == (n, 800, small)
    assert sizes.repeated_kv_bytes == 2 * (4 - 2) * 2 * 2
    zero = replace(ZeroSettings.of(POLICY, 2), reduce_bucket=1000, max_live=900, prefetch=300)
    mine = (n - small) // 2 + small
    parts = by_name(memory.backward_phase(sizes, zero, Placement(2, True), 10, 0))
    assert parts == {
        "parameters": 2 * mine,
        "gradients": 4 * mine,
        "master weights": 4 * mine,
        "AdamW's moments": 8 * mine,
        "gathered parameters": 2 * 900,
        "prefetch buffer": 2 * 300,
        "reduce buffers": 4 * (1000 + 1000),  # communication_data_type is float32
        "head gradient": 4 * 800 + 2 * 800,
        "activations": replace(sizes.activations, on_gpu=True).bytes(10, 0),
        # Heads of 2 are not the flash kernel's: dQ, dK and dV of 4 and 2 heads, and 10 tiles of 10 queries and 10 keys.
        "attention's backward": 10 * (2 * 4 * 2 + 4 * 2 * (2 + 2)),
        "attention's block": 10 * 10 * (10 * 20 * 4 + 8 * 2 * (2 + 2)),
    }
    in_bfloat16 = ZeroSettings.of({k: v for k, v in POLICY.items() if k != "communication_data_type"}, 2)
    assert (zero.reduced_dtype_bytes, in_bfloat16.reduced_dtype_bytes) == (4, 2)
    parts = by_name(memory.update_phase(sizes, zero, Placement(2, True), 10, 0))
    assert parts["reduce buffer"] == 4 * 1000
    assert parts["flat gradient"] == 4 * mine
    assert "AdamW's temporaries" not in parts, "the fused AdamW of the GPU has none"
    first = memory.first_pass_phase(sizes, zero, Placement(2, True), 10)
    assert first.device < memory.backward_phase(sizes, zero, Placement(2, True), 10, 0).device
    loading = memory.loading_phase(sizes, Placement(2, True))
    assert (loading.device, loading.host) == (2 * mine + 2 * 800, 2 * n)


def test_the_heads_block_is_larger_on_a_gpu() -> None:
    """2²⁸ logits there and 100·2²⁰ on a CPU, of 4 bytes and 2 in bfloat16, where there are as many."""
    sizes = needs_of("8B").sizes
    blocks = [by_name(memory.first_pass_phase(sizes, ZeroSettings.of(REFERENCE, 2), Placement(8, gpu), 16_384))
              for gpu in (True, False)]  # fmt: skip
    assert [block["head block"] for block in blocks] == [6 * 2**28, 6 * 100 * 2**20]
    found = [memory.activation_bytes(sizes, Placement(8, True), tokens, 0) for tokens in (8192, 8193)]
    one_more = sizes.activations.layers * sizes.activations.per_token_whole_layer + sizes.activations.per_token_ends
    assert found[1] - found[0] == pytest.approx(one_more, abs=1)


def test_generation_by_hand() -> None:
    """Three layers with 2 key heads of 2: 2·2·2·2 bytes a token and layer. 1000 tokens at once: 20 lines of 20 + 30."""
    sizes = model_sizes(SMALL, torch.bfloat16, 8)
    of = sizes.activations
    asked = GenerationSettings(batch_tokens=1000, prompt_tokens=20, new_tokens=30, n=4, uses_top_p=False)
    phase = generation_phase(sizes, Placement(8, True), asked)
    assert by_name(phase) == {
        "parameters, whole": 2 * sizes.parameters,
        "parameters while loading": 2 * sizes.parameters,
        "keys and values": 3 * 16 * 1000,
        "one layer's, while copied": 16 * 1000,
        "prompts, one layer": int(6 * 20 * (of.per_token_layer + of.per_token_ends)),  # 1 + 4·4 + 3 lines
        "logits and sampling": (1000 // 31) * 100 * (2 + 16),
    }
    assert phase.host == 2 * sizes.parameters
    assert generation_phase(sizes, Placement(512, True), asked) == phase, "no number of ranks divides a whole copy"
    parts = by_name(generation_phase(sizes, Placement(8, True), replace(asked, batch_tokens=10, uses_top_p=True)))
    assert parts["keys and values"] == 3 * 16 * 50, "a line alone, whatever the budget"
    assert parts["logits and sampling"] == 100 * (2 + 40)


def test_one_rank_gathers_nothing() -> None:
    sizes = needs_of("8B").sizes
    for place, gathers in ((Placement(1, True), False), (Placement(2, True), True)):
        names = by_name(memory.backward_phase(sizes, ZeroSettings.of(POLICY, 2), place, 10, 0))
        assert ("gathered parameters" in names) == gathers


def test_what_cuda_and_nccl_take_by_hand() -> None:
    """A connection has LL 8·512·8·16, LL128 120·640·8·8 and Simple 4 MiB; the tree's two come beside the ring's."""
    zero = ZeroSettings.of(POLICY, 2)
    connection = 524_288 + 4_915_200 + 4_194_304
    context, buffers = memory.libraries(Placement(2, True), zero)
    assert (context.bytes, buffers.bytes) == (512 * 2**20, 32 * 3 * connection)
    assert buffers.bytes / GIB == pytest.approx(0.86, abs=0.01)
    assert memory.libraries(Placement(2, True), replace(zero, secondary=2))[1].bytes == 2 * buffers.bytes
    assert memory.libraries(Placement(1, True), zero) == (context,)
    assert memory.libraries(Placement(2, False), zero) == ()
    phases = find_fit(needs_of("8B"), h200(1)).phases
    assert all(phase.parts[:2] == (context, buffers) for phase in phases)
    backward = by_name(phases[0])
    assert backward["attention's backward"] == 8192 * 4096 * (4 + 2 * 2)


def test_the_block_of_scores_is_planned_where_the_flash_kernel_does_not_run() -> None:
    """Gemma 2's cap: one bounded block in training's backward pass and in the first pass; on a CPU no such part."""
    model = Gemma2Config(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=64
    )
    zero = ZeroSettings.of(POLICY, 2)
    sizes = model_sizes(model, torch.bfloat16, zero.persistence)
    shared = replace(sizes, activations=replace(sizes.activations, keys_per_token=9.0))
    passes = (memory.backward_phase, memory.first_pass_phase)
    for phase, more in zip(passes, ((0,), ()), strict=True):
        gpu, of_shared, cpu = (
            by_name(phase(s, zero, Placement(2, on_gpu), 8192, *more))
            for s, on_gpu in ((sizes, True), (shared, True), (sizes, False))
        )
        assert gpu["attention's block"] == 512 * 2**20
        assert of_shared == gpu, "no keys are gathered for the whole row"
        assert "attention's block" not in cpu
    backward = by_name(memory.backward_phase(sizes, zero, Placement(2, True), 8192, 0))
    assert backward["attention's backward"] == 8192 * (2 * 8 * 64 + 4 * 4 * 2 * 64)
    uncapped = model_sizes(Gemma2Config(**model.to_dict() | {"attn_logit_softcapping": None}), torch.bfloat16, 1)
    assert "attention's block" not in by_name(memory.backward_phase(uncapped, zero, Placement(2, True), 8192, 0))


def test_what_stays_free_of_a_machine() -> None:
    for name, free in (("h200", 14_100_000_000), ("a100-40", 4 * GIB), ("l40s", 4_800_000_000)):
        machine = planned_machine(Plan(gpu=name))  # type: ignore[arg-type]
        assert machine.memory - machine.usable == free
    assert Machine("cpu", 1, 2, 10 * GIB, None, 0.6, False).usable == 9 * GIB


def test_the_second_shard_of_hpz() -> None:
    sizes = needs_of("8B").sizes
    zero = replace(ZeroSettings.of(POLICY, 2), secondary=8)
    names = by_name(memory.backward_phase(sizes, zero, Placement(64, True), 10, 0))
    assert names["second shard (hpZ)"] == pytest.approx(2 * sizes.parameters / 8, rel=1e-3)


def test_adapters_by_hand() -> None:
    """Of an 8B: r · (in + out) of q, o (4096 → 4096), k, v (→ 1024), gate, up, down (4096 ↔ 14,336) of 32 layers."""
    needs, whole = with_adapters("8B", r=16), needs_of("8B")
    layer = 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14_336))
    trained = 32 * layer
    assert trained == 41_943_040
    assert (needs.sizes.trained, needs.sizes.parameters) == (trained, whole.sizes.parameters + trained)
    assert whole.sizes.trained == whole.sizes.parameters
    place = Placement(8, True)
    parts = by_name(memory.backward_phase(needs.sizes, needs.policy, place, 10, 0))
    assert parts["gradients"] == parts["master weights"] == 4 * trained // 8
    assert parts["AdamW's moments"] == 8 * trained // 8
    assert parts["parameters"] == pytest.approx(2 * 8_072_204_288 / 8, rel=0.01)
    assert "head gradient" not in parts
    assert by_name(memory.update_phase(needs.sizes, needs.policy, place, 10, 0))["flat gradient"] == 4 * trained // 8
    for merged, size in ((False, trained), (True, needs.sizes.parameters)):
        found = disk_needed(needs.sizes, 2, 2, None, merged=merged)
        assert (found.checkpoint, found.conversion, found.export) == (12 * trained, 12 * trained, 2 * size)
    named = with_adapters("8B", r=8, target_modules=("q_proj", "v_proj"))
    assert named.sizes.trained == 32 * 8 * (4096 + 4096 + 4096 + 1024)


def test_a_base_in_4_bit_by_hand() -> None:
    """Of an 8B's linear layers: half a byte a weight, shared out, and 4/64 of scales, whole on each rank."""
    needs, whole = with_adapters("8B", r=16, base="nf4"), with_adapters("8B", r=16)
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336)
    n = needs.sizes.parameters
    assert (needs.sizes.quantised, whole.sizes.quantised) == (linear, 0)
    assert n == whole.sizes.parameters
    place = Placement(8, True)
    parts = by_name(memory.backward_phase(needs.sizes, needs.policy, place, 10, 0))
    assert parts["parameters"] == pytest.approx((2 * (n - linear) + linear / 2) / 8, rel=0.01)
    assert parts["scales of 4-bit weights"] == linear // 16
    loading = by_name(memory.loading_phase(needs.sizes, place))
    assert loading["parameters, whole"] == pytest.approx(2 * (n - linear) + linear / 2 + linear / 16, rel=1e-6)
    assert "scales of 4-bit weights" not in by_name(memory.backward_phase(whole.sizes, whole.policy, place, 10, 0))
