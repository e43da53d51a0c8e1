"""The kernels of a step beside closed forms and beside what torch dispatches, and the times made of them.

Legend: T tokens, D hidden size, A width of all query heads, K of all key heads, M of the MLP, V vocabulary, N states
that reach the head; float32 numbers of 4 bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, tiny_config
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig

from prefopt_dist.batching.micro_batch import Segment
from prefopt_dist.model import attention_tiling, block_attention, head
from prefopt_dist.model.attention import LayerNeeds
from prefopt_dist.model.cost import forward_cost
from prefopt_dist.model.meta_device import AttentionCall
from prefopt_dist.planning.machine import Machine
from prefopt_dist.planning.roofline import attention, trace
from prefopt_dist.planning.roofline.ends import HEAD, head_kernels, update_kernels, zero_kernels
from prefopt_dist.planning.roofline.estimate import estimate
from prefopt_dist.planning.roofline.fusion import fused
from prefopt_dist.planning.roofline.kernels import Device, Kernel, Moved
from prefopt_dist.planning.roofline.recorder import Recorder
from prefopt_dist.planning.roofline.rows import PlannedRow
from prefopt_dist.planning.roofline.step import RowFacts, step_kernels
from prefopt_dist.planning.roofline.table import Roofline
from prefopt_dist.planning.sizes import model_sizes
from prefopt_dist.planning.zero_settings import ZeroSettings

T, D, A, K, M, V, N = 640, 64, 128, 32, 160, 512, 200
SIZES: dict[str, Any] = {
    "hidden_size": D,
    "intermediate_size": M,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": V,
}
LLAMA = LlamaConfig(**SIZES)
SEGMENTS = (Segment(0, 0, 0, 200), Segment(0, 150, 200, 320), Segment(320, 320, 320, T))
ROW = RowFacts(T, N, SEGMENTS)
H100 = Device(989e12, 3.35e12)
ZERO = ZeroSettings.of({"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}, 2)


@cache
def traced() -> list[Kernel]:
    """The kernels of LLAMA in float32 without its attention."""
    return trace.trace_backbone(LLAMA, torch.float32, T, N, lambda *_: [])


def of(kernels: Sequence[Kernel], part: str, step: str, layer: int | None = 1) -> list[Kernel]:
    return [k for k in kernels if (k.part, k.step, k.layer) == (part, step, layer)]


def moved(kernels: Sequence[Kernel]) -> float:
    return sum(k.times * k.bytes for k in kernels)


def test_the_products_of_a_layer_by_hand() -> None:
    """2 operations for each parameter and token forward, and twice as many backward."""
    in_attention, in_mlp = 2 * T * (2 * D * A + 2 * D * K), 2 * T * 3 * D * M
    for part, forward in ((trace.ATTENTION_PRODUCTS, in_attention), (trace.MLP_PRODUCTS, in_mlp)):
        assert sum(k.flop for k in of(traced(), part, "forward")) == forward
        assert sum(k.flop for k in of(traced(), part, "backward")) == 2 * forward
    (down,) = [k for k in of(traced(), trace.MLP_PRODUCTS, "forward") if k.bytes == 4 * (T * M + D * M + T * D)][2:]
    assert down.flop == 2 * T * D * M


def test_the_passes_of_a_norm_by_hand() -> None:
    """Eager: the square (read, write), its mean (read), two factors (read, write). Fused: read and write."""
    x, statistics = 4 * T * D, 4 * T
    eager = of(traced(), trace.NORMS, "forward")
    # mean writes it, + ε and the root change it, the first factor reads it; the second one is the weight.
    assert moved(eager) == 2 * (7 * x + 6 * statistics + 4 * D)
    first, _ = of(fused(traced()), trace.NORMS, "forward")
    assert first.bytes == 2 * x + statistics + 4 * D, "the first norm of a layer has no residual before it"


def test_the_gated_activation_by_hand() -> None:
    """Eager: silu 2 passes, the product 3, backward 9. Fused: read gate and up, write; backward 3 and 2."""
    wide = 4 * T * M
    assert moved(of(traced(), trace.ACTIVATION, "forward")) == 5 * wide
    assert moved(of(traced(), trace.ACTIVATION, "backward")) == 9 * wide
    assert moved(of(fused(traced()), trace.ACTIVATION, "forward")) == 3 * wide
    assert moved(of(fused(traced()), trace.ACTIVATION, "backward")) == 5 * wide


def test_a_residual_is_read_and_written_with_the_norm_behind_it() -> None:
    """Fused: it reads x and the attention's product and writes their sum and its norm."""
    x = 4 * T * D
    assert moved(of(traced(), trace.RESIDUALS, "forward")) == 2 * 3 * x
    joined = [k for k in of(fused(traced()), trace.NORMS, "forward") if k.bytes > 3 * x]
    assert [k.bytes for k in joined] == [4 * x + 4 * T + 4 * D], "with 1 / root for the backward pass"


def test_embedding_and_selected_states() -> None:
    x, states = 4 * T * D, 4 * N * D
    (embedding,) = of(traced(), trace.EMBEDDING, "forward", None)
    assert embedding.bytes == 2 * x + 8 * T, "rows that are read, not the table"
    (gradient,) = of(traced(), trace.EMBEDDING, "backward", None)
    assert gradient.bytes == x + 8 * T + 2 * x + 4 * V * D, "rows added to zeros of the table's size"
    (selected,) = of(traced(), trace.STATES, "forward", None)
    assert selected.bytes == 2 * states + 8 * N


def test_no_kernel_is_without_a_part() -> None:
    assert not [k for k in traced() if k.part == trace.OTHER]
    assert {k.layer for k in traced()} == {None, 0, 1, 2}


def test_what_is_fused_is_less_and_computes_the_same() -> None:
    joined = fused(traced())
    assert moved(joined) < 0.8 * moved(traced())
    assert sum(k.flop for k in joined) == sum(k.flop for k in traced())
    assert [k for k in joined if not k.fusible] == [k for k in traced() if not k.fusible]
    outside = [k for k in traced() if k.layer is None]
    assert [k for k in joined if k.layer is None] == outside, "only layers are compiled"


def test_a_broadcast_tensor_is_read_once_and_a_change_in_place_is_read_and_written() -> None:
    x, row = torch.ones(8, 4), torch.ones(4)
    with Recorder() as recorder:
        x.mul_(row.expand(8, 4))
        x.view(4, 8).t()
        torch.empty_like(x).copy_(x)
        x.zero_()
    assert [(k.name, k.bytes, k.new_bytes) for k in recorder.kernels] == [
        ("mul_", 2 * 4 * 32 + 4 * 4, 0),
        ("copy_", 2 * 4 * 32, 4 * 32),
        ("zero_", 4 * 32, 4 * 32),
    ]


def test_the_pairs_that_are_attended() -> None:
    def plain(s: Segment, window: int | None) -> int:
        queries, keys = s.end - s.start, s.prefix_end - s.prefix_start + s.end - s.start
        last = range(keys - queries, keys)
        return sum(1 for i in last for j in range(keys) if j <= i and (window is None or j > i - window))

    for window in (None, 7, 150, 10_000):
        assert attention.attended(SEGMENTS, window) == sum(plain(s, window) for s in SEGMENTS)


def call(**needs: Any) -> AttentionCall:
    return AttentionCall(replace(LayerNeeds(16, 16, None, None, sinks=False), **needs), heads=8, key_heads=2)


def test_flash_attention_by_hand() -> None:
    """In bfloat16: 4·A operations a pair, 10·A backward. Keys and values are gathered once for each response."""
    pairs, keys = attention.attended(SEGMENTS, None), T + 150

    def kernels(step: Any) -> dict[str, Kernel]:
        return {k.name: k for k in attention.attention_kernels(call(), step, SEGMENTS, 2, flash=True, on_gpu=True)}

    forward, backward = kernels("forward"), kernels("backward")
    assert forward["flash"].flop == 4 * A * pairs
    assert backward["flash_backward"].flop == 10 * A * pairs
    assert forward["flash"].bytes == 2 * (2 * T * A + 2 * keys * K) + 4 * T * 8
    assert forward["index"].bytes == 2 * 2 * 2 * keys * K
    alone = attention.attention_kernels(call(), "forward", (Segment(0, 0, 0, T),), 2, flash=True, on_gpu=True)
    assert [k.name for k in alone] == ["flash"], "nothing is gathered without a shared prompt"


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_attention_beside_what_runs(dtype: torch.dtype, cap: float | None) -> None:
    """On the CPU, operation by operation."""
    with Recorder() as recorder:
        q, k, v = (torch.randn(1, heads, T, 16, dtype=dtype).requires_grad_() for heads in (8, 2, 2))
        recorder.kernels.clear()
        out = block_attention.block_attention(q, k, v, SEGMENTS, 0.25, None, cap)
        forward, gradient = len(recorder.kernels), torch.ones_like(out)
        recorder.step = "backward"
        out.backward(gradient)
    steps = {"forward": recorder.kernels[:forward], "backward": recorder.kernels[forward:]}
    for step, ran in steps.items():
        formula = attention.attention_kernels(
            call(cap=cap),
            step,
            SEGMENTS,
            dtype.itemsize,
            flash=False,
            on_gpu=False,  # type: ignore[arg-type]
        )
        products = ("bmm", "baddbmm")
        computed = [sum(k.times * k.flop for k in of if k.name in products) for of in (formula, ran)]
        assert computed[0] == computed[1]
        # On a CPU the operands of the scores' products are made float32 first, and rows are laid out by the head.
        assert moved(formula) == pytest.approx(moved(ran), rel=0.1 if dtype == torch.float32 else 0.35)


@pytest.mark.parametrize("window", [None, 100])
def test_the_mask_of_blocks_beside_what_runs(window: int | None) -> None:
    """Only keys that a query of the block may not see are masked, by an addition to the scores."""
    with Recorder() as recorder, torch.no_grad():
        q, k, v = (torch.randn(1, heads, T, 16) for heads in (8, 2, 2))
        recorder.kernels.clear()
        block_attention.block_attention(q, k, v, SEGMENTS, 0.25, window, None)
    found = attention.attention_kernels(call(window=window), "forward", SEGMENTS, 4, flash=False, on_gpu=False)
    names = ["gt", "where", "add_"] + ([] if window is None else ["sub", "le", "bitwise_or_"])
    for name in names:
        counted, ran = (moved([k for k in of if k.name == name]) for of in (found, recorder.kernels))
        assert counted == pytest.approx(ran, rel=0.01), name
    assert "masked_fill_" not in {k.name for k in recorder.kernels}


def test_the_blocks_of_a_long_row_are_counted_together() -> None:
    """On a GPU, of a call with sinks; else a long row's plan would take minutes. The sums are those of all blocks."""
    long = (Segment(0, 0, 0, 30_000), Segment(0, 16_000, 30_000, 44_000))
    sinks = call(sinks=True)
    sizes = attention_tiling.BlockBytes.of_heads(sinks.heads, sinks.key_numbers)
    size = attention_tiling.GPU_BLOCKS
    blocks = attention_tiling.grouped(attention_tiling.tiles(long, None, sizes, size), sizes, size)
    for step in ("forward", "backward"):
        found = attention.attention_kernels(sinks, step, long, 2, flash=False, on_gpu=True)  # type: ignore[arg-type]
        assert len(found) < 1_000 < 10 * len(blocks)
        flop = sum(2.0 * len(b) * 8 * max(t.queries for t in b) * max(t.keys for t in b) * 16 for b in blocks)
        products = sum(k.times * k.flop for k in found if k.name == "bmm")
        assert products == pytest.approx(flop * (2 if step == "forward" else 5))


@pytest.mark.parametrize("cap", [None, 30.0])
def test_the_head_beside_what_runs(cap: float | None) -> None:
    """On the CPU in float32, one block of logits, and with a bound that makes several."""
    transform = head.FinalTransform(cap=cap)

    def loss(first: int, end: int, logps: torch.Tensor) -> torch.Tensor:
        return logps.double().sum()

    with Recorder() as recorder:
        module = torch.nn.Linear(D, V, bias=False)
        head.attach_logp_head(module, transform)
        states = torch.randn(N, D, requires_grad=True)
        target = torch.zeros(N, 1, dtype=torch.int64)
        recorder.kernels.clear()
        value, _ = module(states, target, range(10, N + 1, 10), loss)
        recorder.step = "backward"
        value.backward()
    formula = head_kernels(N, V, D, 4, on_gpu=False, transform=transform)
    assert sum(k.flop for k in formula if k.name in ("mm", "addmm_")) == 3 * 2 * N * V * D
    assert sum(k.flop for k in recorder.kernels if not k.fusible) == 3 * 2 * N * V * D
    assert moved(formula) == pytest.approx(moved(recorder.kernels), rel=0.05)


def test_the_blocks_of_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one reads and writes the weight's float32 gradient once more, and reads the weight twice."""
    one = moved(head_kernels(N, V, D, 4, on_gpu=False))
    monkeypatch.setattr("prefopt_dist.planning.roofline.ends.MAX_LOGITS_PER_BLOCK", V * N // 4)
    assert moved(head_kernels(N, V, D, 4, on_gpu=False)) == one + 3 * (2 + 2) * 4 * V * D
    frozen = head_kernels(N, V, D, 2, on_gpu=True, trained=False)
    assert sum(k.flop for k in frozen if k.name in ("mm", "addmm_")) == 2 * 2 * N * V * D


def test_transfers_and_the_update_by_hand() -> None:
    sizes = model_sizes(LLAMA, torch.bfloat16, 0)
    parameters = sizes.parameters
    gathers = [k for k in zero_kernels(sizes, ZERO, 8, on_gpu=True) if k.name == "gather"]
    assert [k.bytes for k in gathers] == [2 * parameters * (1 + 1 / 8)] * 2
    assert not [k for k in zero_kernels(sizes, ZERO, 1, on_gpu=True) if k.name in ("gather", "reduce")]
    (adam,) = [k for k in update_kernels(sizes, ZERO, 8) if k.name == "_fused_adamw_"]
    assert adam.bytes == (4 + 2 * 12) * parameters / 8, "the gradient is read; weight and moments are changed"


def test_the_time_of_a_kernel() -> None:
    """On a GPU the slower of computing and moving; on a CPU both, and what it writes anew it reads first."""
    kernel = Kernel("k", "part", "forward", 600.0, (Moved(0, 100.0),), (Moved(0, 50.0), Moved(1, 50.0)), times=2.0)
    assert Device(100.0, 100.0).seconds(kernel) == 2 * 6.0
    assert Device(1e9, 100.0).seconds(kernel) == 2 * 2.0
    assert Device(1e9, 100.0).is_bound_by_memory(kernel)
    assert not Device(100.0, 100.0).is_bound_by_memory(kernel)
    assert Device(100.0, 100.0, is_cpu=True).seconds(kernel) == 2 * (6.0 + 2.5)
    assert Device(100.0, 100.0, is_cpu=True, call=0.5).seconds(kernel) == 2 * (6.0 + 2.5 + 0.5)


def roofline(config: PreTrainedConfig, again: float = 0.0, dtype: torch.dtype = torch.bfloat16) -> Roofline:
    """Of a row on eight H100."""
    sizes = model_sizes(config, dtype, 0)
    kernels = step_kernels(config, sizes, ZERO, ROW, dtype=dtype, on_gpu=True, ranks=8, again=again)
    least = 3 * 2 * T * (sizes.parameters - 2 * sizes.head)
    return Roofline.of(kernels, max(least, 1.0), again, H100)


@pytest.mark.parametrize("family", ["llama", *FAMILIES])
def test_every_family_has_a_roofline(family: str) -> None:
    """Fused is no slower than eager, and no time is below the floor's, or that of all operations at the peak."""
    found = roofline(LLAMA if family == "llama" else tiny_config(family))
    eager, joined = (sum(p.bytes for p in parts.values()) for parts in (found.eager, found.fused))
    assert joined < eager
    assert found.seconds(found.fused) <= found.seconds(found.eager)
    assert 0 < found.mfu(found.eager) <= found.mfu(found.fused) <= 1
    for parts in (found.eager, found.fused):
        assert found.seconds(parts) >= sum(p.flop for p in parts.values()) / H100.peak
        assert {trace.NORMS, trace.MLP_PRODUCTS, HEAD} <= parts.keys()
    assert trace.RESIDUALS in found.eager
    assert len(found.lines()) == len(found.eager) + 5, "also where a compiler joins all of a part with others"


def test_the_floor_has_no_pairs_beyond_a_window() -> None:
    """So that the bound of the MFU stays below 1 where a row is much longer than the layers' window."""
    config = MistralConfig(**SIZES, sliding_window=64)
    needs: Any = SimpleNamespace(sizes=model_sizes(config, torch.bfloat16, 0), policy=ZERO)
    cost = forward_cost(config)
    pairs = attention.attended(SEGMENTS, None), attention.attended(SEGMENTS, 64)
    of_weights = T * cost.per_token + N * cost.per_scored
    row = PlannedRow(ROW, of_weights + pairs[0] * cost.per_attended, 1.0)
    machine = Machine("h100", 1, 8, 2**36, 989e12, 0.4, True, 3.35e12)
    found = estimate(config, needs, row, machine, torch.bfloat16, 0.0, None)
    assert found.floor_flop == pytest.approx(3 * (of_weights + pairs[1] * cost.per_attended))
    assert pairs[1] < pairs[0] / 2


def test_experts_compute_k_of_them_and_read_all_their_weights() -> None:
    config = tiny_config("glm4_moe")
    kernels = trace.trace_backbone(config, torch.float32, T, N, lambda *_: [])
    products = [k for k in of(kernels, trace.MLP_PRODUCTS, "forward", 1) if k.name == "bmm"]
    experts = 3 * config.hidden_size * config.moe_intermediate_size
    assert sum(k.flop for k in products) == 2 * T * config.num_experts_per_tok * experts
    weights = sum(max(m.bytes for m in k.read) for k in products if k.bytes)
    assert weights >= 4 * config.n_routed_experts * experts


def test_recomputed_layers_run_forward_once_more() -> None:
    none, half, every = (roofline(LLAMA, again) for again in (0.0, 0.5, 1.0))
    for parts in ("eager", "fused"):
        whole, part, without = (getattr(found, parts)[trace.MLP_PRODUCTS] for found in (every, half, none))
        assert whole.by_pass["recomputed"] == pytest.approx(whole.by_pass["forward"])
        assert part.by_pass["recomputed"] == pytest.approx(whole.by_pass["recomputed"] / 2)
        assert "recomputed" not in without.by_pass
        assert whole.flop == pytest.approx(without.flop * 4 / 3)
        assert getattr(every, parts)[HEAD] == getattr(none, parts)[HEAD]


def test_the_table() -> None:
    found = roofline(LLAMA)
    lines = found.lines()
    assert lines[0].startswith(f"roofline: a micro-batch of {T} tokens and 1/1 of the update, at 989 TFLOP/s")
    assert sum(line.startswith("  norms ") for line in lines) == 1
    assert "computed again" not in lines[0]
    assert "50% of the layers computed again" in roofline(LLAMA, 0.5).lines()[0]
    assert len(lines) == len(found.eager) + 5
    assert f"MFU at most {found.mfu(found.eager):.0%} eager and {found.mfu(found.fused):.0%} fused" in lines[-1]
    table = found.as_json()
    assert table["eager"]["seconds"] == pytest.approx(sum(p["seconds"] for p in table["eager"]["parts"].values()))
    assert table["fused"]["parts"][trace.NORMS]["bound"] == "memory"


Planned = Callable[..., tuple[int, str, dict[str, Any]]]


@pytest.fixture
def planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Planned:
    """Return a function that runs `plan` for eight H100 on a small model's configuration and pairs."""
    import json

    import worlds

    from prefopt_dist.cli import main

    worlds.write_model(tmp_path / "model")
    worlds.write_pairs(tmp_path / "pairs.jsonl", 40)
    worlds.write_run(tmp_path / "run.yaml", tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "runs" / "run")

    def run(*overrides: str) -> tuple[int, str, dict[str, Any]]:
        file = tmp_path / "plan.json"
        status = main(["plan", str(tmp_path / "run.yaml"), f"plan.file={file}", "plan.gpu=h100", *overrides])
        said = capsys.readouterr()
        return status, said.out + said.err, json.loads(file.read_text())

    return run


def test_the_command_shows_it(planned: Planned, tmp_path: Path) -> None:
    status, said, plan = planned()
    assert status == 0, said
    assert "roofline: a micro-batch of " in said
    assert "MFU at most " in said
    found = plan["roofline"]
    assert 0 < found["eager"]["mfu"] <= found["fused"]["mfu"] <= 1
    assert found["recomputed"] == 0
    assert found["tokens"] <= plan["work"]["step_tokens"]
    checkpointed = planned("model.checkpointing=all")[2]["roofline"]
    assert checkpointed["recomputed"] == 1
    assert checkpointed["eager"]["seconds"] > found["eager"]["seconds"]
    assert planned("lora.r=4")[2]["roofline"]["floor_flop"] == pytest.approx(2 / 3 * found["floor_flop"])
    (tmp_path / "pairs.jsonl").unlink()
    assert planned()[2]["roofline"]["tokens"] % (128 + 2 * 127) == 0, "pairs of the longest rows"


def test_where_there_is_no_roofline(planned: Planned) -> None:
    status, said, plan = planned("plan.gpu=cpu")
    assert status == 0, said
    assert (plan["roofline"], "roofline" in said) == (None, False), "the memory of this machine is not described"
    status, said, plan = planned("train.sequence_parallel=2")
    assert status == 0, said
    assert plan["roofline"] is None
    assert "no roofline: ranks that share a row (train.sequence_parallel) exchange tokens inside the layers" in said


def test_predicted_beside_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of `benchmarks.roofline`: shares of all but what the host does by itself."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[3]))
    from collections import Counter

    from benchmarks import roofline as benchmark

    predicted = Counter({"matrix products": 3.0, "copies": 1.0})
    text = benchmark.comparison(predicted, Counter({"matrix products": 7.0, "copies": 3.0, benchmark.HOST: 5.0}))
    lines = {line[:15]: line.split() for line in text.splitlines()[1:]}
    assert lines["matrix products"][-3:] == ["ms", "70.0%", "0.93"]
    assert lines["copies         "][-3:] == ["ms", "30.0%", "1.20"]
    assert "5000.0 ms" in text.splitlines()[-1]
    assert "benchmarks.roofline" in sys.modules


def test_the_benchmark_names_the_gpus_that_it_knows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[3]))
    from benchmarks import roofline as benchmark

    monkeypatch.setattr(sys, "argv", ["roofline", "--gpu", "h300"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "invalid choice: 'h300' (choose from 'h200', 'h100'" in capsys.readouterr().err
