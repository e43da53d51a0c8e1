"""`plan`: the bytes by hand, and what is refused and with what remedy."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import worlds
from transformers import Gemma2Config, LlamaConfig, MixtralConfig

from prefopt_dist.cli import main
from prefopt_dist.config import Lora, Plan, load_config, load_deepspeed_json
from prefopt_dist.data import open_rows
from prefopt_dist.errors import UserError
from prefopt_dist.model.load import load_tokenizer
from prefopt_dist.planning import memory
from prefopt_dist.planning.export import export_plan
from prefopt_dist.planning.fit import Fit, Needs, check_fit, find_fit, fits_with_offloading
from prefopt_dist.planning.generation_memory import GenerationSettings, generation_phase
from prefopt_dist.planning.machine import BANDWIDTHS, GPUS, Machine, known_gpu, planned_machine
from prefopt_dist.planning.network import network
from prefopt_dist.planning.phases import Phase, Placement
from prefopt_dist.planning.rollouts import plan_answers
from prefopt_dist.planning.sizes import model_sizes
from prefopt_dist.planning.work import disk_needed
from prefopt_dist.planning.zero_settings import ZeroSettings
from prefopt_dist.setup.check_lora import adapter_of
from prefopt_dist.setup.prepare_data import tokenised_train_folder
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


def test_a_whole_copy_that_does_not_fit_is_refused_whatever_the_number_of_ranks() -> None:
    """A 70B's bfloat16 weights are 131 GiB on each GPU of an h200, of which 118 GiB may be used."""
    asked = GenerationSettings(batch_tokens=32_768, prompt_tokens=768, new_tokens=256, n=8, uses_top_p=False)
    message = refused(needs_of("70B", generation=asked), h200(8))
    assert message.startswith("plan: generation needs about 1")
    assert "take a smaller model" in message
    assert message.endswith("If the run only trains, on pairs that exist already, set generate.rewards=[].")
    assert find_fit(needs_of("70B"), h200(8)).checkpointed is not None
    assert "generate.rewards" not in refused(needs_of("70B", generation=asked), h200(1)), "training does not fit either"
    fits = needs_of("8B", generation=asked)
    assert find_fit(fits, h200(1)).checkpointed is not None
    message = refused(needs_of("8B", generation=replace(asked, batch_tokens=2_000_000)), h200(1))
    most = int(message.split("lower generate.batch_tokens to at most ")[1].split(";")[0].rstrip("."))
    assert "recomputed" not in message
    for tokens, fitting in ((most, True), (most + 1, False)):
        again = needs_of("8B", generation=replace(asked, batch_tokens=tokens))
        assert (find_fit(again, h200(1)).checkpointed is not None) == fitting


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


def test_disk_by_hand() -> None:
    sizes = needs_of("8B").sizes
    found = disk_needed(sizes, 2, 2, 1000)
    n = sizes.parameters
    assert (found.checkpoint, found.checkpoints, found.conversion) == (12 * n, 36 * n, 12 * n)
    assert (found.export, found.store) == (2 * n, 40_000)


def test_an_export_by_hand() -> None:
    """Checksums of 12 bytes a parameter and master weights of 4, over the nodes; every node loads the folder back."""
    sizes = needs_of("70B").sizes
    n, disk = sizes.parameters, disk_needed(sizes, 2, 2, None)
    found = export_plan(sizes, disk, h200(8), export_item=2, part=5_000_000_000, merged=False)
    assert (found.read, found.written, found.host, found.shared) == (16 * n + 8 * 2 * n, 2 * n, 5_000_000_000, True)
    assert found.seconds == pytest.approx((18 / 8 + 2) * n / 1e9)
    assert export_plan(sizes, disk, h200(1), export_item=2, part=1, merged=False).host == 2 * sizes.largest_module
    needs = with_adapters("8B", r=16)
    whole_and_file = 4 * needs.sizes.parameters + 2 * needs.sizes.largest_module
    for merged, host in ((False, 2 * needs.sizes.trained), (True, whole_and_file)):
        disk = disk_needed(needs.sizes, 2, 2, None, merged=merged)
        found = export_plan(needs.sizes, disk, h200(1), export_item=2, part=1, merged=merged)
        assert (found.host, found.shared) == (host, False)


def test_the_host_memory_of_an_export_with_experts_and_of_one_rank() -> None:
    """save_pretrained copies experts; a rank alone loads the folder back whole, also adapters with their base."""
    model = MixtralConfig(num_hidden_layers=2, hidden_size=512, intermediate_size=1024, vocab_size=64)
    sizes = model_sizes(model, torch.bfloat16, 1)
    machines = h200(1), replace(h200(1), ranks_a_node=1)
    hosts = [
        export_plan(s, disk_needed(s, 2, 2, None), machine, export_item=2, part=10, merged=False).host
        for s in (sizes, replace(sizes, experts=False), with_adapters("8B", r=16).sizes)
        for machine in machines
    ]
    assert hosts[0] == 2 * hosts[2] > 0
    assert hosts[3] == 2 * sizes.parameters
    assert hosts[5] == 2 * with_adapters("8B", r=16).sizes.parameters > hosts[4]


def with_adapters(name: str, **options: Any) -> Needs:
    adapter = adapter_of(Lora(**options), LLAMAS[name], "some/model")
    zero = ZeroSettings.of(with_model_buckets(POLICY, LLAMAS[name], adapter), 2)
    sizes = model_sizes(LLAMAS[name], torch.bfloat16, zero.persistence, adapter)
    return replace(needs_of(name), sizes=sizes, policy=zero)


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


def test_adapters_let_a_70b_fit_on_8_gpus() -> None:
    """Which training all of its weights does not: see below."""
    assert find_fit(needs_of("70B"), h200(1)).checkpointed is None
    assert find_fit(with_adapters("70B"), h200(1)).checkpointed is not None


@pytest.mark.parametrize(
    ("name", "nodes", "parameters", "states", "worst", "checkpointed"),
    [
        ("8B", 1, 8_030_261_248, 16.8, 76.2, 0),
        ("8B", 8, 8_030_261_248, 2.1, 61.5, 0),
        ("70B", 8, 70_553_706_496, 18.5, 115.4, 58),
    ],
)
def test_large_models_on_h200(
    name: str, nodes: int, parameters: int, states: float, worst: float, checkpointed: int
) -> None:
    """18 bytes a parameter over the ranks: bfloat16 weights, float32 gradients, master weights and two moments."""
    needs, machine = needs_of(name), h200(nodes)
    assert needs.sizes.parameters == parameters
    found = find_fit(needs, machine)
    held = sum(p.bytes for p in memory.training_states(needs.sizes, needs.policy, Placement(machine.ranks, True)))
    assert held == pytest.approx(18 * parameters / machine.ranks, rel=0.01)
    assert held / GIB == pytest.approx(states, abs=0.1)
    assert found.device / GIB == pytest.approx(worst, abs=1.0)
    assert found.checkpointed is not None
    assert abs(found.checkpointed - checkpointed) <= 1


def refused(needs: Needs, machine: Machine) -> str:
    with pytest.raises(UserError) as e:
        check_fit(needs, machine, fits_with_offloading(needs, machine))
    return str(e.value)


def test_70b_on_8_gpus_is_refused_with_what_would_do() -> None:
    message = refused(needs_of("70B"), h200(1))
    assert message.startswith("plan: training: backward needs about 181 GiB on each rank of 1 node of 8 GPUs (h200)")
    assert "118 GiB of 131 GiB may be used" in message
    assert "set offload_optimizer (device cpu) in deepspeed.policy" in message
    assert "use at least 16 such GPUs (plan.nodes=2)" in message
    assert "micro_batch_tokens" not in message, "the states alone do not fit"
    assert find_fit(needs_of("70B"), h200(2)).checkpointed is not None


def test_a_micro_batch_that_is_too_large_is_refused_with_one_that_fits() -> None:
    needs = needs_of("8B").with_tokens(600_000)
    message = refused(needs, h200(1))
    most = int(message.split("from 600000 to at most ")[1].split(";")[0].rstrip("."))
    assert find_fit(needs.with_tokens(most), h200(1)).checkpointed is not None
    assert find_fit(needs.with_tokens(most + 1), h200(1)).checkpointed is None


def test_a_first_pass_that_is_too_large_is_told_from_training() -> None:
    message = refused(needs_of("8B", reference_tokens=2_000_000, reference_follows=False), h200(1))
    assert message.startswith("plan: first pass needs")
    assert "lower reference.micro_batch_tokens from 2000000 to at most" in message
    assert "lower train.micro_batch_tokens" not in message


def test_checkpointing_none_is_refused_where_auto_would_do() -> None:
    assert "set model.checkpointing=auto" in refused(needs_of("8B", tokens=30_000, checkpointing="none"), h200(1))


def test_answers_of_an_8b_and_a_70b() -> None:
    """8 GPUs answer 8 shards at once, twice 256 tokens of 32 layers; a 70B has no room beside its training.

    The time is the host's, 1 ms a layer, since reading 16 GB takes 3.3 ms.
    """
    asked = GenerationSettings(batch_tokens=8 * 2048, prompt_tokens=1792, new_tokens=256, n=1, uses_top_p=False)
    needs = needs_of("8B")
    found = plan_answers(needs.sizes, needs.policy, h200(1), asked, 64)
    assert found.fits
    whole = 2 * needs.sizes.parameters
    states = (
        whole // 8 + needs.policy.gradient_dtype_bytes * needs.sizes.parameters // 8 + 12 * needs.sizes.parameters // 8
    )
    keys = 32 * 2 * 2 * 8 * 128 * 8 * 2048
    libraries = sum(part.bytes for part in memory.libraries(Placement(8, True), needs.policy))
    assert (
        0 < found.policy.device - (libraries + whole + states + keys) < 4 * GIB
    )  # prompts in one layer, and the choice
    product = 2 * needs.sizes.parameters * 8 / (0.4 * 989e12)
    scored = 4 * 2 * needs.sizes.parameters * 64 * 2048 / (8 * 0.4 * 989e12)
    assert found.seconds == pytest.approx(2 * (1792 * product + 256 * 0.032) + scored)
    assert "64 prompts" in found.text(3600.0)
    assert "0.6% of the job" in found.text(3600.0)
    twice = plan_answers(needs.sizes, needs.policy, h200(1), asked, 65)
    assert twice.seconds is not None
    assert twice.seconds > 1.8 * found.seconds  # what is scored grows by a 64th

    large = needs_of("70B")
    found = plan_answers(large.sizes, large.policy, h200(2), asked, 64)
    assert not found.fits
    assert "under ZeRO-3" in found.text(None)
    assert found.seconds is not None
    assert found.seconds > 2 * 256 * 2 * large.sizes.parameters / 50e9  # 2.8 s a token


def test_the_network_that_a_run_needs() -> None:
    """An 8B on 16 GPUs, 24 micro-batches of 8192 tokens: two in turn on each, of 1.5 s. 2 + 2 + 4 bytes a parameter."""
    needs = needs_of("8B")
    asked = {"ranks": 16, "ranks_a_node": 8, "budget": 8192, "step_tokens": 24 * 8192.0, "step_seconds": 3.0}
    found = network(needs.sizes, needs.policy, **asked)
    assert (found.bytes, found.seconds) == (8 * needs.sizes.parameters, 1.5)
    assert (found.sent, found.leaving) == (0, 0), "each rank has whole rows"
    assert found.needed == pytest.approx(15 / 16 * 8 * 8_030_261_248 / 1.5 / 1e9)
    in_bfloat16 = replace(needs.policy, reduced_dtype_bytes=2)
    assert network(needs.sizes, in_bfloat16, **asked).bytes == 3 * 2 * needs.sizes.parameters
    within_nodes = replace(in_bfloat16, secondary=8)
    assert network(needs.sizes, within_nodes, **asked).bytes == 2 * 2 * needs.sizes.parameters
    adapters = with_adapters("8B", r=16)
    moved = network(adapters.sizes, adapters.policy, **asked).bytes
    assert moved == 4 * adapters.sizes.parameters + 4 * adapters.sizes.trained
    few = network(needs.sizes, needs.policy, **asked | {"step_tokens": 10.0})
    assert few.seconds == 3.0, "a micro-batch at least, however small"


def test_machines() -> None:
    assert planned_machine(Plan(gpu="a100-40", nodes=2)).ranks == 16
    assert planned_machine(Plan(gpu="l40s", gpus_per_node=4)).memory == 48e9
    here = planned_machine(Plan(gpu="cpu"))
    assert (here.ranks, here.is_gpu) == (2, False)
    assert here.peak is not None
    assert here.peak > 1e8
    assert known_gpu("NVIDIA H200", 150 * 10**9) == "h200"
    assert known_gpu("NVIDIA A100-SXM4-40GB", 42 * 10**9) in GPUS
    assert known_gpu("Unheard of", 10**9) is None
    assert [known_gpu(f"NVIDIA H100 {kind}", 85 * 10**9) for kind in ("80GB HBM3", "PCIe", "NVL")] == [
        "h100", "h100-pcie", "h100-nvl"
    ]  # fmt: skip
    assert BANDWIDTHS.keys() == GPUS.keys()


@pytest.fixture
def world(tmp_path: Path) -> Path:
    worlds.write_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()  # the plan needs none
    worlds.write_pairs(tmp_path / "pairs.jsonl", 40)
    worlds.write_run(tmp_path / "run.yaml", tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "runs" / "run")
    return tmp_path


def planned_by(world: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, str, dict[str, Any]]:
    """Status, all that was said, and the JSON."""
    file = world / "plan.json"
    status = main(["plan", str(world / "run.yaml"), f"plan.file={file}", "plan.gpu=h100", *overrides])
    said = capsys.readouterr()
    return status, said.out + said.err, json.loads(file.read_text()) if file.exists() else {}


def test_copies_of_a_store_are_in_the_plan(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the tokenised rows, which are those of the local file."""
    status, said, local = planned_by(world, capsys)
    assert status == 0, said
    url = "memory://bucket/pairs.jsonl"
    (pairs,) = (source.path for source in load_config(world / "run.yaml", []).data.train)
    fsspec.filesystem("memory").pipe("/bucket/pairs.jsonl", Path(pairs).read_bytes())
    status, said, plan = planned_by(world, capsys, f"data.train={url}")
    assert status == 0, said
    assert plan["disk_bytes"]["data"] - local["disk_bytes"]["data"] == Path(pairs).stat().st_size


def test_the_command(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said, plan = planned_by(world, capsys)
    assert status == 0, said
    assert "8 GPUs (h100)" in said
    assert plan["work"]["steps"] == 4
    assert plan["work"]["known"]
    assert plan["disk_bytes"]["store"] == 40 * plan["work"]["sequences"]
    columns = [file for file in world.rglob("tokenised/*/*.bin") if file.is_file()]
    assert plan["disk_bytes"]["data"] == sum(file.stat().st_size for file in columns) > 0
    assert "; data in run.cache " in said
    assert plan["memory"][0]["fits"]
    assert plan["seconds"]["total"] > 4 * plan["seconds"]["step"] > 0
    assert not (world / "runs" / "run").exists()
    assert "network: " not in said, "one node"
    assert plan["network"]["bytes_a_micro_batch"] == 3 * 4 * plan["model"]["parameters"], "of float32"
    status, said, on_two = planned_by(world, capsys, "plan.nodes=2")
    assert f"below {on_two['network']['needed_gb_per_second']:.3g} GB/s of all-reduce the ranks wait for it" in said
    status, said, adapted = planned_by(world, capsys, "lora.r=4")
    assert status == 0, said
    assert "of the adapters are trained" in said
    assert "reference.name_or_path: the path " not in said
    status, said, _ = planned_by(world, capsys, f"reference.name_or_path={world / 'model'}")
    assert "reference.name_or_path: the path shared: " in said, "a plainer path of it would be the run's"
    assert adapted["model"]["trained"] == 4864 < plan["model"]["trained"] == plan["model"]["parameters"]
    assert adapted["seconds"]["step"] == pytest.approx(2 / 3 * plan["seconds"]["step"])


def test_answering_prompts_is_planned_where_there_are_rewards(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def phases(*overrides: str) -> dict[str, Any]:
        status, said, plan = planned_by(world, capsys, "generate.max_new_tokens=40", *overrides)
        assert status == 0, said
        assert ("without generating, loading" in said) == bool(overrides)
        return {p["name"]: p for p in plan["memory"][0]["phases"]}

    rewards = "generate.rewards=[{function: my:score}]"
    assert "generation" not in phases()
    found = phases(rewards)["generation"]
    assert found["host_bytes"] > 0
    judged = phases(rewards, f"evaluate.prompts={world / 'pairs.jsonl'}")["generation"]
    assert judged["device_bytes"] > found["device_bytes"], "one answer each leaves room for more prompts"


def test_kto_s_rows_and_its_pass_before_the_step(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pair is two rows, each scored beside its partner's response too."""
    pairs = planned_by(world, capsys)[2]["work"]
    status, said, plan = planned_by(world, capsys, "loss.name=kto", "loss.split_pairs=true")
    assert status == 0, said
    assert (pairs["steps"], plan["work"]["steps"]) == (4, 8)  # 40 pairs, 80 rows, of 11 a step
    assert pairs["sequences"] < plan["work"]["sequences"] <= 160
    work = plan["work"]
    assert work["ahead_flop"] == pytest.approx(work["step_flop"], rel=0.2)  # other responses of the same set
    assert pairs["ahead_flop"] == 0
    world.joinpath("pairs.jsonl").unlink()
    status, said, plan = planned_by(world, capsys, "loss.name=kto", "loss.split_pairs=true")
    assert plan["work"]["ahead_flop"] == plan["work"]["step_flop"] > 0


def test_a_reference_that_moves_costs_a_pass(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first pass and the updates are about what the first pass of a reference that stays is."""
    stays = planned_by(world, capsys)[2]["work"]
    status, said, plan = planned_by(world, capsys, "reference.update_every_steps=1")
    assert status == 0, said
    work = plan["work"]
    assert stays["updates_flop"] == 0 < work["updates_flop"]
    assert work["first_pass_flop"] < 0.6 * stays["first_pass_flop"]
    assert work["first_pass_flop"] + work["updates_flop"] == pytest.approx(stays["first_pass_flop"], rel=0.05)
    sorted_pairs = planned_by(world, capsys, "reference.update_every_steps=1", "loss.name=aot")[2]["work"]
    assert sorted_pairs["updates_flop"] == work["updates_flop"], "its pass is the policy's"
    status, said, _ = planned_by(world, capsys, "reference.update_every_steps=2", "loss.name=orpo")
    assert status == 2
    assert "reference.update_every_steps: got 2, but loss.name=orpo has no reference" in said


def test_data_that_cannot_be_read(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "pairs.jsonl").unlink()
    status, said, plan = planned_by(world, capsys)
    assert status == 0, said
    assert "every row is taken to be as long as data.max_length allows" in said
    assert plan["work"]["steps"] is None
    assert plan["work"]["step_tokens"] == 11 * (128 + 2 * 127)
    assert planned_by(world, capsys, "train.max_steps=7")[2]["work"]["steps"] == 7


def test_a_refusal_ends_with_2(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said, plan = planned_by(world, capsys, "train.micro_batch_tokens=900000000")
    assert status == 2
    assert "error: plan: " in said
    assert "train.micro_batch_tokens from 900000000 to at most" in said
    assert not plan


def test_ranked_rows_are_planned_with_their_prompt_once(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens of a step, all of the data, and the store's sequences, counted here; one letter is one token or less."""
    draw, rows = np.random.RandomState(4), []
    for i in range(12):
        texts = [f"{'abcdefgh'[k]} " * int(draw.randint(3, 9)) + str(i) for k in range(2 + i % 3)]
        rows.append({"prompt": f"say {i} " * 9, "responses": texts, "ranks": list(range(len(texts)))})
    (world / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [f"data.train={world / 'ranked.jsonl'}", "train.global_batch_pairs=12", "loss.name=plackett_luce"]
    status, said, plan = planned_by(world, capsys, *overrides)
    assert status == 0, said
    config = load_config(world / "run.yaml", overrides)
    tokenizer = load_tokenizer(world / "model", "model.tokenizer")
    data = open_rows(tokenised_train_folder(config, tokenizer, 300))
    assert plan["work"]["sequences"] == sum(2 + i % 3 for i in range(12))
    tokens = 0
    for i in range(data.n):
        beginnings = set()
        for k in range(data.responses_held(i)):
            ids = data.response(i, k).tolist()[:-1]
            beginnings |= {tuple(ids[:n]) for n in range(1, len(ids) + 1)} if k == 0 else set()
            tokens += sum(k == 0 or tuple(ids[:n]) not in beginnings for n in range(1, len(ids) + 1))
        tokens += len(data.prompt(i))
    assert plan["work"]["step_tokens"] == tokens
    status, said, _ = planned_by(world, capsys, *overrides[1:], "data.train=elsewhere/rows")
    assert "as data.max_length allows, with two responses" in said


def test_data_that_would_stop_the_job_stops_its_plan(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said, plan = planned_by(world, capsys, "inspect.few_rows=stop")
    assert status == 2
    assert "inspect.few_rows" in said
    assert not plan


def test_no_setting_is_said_twice() -> None:
    needs = needs_of("8B", policy=ZeroSettings.of(POLICY, 2).offloading(True, True))
    needs = replace(needs, reference=needs.reference.offloading(False, True))
    assert [f.name for f in fits_with_offloading(needs, h200(1)) if isinstance(f, Fit)].count("and offload_param") == 0
