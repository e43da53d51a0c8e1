"""The benchmark's arithmetic, and that the training's layout keeps its ranks busy; its run with TRL is not tested."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from places import REPOSITORY
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks import frontier, imbalance, ours, parity, profile, report
from benchmarks.floor import SHAPES, distinct_tokens, first_pass_flop, forward_flop, step_flop
from benchmarks.pairs import END, FIRST_TOKEN, MIXES, draw_lengths, draw_pairs, padding, usual_padding
from benchmarks.step import STEPS
from benchmarks.world import Task, load_task, save_task, text, write_model
from prefopt_dist.batching.micro_batch import PATHS
from prefopt_dist.batching.packing import pack
from prefopt_dist.config import load_config
from prefopt_dist.config.losses import DPOLoss
from prefopt_dist.data.unit import Unit
from prefopt_dist.demo import parts
from prefopt_dist.demo.world import write_world

TINY = SHAPES["tiny"]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("n", [16, 2000])
def test_lengths_have_the_mix_means(mix: str, n: int) -> None:
    found = np.array(draw_lengths(MIXES[mix], n, seed=3))
    expected = MIXES[mix].prompt.mean, MIXES[mix].response.mean, MIXES[mix].response.mean
    assert found.mean(0) == pytest.approx(expected, rel=0.01)
    assert draw_lengths(MIXES[mix], n, seed=3) == [tuple(pair) for pair in found]
    if MIXES[mix].prompt.sigma and n > 100:
        assert draw_lengths(MIXES[mix], n, seed=4) != [tuple(pair) for pair in found]
        assert np.log(found[:, 0]).std() == pytest.approx(MIXES[mix].prompt.sigma, rel=0.1)
        assert abs(np.corrcoef(found[:, 1], found[:, 2])[0, 1]) < 0.1


@pytest.mark.parametrize("mix", MIXES)
def test_timed_steps_are_padded_as_the_mix(mix: str) -> None:
    """Within 2 %, where the first draw of as many is up to a fifth off; also of another many thousand pairs."""
    task = Task(SHAPES["small"], mix, 8, STEPS[mix], 1, "cpu", 0)
    lengths = [(len(p), len(c), len(r)) for p, c, r in task.drawn()]
    usual = padding(draw_lengths(MIXES[mix], 16_384, seed=7), 8)
    print(f"{mix}: timed {padding(lengths[8:], 8):.3f}, mix {usual:.3f}, {usual_padding(MIXES[mix], 8):.3f}")
    assert padding(lengths[8:], 8) == pytest.approx(usual, rel=0.02)
    assert padding(lengths[:8], 8) == pytest.approx(usual, rel=0.06)  # eight pairs cannot be nearer
    assert np.mean(lengths[8:], axis=0) == pytest.approx(np.mean(draw_lengths(MIXES[mix], 4096), axis=0), rel=0.01)


@pytest.mark.parametrize("path", PATHS)
def test_a_profiled_step_takes_the_path_of_its_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: Any) -> None:
    """A packed row given to a model of padded ones would end with an error, the plain one with other times."""
    task, taken = Task(TINY, "hh-like", 2, 1, 0, "cpu", 0, path=path), []
    for name in ("inspect_folder", "policy_engine", "forward_cost"):
        monkeypatch.setattr(ours, name, lambda *_: SimpleNamespace(config=None))
    monkeypatch.setattr(ours, "score_reference", lambda *_: (torch.zeros(2, 2, dtype=torch.float64), {}))
    monkeypatch.setattr(ours, "step", MagicMock())
    monkeypatch.setattr(ours, "step_batch", lambda *_, path="shared": taken.append(path))
    ours.make_stepper(task, tmp_path, 4096)(0)
    assert taken == [path]


def test_padding_by_hand() -> None:
    assert padding([(3, 2, 4), (1, 1, 1), (5, 5, 5), (2, 2, 2)], 2) == (4 * 7 + 4 * 10) / (7 + 1 + 13 + 4)


def test_pairs_have_their_lengths_and_end() -> None:
    pairs = draw_pairs(MIXES["hh-like"], 20, 50)
    assert [(len(p), len(c), len(r)) for p, c, r in pairs] == draw_lengths(MIXES["hh-like"], 20)
    assert all(c[-1] == r[-1] == END for _, c, r in pairs)
    assert all(FIRST_TOKEN <= token < 50 for p, c, r in pairs for token in [*p, *c[:-1], *r[:-1]])


def test_floor_is_what_torch_counts(tmp_path) -> None:
    """Layers by tokens and head by response tokens, as torch counts the matrix products of these calls."""
    write_model(tmp_path, TINY, "float32", seed=0)
    lm = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    prompt, chosen, rejected = 9, 7, 5
    ids = torch.arange(3, 3 + prompt + chosen + rejected - 2)[None]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden = lm.model(input_ids=ids, use_cache=False).last_hidden_state[0]
        lm.lm_head(hidden[: chosen + rejected])
    counted = sum(n for kind, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(kind))
    without_attention = replace(TINY, heads=0, head_size=0)
    projections = (
        2 * TINY.layers * TINY.hidden * TINY.head_size * 2 * (TINY.heads + TINY.key_value_heads) * ids.shape[1]
    )
    assert counted == forward_flop(without_attention, prompt, chosen, rejected) + projections
    # Every query with each of its keys, twice 2·d operations a head; counted here one by one.
    attended = sum(range(1, prompt + chosen)) + sum(prompt + i for i in range(1, rejected))
    attention = forward_flop(TINY, prompt, chosen, rejected) - counted
    assert attention == 4 * TINY.layers * TINY.attention_width * attended


def test_floor_counts_the_tokens_that_are_packed() -> None:
    pairs = draw_pairs(MIXES["hh-like"], 8, 500)
    units = [
        Unit(i, *[np.array(p, np.int32)], tuple(np.array(r, np.int32) for r in rs)) for i, (p, *rs) in enumerate(pairs)
    ]
    lengths = [(len(p), len(c), len(r)) for p, c, r in pairs]
    batch = pack(units, 2)
    assert batch.tokens <= distinct_tokens(lengths) <= batch.tokens + 8
    assert sum(s.end - s.start for s in batch.segments) == batch.tokens
    assert step_flop(TINY, lengths) == 3 * first_pass_flop(TINY, lengths)


@pytest.mark.parametrize("name", ["small", "small-32k", "small-128k"])
def test_small_shapes_have_the_head_share_of_a_large_model(name: str) -> None:
    assert SHAPES["8b"].head_share == pytest.approx(0.075, abs=0.001)
    assert SHAPES[name].head_share == pytest.approx(SHAPES["8b"].head_share, rel=0.05)
    shape, (p, c, r) = SHAPES[name], (190, 305, 305)
    attention = forward_flop(shape, p, c, r) - forward_flop(replace(shape, layers=0), p, c, r)
    attention -= 2 * shape.backbone * (p + c + r - 2)
    assert 0.01 < attention / forward_flop(shape, p, c, r) < 0.07


def test_words_are_token_ids(tmp_path) -> None:
    write_model(tmp_path, TINY, "float32", seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    (prompt, chosen, _), *_ = draw_pairs(MIXES["hh-like"], 2, TINY.vocabulary)
    assert tokenizer(text(prompt) + " " + text(chosen))["input_ids"] == prompt + chosen


def test_task_survives_its_file(tmp_path) -> None:
    task = Task(TINY, "long", 4, 2, 1, "cpu", 0)
    save_task(tmp_path, task)
    assert load_task(tmp_path) == task
    assert task.n == 12
    assert list(task.rows(2)) == [8, 9, 10, 11]


PEAK = """
import torch
from benchmarks import meter
baseline = meter.start_peak()
held = torch.ones(2**24)
del held
print(meter.peak() - baseline)
"""


def test_peak_memory_is_seen() -> None:
    """In a process of its own: where the system resets no peak, this one may have had a higher one before."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", PEAK], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 48 * 2**20


def result(seconds: float, losses: list[float], first: float | None) -> dict:
    steps = [{"cpu": 99.0, "wall": 99.0}, {"cpu": seconds, "wall": seconds}]
    first_pass = {"cpu": first, "wall": first} if first else None
    return {"losses": losses, "steps": steps, "first_pass": first_pass, "baseline": 0, "peak": 2**20}


def test_summary_compares_steps_and_epochs() -> None:
    task = Task(TINY, "uniform", 4, 1, 1, "cpu", 0)
    results = {"ours": result(2.0, [0.6, 0.5], 2.0), "trl": result(6.0, [0.6, 0.50001], None)}
    assert report.check_losses(results, "float32") == pytest.approx(2e-5)
    found = report.summarise(task, results, rate=1e9)
    # 4 pairs timed in 2 s; 8 pairs scored in 2 s; the warm-up counts nowhere.
    ours, trl = found["rows"]["ours"], found["rows"]["trl"]
    assert ours["pairs_per_second"] == 2
    assert ours["epoch_seconds_per_pair"] == pytest.approx(0.75)
    assert trl["epoch_seconds_per_pair"] == pytest.approx(1.5)
    assert report.ratios(found["rows"], "ours", "step") == "3.00"
    assert report.ratios(found["rows"], "ours", "epoch") == "2.00"
    assert ours["efficiency"] == pytest.approx(step_flop(TINY, [(256, 256, 256)] * 4) / 2 / 1e9)
    found["loss_difference"] = 1e-6
    assert "| 3.00 | 2.00 |" in report.table("uniform", found)


def test_of_several_runs_the_medians_count() -> None:
    runs = [result(seconds, [0.6, 0.5], first) for seconds, first in ((2.0, 5.0), (9.0, 1.0), (3.0, 2.0))]
    assert report.medians(runs) == result(3.0, [0.6, 0.5], 2.0)
    assert report.medians([result(2.0, [0.6], None)])["first_pass"] is None


def test_ranks_divide_the_pairs_and_the_time_on_the_wall_counts() -> None:
    task = Task(TINY, "uniform", 4, 1, 1, "cpu", 0, ranks=2)
    found = result(2.0, [0.6, 0.5], 2.0)
    found["steps"][1]["cpu"] = 1.5  # a rank that waits
    ours = report.summarise(task, {"ours": found}, rate=1e9)["rows"]["ours"]
    assert ours["pairs_per_second"] == 2
    assert ours["efficiency"] == pytest.approx(step_flop(TINY, [(256, 256, 256)] * 4) / 2 / 2e9)


@pytest.mark.parametrize("losses", [[0.6, 0.5002], [0.6], [0.6, math.nan]])
def test_unequal_losses_are_no_comparison(losses: list[float]) -> None:
    with pytest.raises(AssertionError):
        report.check_losses({"ours": result(1, [0.6, 0.5], 1), "trl": result(1, losses, None)}, "float32")


@pytest.mark.parametrize("mix", ["ultrafeedback-like", "hh-like", "long"])
@pytest.mark.parametrize(("world", "steps"), [(8, 8), (64, 2)])
def test_ranks_wait_little(mix: str, world: int, steps: int) -> None:
    """Under 2 % with 8 pairs a rank."""
    assert imbalance.lost_time(draw_lengths(MIXES[mix], world * 8 * steps, seed=1), world, 8) < 0.02


def test_parity_finds_what_is_not_equal(capsys: pytest.CaptureFixture[str]) -> None:
    """A loss or a gradient beyond the tolerance, or none at all; a whole run needs TRL and is not tested."""
    value = parity.Value(0.5, {"w": torch.tensor([3.0, 4.0]).double()})
    assert not parity.print_line("dpo", "DPO", "loss", value, value)
    for other in (
        parity.Value(0.5001, value.gradient),
        parity.Value(math.nan, value.gradient),
        parity.Value(0.5, {"w": torch.tensor([3.0, 4.1]).double()}),
        parity.Value(0.5, {"w": torch.tensor([-3.0, -4.0]).double()}),
    ):
        assert parity.print_line("dpo", "DPO", "loss", other, value)
    assert capsys.readouterr().out.count("BEYOND") == 4


def test_parity_measures_ours_by_hand(tmp_path) -> None:
    """Where policy and reference are one model: ln 2, and z0 = 0."""
    parity.write_spread_model(tmp_path / "policy", 0)
    shutil.copytree(tmp_path / "policy", tmp_path / "reference")
    ours = parity.Ours(tmp_path)
    rows = draw_pairs(parity.LENGTHS, 4, parity.SHAPE.vocabulary)
    assert ours.pairs({"name": "dpo"}, rows, less_sft=False).loss == pytest.approx(math.log(2), rel=1e-6)
    z0, value = ours.kto({"name": "kto"}, [(p, c, i < 2) for i, (p, c, _) in enumerate(rows)])
    assert (z0, value.loss) == (0, 0.5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aten::mm", "matrix products"),
        ("aten::addmm_", "matrix products"),
        ("aten::baddbmm", "matrix products"),
        ("aten::transpose", "autograd and engine"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::copy_", "copies"),
        ("aten::_index_put_impl_", "copies"),
        ("aten::_fused_adamw_", "optimizer"),
        ("c10d::allreduce_", "collectives"),
        ("aten::silu_backward", "elementwise, sums"),
        ("PostBackwardFunctionModuleBackward", "autograd and engine"),
    ],
)
def test_operations_have_their_kind(name: str, expected: str) -> None:
    assert profile.operator_kind(name) == expected


def test_time_without_products_is_told_by_what_calls() -> None:
    def event(name: str, microseconds: int, caller: Any = None) -> Any:
        return SimpleNamespace(name=name, self_cpu_time_total=microseconds, cpu_parent=caller)

    layer = event("CompiledFunction", 1)
    graph = event("## Call CompiledFxGraph f1", 5, layer)
    attention = event("prefopt::row_attention", 2, graph)
    inside = [event("aten::baddbmm", 40, attention), event("aten::_softmax", 8, attention)]
    events = [layer, graph, event("aten::mm", 40, graph), attention, *inside, event("aten::pow", 4)]
    _, *shares = profile.without_products(events)
    assert [" ".join(line.split()) for line in shares] == [
        "attention 10.0%",
        "compiled layers 6.0%",
        "layers, embedding, last norm 4.0%",
    ]


def frontier_of(kls: dict[float, float], scored: tuple[int, ...]) -> dict[str, Any]:
    def around(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}

    points = [
        {"beta": beta, "kl": around(kl), "reward": around(0.8), "win_rate": around(0.6), "sequences_scored": n}
        for (beta, kl), n in zip(kls.items(), scored, strict=True)
    ]
    return {
        "start": {"reward": around(0.7)},
        "points": points,
        "pairs": 9,
        "epochs": 4,
        "prompts": 400,
        "sft_per_beta": 20,
    }


def test_the_frontier_fails_where_kl_does_not_rise_or_the_first_pass_is_run_again(tmp_path: Path) -> None:
    found = frontier_of({0.05: 9.0, 0.1: 5.0, 1.0: 0.5}, (1600, 0, 0))
    assert frontier.faults(found) == []
    assert "| 0.05 | 9.000 (8.900 to 9.100) | 0.800 (0.700 to 0.900) |" in frontier.table(found)
    frontier.plot(found, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    (one,) = frontier.faults(frontier_of({0.05: 5.0, 0.1: 5.0, 1.0: 0.5}, (1600, 0, 0)))
    assert one == "KL does not rise from beta 0.1 (5.000 (4.900 to 5.100)) to 0.05 (5.000 (4.900 to 5.100))"
    (one,) = frontier.faults(frontier_of({0.05: 9.0, 0.1: 5.0, 1.0: 0.5}, (1600, 7, 0)))
    assert one == "beta 0.1 scored 7 sequences again"


def test_the_frontier_varies_beta_alone() -> None:
    assert frontier.BETAS == (0.05, 0.1, 0.5, 1.0, 5.0)
    for beta in frontier.BETAS:
        assert load_config(frontier.RECIPE, frontier.loss_of(beta, 0.0)).loss == DPOLoss(beta=beta)
        assert load_config(frontier.RECIPE, frontier.loss_of(beta, 20.0)).loss == DPOLoss(
            beta=beta, sft_weight=20 * beta
        )


def test_the_frontier_is_of_prompts_in_no_file_of_the_demo(tmp_path: Path) -> None:
    sizes = {"demonstrations": parts.DEMONSTRATIONS, "prompts": parts.PROMPTS, "held_out": parts.HELD_OUT}
    write_world(tmp_path, **sizes, unseen=parts.UNSEEN)
    used = {json.loads(line)["prompt"] for file in tmp_path.glob("*.jsonl") for line in file.read_text().splitlines()}
    assert len(used) == sum(sizes.values()) + parts.UNSEEN
    frontier.write_fresh(tmp_path / "new" / "fresh.jsonl")
    fresh = {json.loads(line)["prompt"] for line in (tmp_path / "new" / "fresh.jsonl").read_text().splitlines()}
    assert len(fresh) == frontier.FRESH
    assert not fresh & used
