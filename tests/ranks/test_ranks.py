"""Real ranks: everything in rank_cases.py on one process and on two under torchrun."""

import math
from pathlib import Path
from typing import Any

import case_runner
import matrix_cases
import pytest
from rank_checks import EQUALITY, SLOW, check_matrix, check_steps, check_whole_run, found

SHORT = ["dpo_small_blocks", "kto", "ipo", "orpo", "dpo_gemma2", "dpo_phi3", "dpo_stage_2", "lora", "dpo_plain"]
SHORT += ["lora_compiled"]
PATHS = ["dpo_packed"]
BOTH = [
    *EQUALITY,
    *SHORT,
    "pairwise",
    "whole_evaluation",
    "kto_evaluation",
    "row_weights",
    "aot",
    "wpo",
    "other_reference_is_refused",
    "errors_reach_all",
    "packs_alone_and_together",
    "collectives_and_host_reads",
]
BOTH += ["dropped_gradient", "skipped_updates", "too_many_skipped_updates", "spikes_stopped_and_skipped"]
BOTH += ["early_stop", "gradients_in_place"]
TWO_ONLY = ["shards", "save_fails_on_one_rank", "killed_before_pruning", "idle_ranks"]
TWO_ONLY += ["family", "kto_one_micro_batch", "whole_runs"]
TWO_ONLY += ["lora_gemma2", "lora_resume", "lora_from", "reductions_in_float32"]
TWO_ONLY += [*PATHS, "moved_values", "moving_reference", "ranked_values", "ranked_run"]


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2], ids=["1 rank", "2 ranks"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Runs all cases once for each world size."""
    n = request.param
    folder = tmp_path_factory.mktemp(f"world{n}")
    cases = BOTH + (TWO_ONLY if n == 2 else [])
    case_runner.run_cases("rank_cases.py", n, folder, [case for case in cases if n == 1 or case not in SLOW])
    return n, folder


def test_gradients_are_read_in_place_with_the_same_bits(world: tuple[int, Path]) -> None:
    copied, in_place = found(world, "gradients_in_place")["in_place"]
    assert copied
    assert not any(copied)
    assert in_place
    assert all(in_place)
    first, second = found(world, "gradients_in_place")["weights"]
    assert first == second


@pytest.mark.parametrize("case", [*EQUALITY, *SHORT, *PATHS])
def test_steps_equal_float64(world: tuple[int, Path], case: str) -> None:
    """G = 11 over 37 pairs: not divisible by two ranks, and a last partial batch of 4."""
    if case in TWO_ONLY and world[0] == 1:
        pytest.skip("two ranks")
    if case in SLOW and world[0] == 2:
        pytest.skip("test_slow_steps_equal_float64")
    check_steps(found(world, case), case)


def test_every_loss_of_the_family_equals_float64(world: tuple[int, Path]) -> None:
    """One step under many micro-batches and under one: loss, margin, gradient; each with its own metrics."""
    if world[0] == 1:
        pytest.skip("two ranks")
    result = found(world, "family")
    for case, got in result.items():
        assert (got["micro_batches"] > 1) == case.endswith(" 150"), case
        assert got["loss"][0] == pytest.approx(got["loss"][1], rel=1e-5), case
        assert got["margin"][0] == pytest.approx(got["margin"][1], rel=1e-4, abs=1e-6), case
        assert got["gradient"] <= 1e-5, case
    assert result["orpo, 150"]["metrics"].keys() >= {"log_odds_ratio", "sft_loss"}
    mix = result["mix, 150"]["metrics"]
    total = mix["dpo_loss"] + 0.01 * mix["ipo_loss"] + 0.5 * mix["orpo_loss"]
    assert mix["loss"] == pytest.approx(total, rel=1e-12)
    assert mix["orpo_loss"] == pytest.approx(result["orpo, 150"]["metrics"]["loss"], rel=1e-6)


def test_weight_2_is_the_row_twice_and_weight_0_its_absence(world: tuple[int, Path]) -> None:
    """For DPO, for KTO with its reference point, and for a mix; metrics, gradient and evaluation."""
    for name, got in found(world, "row_weights").items():
        assert got["micro_batches"][0] > got["micro_batches"][1], name
        assert got["gradient"] <= 1e-5, name
        for weighted, repeated in (got["metrics"], got["evaluation"]):
            assert weighted.keys() == repeated.keys()
            for key, value in repeated.items():
                assert weighted[key] == pytest.approx(value, rel=1e-5, abs=1e-5), (name, key)


def test_aot_sorts_the_pairs_of_all_ranks(world: tuple[int, Path]) -> None:
    for case, got in found(world, "aot").items():
        assert got["loss"][0] == pytest.approx(got["loss"][1], rel=1e-5), case
        assert got.get("gradient", 0) <= 1e-5, case
        assert (got.get("micro_batches", 1) > 1) == case.endswith(" 150"), case


def test_a_whole_run_of_kto(world: tuple[int, Path]) -> None:
    """With evaluation on pairs and metrics of its own; it resumes to the same bits and rows."""
    if world[0] == 1:
        pytest.skip("two ranks")
    result = found(world, "whole_runs")
    again = result["run-kto-crashed"]
    assert again["starts"] == [0, 3]
    assert again["weights"] == result["run-kto-whole"]["weights"]
    assert again["rows"] == result["run-kto-whole"]["rows"]
    check_whole_run(result["run-kto-whole"]["rows"], "kto/z0", at_start=0.5)  # λ/2


def test_a_whole_run_with_weights_and_margins(world: tuple[int, Path]) -> None:
    """With LD-DPO: where policy and reference are equal, the loss is cDPO's at −½; weight 0 is not evaluated."""
    if world[0] == 1:
        pytest.skip("two ranks")
    rows = found(world, "whole_runs")["run-weighted-whole"]["rows"]
    exact = 0.9 * math.log1p(math.exp(0.5)) + 0.1 * math.log1p(math.exp(-0.5))
    first = next(row for row in rows if row["kind"] == "train")
    assert first["train/loss"] == pytest.approx(exact, rel=1e-5)
    assert first["train/ties"] == 1
    evaluated = [row for row in rows if row["kind"] == "eval"]
    assert {row["eval/rows"] for row in evaluated} == {37 - 13}
    if evaluated[0]["step"] == 0:
        assert evaluated[0]["eval/loss"] == pytest.approx(exact, rel=1e-5)


def test_the_policy_becomes_the_reference(world: tuple[int, Path]) -> None:
    """Its log-probs of the rows that are due, beside float64's; nothing changes where a stop is asked for."""
    if world[0] == 1:
        pytest.skip("two ranks")
    result = found(world, "moved_values")
    assert (result["untouched"], result["others"], result["start"]) == (True, True, True)
    assert result["due"] == 10
    assert result["kept"] == ["step-00000004.npz"]
    assert result["worst"] <= 1e-6 < result["moved"]


def test_ranked_rows_equal_float64(world: tuple[int, Path]) -> None:
    """2 to 5 responses, with ties: loss and gradient of a step, and an evaluation, in one and many micro-batches."""
    if world[0] == 1:
        pytest.skip("two ranks")
    result = found(world, "ranked_values")
    assert set(result.pop("held")) == {2, 3, 4, 5}
    assert result.pop("responses") == 5
    for case, got in result.items():
        assert (got["micro_batches"] > 1) == case.endswith(" 150"), case
        assert got["rows"] == 37, case
        for name in ("loss", "logps", "evaluated"):
            assert got[name][0] == pytest.approx(got[name][1], rel=1e-5), (case, name)
        assert got["gradient"] <= 1e-5, case


def test_families_heads_stages_and_checkpointing(world: tuple[int, Path]) -> None:
    """Pairwise: see matrix_cases.py."""
    check_matrix(found(world, "pairwise"), matrix_cases.pairwise(world[0]))


def test_every_row_once(world: tuple[int, Path]) -> None:
    ids = [i for rows in found(world, "dpo_many_micro_batches")["ids"] for i in rows]
    assert sorted(ids) == list(range(37))


def test_evaluation_is_the_exact_mean(world: tuple[int, Path]) -> None:
    result = found(world, "whole_evaluation")
    for budget, metrics in result["found"].items():
        assert result["units"][budget] == result["n"]
        assert metrics["eval/loss"] == pytest.approx(result["exact"]["loss"], rel=1e-5)
        assert metrics["eval/rewards/accuracies"] == result["exact"]["rewards/accuracies"]
        assert metrics["eval/logps/chosen"] == pytest.approx(result["exact"]["logps/chosen"], rel=1e-6)


EVALUATIONS: list[dict[str, Any]] = []
"""Of the worlds so far."""


def test_an_evaluation_is_the_same_for_any_ranks_and_micro_batches(world: tuple[int, Path]) -> None:
    """Every metric of it, the diagnosis included."""
    EVALUATIONS.extend(found(world, "whole_evaluation")["found"].values())
    first, *others = EVALUATIONS
    assert len(first) > 25
    assert others
    for other in others:
        assert other.keys() == first.keys()
        for name, value in first.items():
            assert other[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name


def test_an_evaluation_of_kto_compares_the_halves_of_a_pair(world: tuple[int, Path]) -> None:
    result = found(world, "kto_evaluation")
    assert result["exact"]["kto/z0"] > 0
    for metrics in result["found"].values():
        for name, exact in result["exact"].items():
            if name != "scale":
                assert metrics[f"eval/{name}"] == pytest.approx(exact, rel=1e-4, abs=1e-5), name


def test_step0_check_refuses_another_reference(world: tuple[int, Path]) -> None:
    result = found(world, "other_reference_is_refused")
    assert set(result["right"]) == {"accepted"}
    assert len(result["wrong"]) == world[0]
    assert all("stored and live log-probs" in said for said in result["wrong"])


def test_errors_reach_all_ranks(world: tuple[int, Path]) -> None:
    n, result = world[0], found(world, "errors_reach_all")
    assert result["rank-zero-user"] == ["AgreedUserError: mine"] * n
    assert result["rank-zero-crash"][0] == "KeyError: 'mine'"
    assert all(said.startswith("OtherRankFailed") for said in result["rank-zero-crash"][1:])
    assert result["all-ranks-user"] == ["AgreedUserError: mine" if n == 1 else "AgreedUserError: rank 1: mine"] * n
    assert result["leaders-user"] == result["rank-zero-user"]
    assert result["leaders-crash"][0] == "KeyError: 'mine'"
    assert all(said.startswith("OtherRankFailed") for said in result["leaders-stopped"])
    assert result["leaders"] == ["UserError: 1 node"] * n
    assert result["all-ranks-crash"][-1] == "KeyError: 'mine'"
    assert all(said.startswith("OtherRankFailed: rank 1") for said in result["all-ranks-crash"][:-1])


def test_a_pair_alone_scores_as_in_a_pack(world: tuple[int, Path]) -> None:
    assert found(world, "packs_alone_and_together")["worst"] <= 1e-6


def test_shards_logits_and_release(world: tuple[int, Path]) -> None:
    if world[0] == 1:
        pytest.skip("two ranks")
    result = found(world, "shards")
    assert result["held"] == pytest.approx(result["whole"] / 2, rel=1e-3)
    assert result["equal"]
    assert not result["module_alive"]
    assert not result["parameter_alive"]


def test_a_failing_write_commits_nothing(world: tuple[int, Path]) -> None:
    if world[0] == 1:
        pytest.skip("two ranks")
    result = found(world, "save_fails_on_one_rank")
    assert len(result["said"]) == 2 * 3
    assert all("rank 1" in said and "No space left" in said for said in result["said"])
    assert result["left"] == ["step-00000001"]
    assert result["kept"] == ["step-00000003", "step-00000004"]
    assert result["found"] == 3
    assert all("all checkpoints are damaged" in said for said in result["none_left"])  # no silent new start
    assert result["aside"] == ["damaged-step-00000003", "damaged-step-00000004"]


def test_a_start_prunes_what_a_kill_left(world: tuple[int, Path]) -> None:
    if world[0] == 1:
        pytest.skip("two ranks")
    assert found(world, "killed_before_pruning")["done"] == [
        [["step-00000002", "step-00000003", "step-00000004"], False],
        [["step-00000003", "step-00000004"], True],
    ]


def test_gradients_are_summed_over_ranks_in_float32(world: tuple[int, Path]) -> None:
    if world[0] == 1:
        pytest.skip("two ranks")
    assert found(world, "reductions_in_float32") == {"shipped": [(1 + 2**-9) / 2], "bf16": [0.5]}


def test_a_dropped_gradient_leaves_nothing(world: tuple[int, Path]) -> None:
    result = found(world, "dropped_gradient")
    for name in ("device", "cpu"):
        norm, why = result[name].pop("spike")
        assert norm is None
        assert "times the median of the last 16" in why
    assert result["device"] == result["cpu"] == {"same": True, "other": False}


def test_an_update_that_is_not_finite_is_skipped(world: tuple[int, Path]) -> None:
    """The weights stay as they were, Adam counts the others only, the rows have no gap and no mean that is poisoned."""
    result = found(world, "skipped_updates")
    first, second, third, fourth = result["weights"]
    assert first != second == third == fourth
    assert result["counts"] == [1.0]  # before the last update
    rows = result["rows"]
    assert [(r["step"], r["train/skipped_steps"]) for r in rows] == [(1, 0), (2, 1), (3, 2), (4, 2)]
    assert [r["pairs_seen"] for r in rows] == [11, 22, 33, 37]
    assert rows[1]["train/grad_norm"] == rows[2]["train/grad_norm"] == "NaN"
    assert math.isfinite(rows[1]["train/loss"])
    assert "train/loss" not in rows[2]
    assert rows[3]["train/loss"] < 0.6931
    assert result["done"]
    assert result["files"] == ["nonfinite-step-00000002.json", "nonfinite-step-00000003.json"]
    record = result["record"]
    assert (record["step"], len(record["pairs"])) == (3, 11)
    assert "the loss is nan" in record["why"]
    assert all("pairs.jsonl:" in pair["place"] for pair in record["pairs"])


def test_too_many_skipped_updates_end_the_run(world: tuple[int, Path]) -> None:
    """What stands in a row is counted over a resume; the run goes on once it is finite again."""
    result = found(world, "too_many_skipped_updates")
    assert len(result["said"]) == world[0]
    for first, second in result["said"]:
        assert first.startswith("step 3: the gradient is not finite")
        assert second.startswith("step 3: the gradient is not finite")
    assert not result["done"]
    assert result["checkpoints"] == ["step-00000001", "step-00000002"]
    assert result["files"] == ["nonfinite-step-00000002.json", "nonfinite-step-00000003.json"]
    assert result["skipped"] == [0, 1, 1, 1]
    assert result["ended"]


def test_a_spike_stops_the_run_or_is_skipped(world: tuple[int, Path]) -> None:
    """On all ranks alike, by the norms of the checkpoint; norm and loss are numbers and stand in the row."""
    result = found(world, "spikes_stopped_and_skipped")
    assert len(result["said"]) == world[0]
    for said in result["said"]:
        for words in ("step 3: the gradient norm ", "no update was made", "pairs.jsonl:", "train.on_spike=skip"):
            assert words in said
    (first, second, third), again = result["weights"]
    assert first != second != third
    assert again == [third, third]
    assert result["counts"] == [2.0]
    rows = result["rows"]
    assert [(r["step"], r["train/skipped_steps"]) for r in rows] == [(1, 0), (2, 0), (3, 1), (4, 2)]
    assert all(math.isfinite(r["train/loss"]) for r in rows)
    assert rows[2]["train/grad_norm"] > 100 * rows[1]["train/grad_norm"]
    assert result["files"] == ["spike-step-00000003.json", "spike-step-00000004.json"]
    assert (result["record"]["step"], len(result["record"]["pairs"])) == (3, 11)
    assert "times the median of the last 2" in result["record"]["why"]


def test_idle_ranks(world: tuple[int, Path]) -> None:
    if world[0] == 1:
        pytest.skip("two ranks")
    for name, loss in (("dpo", math.log(2)), ("kto", 1.3 / 2)):  # row 3 is the rejected half of a pair
        result = found(world, "idle_ranks")[name]
        assert result["pairs"] == 1
        assert result["loss"] == pytest.approx(loss, abs=1e-6)
        assert result["norm"] > 0


def test_one_collective_and_one_host_read_a_step(world: tuple[int, Path]) -> None:
    """Beside the engine's own, and none a micro-batch."""
    result = found(world, "collectives_and_host_reads")
    assert min(result["micro_batches"]) > 1
    for counted in result["steps"]:
        assert counted["collective"] == ["all_reduce"]
        assert counted["read"] == ["tolist"]


def test_adapters_start_at_the_base_and_resume_to_the_bit(world: tuple[int, Path]) -> None:
    if world[0] == 1:
        pytest.skip("two ranks; on one tests/end_to_end/test_lora.py resumes a run")
    result = found(world, "lora_resume")
    assert result["zero"], "B = 0, so the start is the base model"
    assert result["as_whole"], "on any number of ranks the same start"
    assert result["losses"][0] == pytest.approx(math.log(2), rel=1e-6)
    assert result["losses"][2] < result["losses"][0]
    assert result["moved"] == 1
    assert result["step"] == 2
    assert result["equal"]
    assert result["again"] == result["losses"][2]


def test_a_checkpoint_of_adapters_holds_them_alone(world: tuple[int, Path]) -> None:
    """r = 4 beside q, o (32·32), k, v (32·16), gate, up, down (32·96) of two layers; 12 bytes each on disk."""
    trained = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 96))
    if world[0] == 1:
        pytest.skip("two ranks")
    result = found(world, "lora_resume")
    assert result["trained"] == trained
    assert trained <= sum(result["optimized"]) <= 1.05 * trained
    assert result["bytes"] == pytest.approx(12 * sum(result["optimized"]), abs=100), "Adam's counts beside it"
