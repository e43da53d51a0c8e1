"""`plan`: the disk, the export, the answers, the network and the machines."""

from dataclasses import replace

import pytest
import torch
from planned_models import GIB, h200, needs_of, with_adapters
from transformers import MixtralConfig

from prefopt_dist.config import Plan
from prefopt_dist.planning import memory
from prefopt_dist.planning.export import export_plan
from prefopt_dist.planning.generation_memory import GenerationSettings
from prefopt_dist.planning.machine import BANDWIDTHS, GPUS, known_gpu, planned_machine
from prefopt_dist.planning.network import network
from prefopt_dist.planning.phases import Placement
from prefopt_dist.planning.rollouts import plan_answers
from prefopt_dist.planning.sizes import model_sizes
from prefopt_dist.planning.work import disk_needed


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
