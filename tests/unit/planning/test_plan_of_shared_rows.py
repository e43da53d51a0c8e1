"""Memory and longest row where several ranks share each packed row."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from planned_models import LLAMAS, h200, needs_of

from prefopt_dist.cli import main
from prefopt_dist.model.cost import activation_memory
from prefopt_dist.planning.fit import find_fit, longest_row
from prefopt_dist.planning.network import most_outside, network
from prefopt_dist.planning.sizes import model_sizes


def test_bytes_of_a_token_by_hand() -> None:
    """Llama 8B: 32 heads of 128 numbers, 8 key-value heads, 2 bytes a number."""
    whole, shared = (activation_memory(LLAMAS["8B"], torch.bfloat16, shared=ranks) for ranks in (1, 8))
    assert shared.per_token_layer == whole.per_token_layer + 2 * 32 * 128  # results for the others' tokens
    assert shared.per_token_exchanged == 3 * 2 * (32 * 128 + 2 * 8 * 128)
    assert shared.per_gathered_key == whole.per_gathered_key
    repeated = activation_memory(LLAMAS["8B"], torch.bfloat16, shared=32)
    keys = 2 * 2 * 8 * 128
    assert repeated.per_token_layer == shared.per_token_layer + 3 * keys  # each key-value head on four ranks
    assert repeated.per_gathered_key == 4 * keys
    assert repeated.per_token_exchanged == 3 * (2 * 32 * 128 + 4 * keys)


def shared_needs(ranks: int, **changes: Any) -> Any:
    needs = needs_of("8B", **changes)
    sizes = model_sizes(LLAMAS["8B"], torch.bfloat16, needs.policy.persistence, shared=ranks)
    return replace(needs, sizes=sizes)


def test_the_group_has_a_communicator_of_its_own() -> None:
    whole, shared = (find_fit(shared_needs(ranks), h200(1)).phases for ranks in (1, 2))
    for one, two in zip(whole, shared, strict=True):
        assert two.parts[0] == one.parts[0]
        assert two.parts[1].bytes == 2 * one.parts[1].bytes, "NCCL's buffers"


def test_the_longest_row_grows_with_the_ranks_that_share_it() -> None:
    """It fits, and a longer one does not; with every layer recomputed, unless none may be."""
    found = {}
    for ranks in (1, 2, 8):
        needs = shared_needs(ranks)
        longest = longest_row(needs, h200(1))
        assert longest is not None
        of_rank = longest // ranks
        for tokens, fits in ((of_rank, True), (of_rank + 1, False)):
            tried = replace(needs, tokens=tokens, reference_tokens=tokens, checkpointing="all")
            assert find_fit(tried, h200(1)).fits == fits
        found[ranks] = longest
    assert 1.7 * found[1] < found[2] < 2 * found[1]
    assert 3.9 * found[2] < found[8] <= 4.1 * found[2]
    none = longest_row(shared_needs(2, checkpointing="none"), h200(1))
    assert none is not None
    assert none < found[2] / 4


def test_the_all_to_alls_by_hand() -> None:
    """Llama 8B: in each of 32 layers 32 heads of 128 numbers go out and come back, and 2 · 8 key-value heads go out.

    Three times where the layers are recomputed: in the forward pass, again in the backward pass, and as gradients.
    """
    token = 32 * 2 * (32 * 128 + 2 * 8 * 128 + 32 * 128)
    repeated = 32 * 2 * (32 * 128 + 2 * 32 * 128 + 32 * 128)
    asked: dict[str, Any] = {"ranks": 64, "ranks_a_node": 8, "budget": 8192, "step_tokens": 100 * 8192.0}
    asked["step_seconds"] = 3.0
    tokens = asked["step_tokens"] / (2 * 64)  # two micro-batches
    alone = network(shared_needs(1).sizes, needs_of("8B").policy, **asked)
    for shared, recomputed, of_token, outside in ((8, 0, token, 0), (8, 1, token, 0), (32, 0.5, repeated, 8 * 24)):
        found = network(shared_needs(shared).sizes, needs_of("8B").policy, **asked, recomputed=recomputed)
        exchanged = (2 + recomputed) * tokens * of_token
        assert found.sent == int(exchanged * (shared - 1) / shared)
        assert found.leaving == int(exchanged * outside / shared)
        assert found.needed == pytest.approx(alone.needed + found.leaving / 1.5 / 1e9)


def test_rows_that_leave_a_node() -> None:
    """Pairs of ranks of a group of which one is on the node and one is not."""
    assert [most_outside(16, 8, shared) for shared in (1, 2, 8)] == [0, 0, 0]
    assert most_outside(16, 8, 16) == 8 * 8
    assert most_outside(16, 1, 2) == 1
    # Ranks 6 to 11 of 24 share rows: two of them on the first node, four on the second, as 12 to 17 with four and two.
    assert most_outside(24, 8, 6) == 4 * 2 + 4 * 2


def test_a_plan_of_shared_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its text says what a rank holds and how long a row may be; ranks that cannot be divided are refused."""
    worlds.write_model(tmp_path / "model")
    worlds.write_pairs(tmp_path / "pairs.jsonl", 40)
    for shared, status in ((2, 0), (8, 2), (3, 2)):
        train = {"sequence_parallel": shared, "micro_batch_tokens": 512}
        worlds.write_run(
            tmp_path / "run.yaml", tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "run", train=train
        )
        assert main(["plan", str(tmp_path / "run.yaml"), "plan.gpu=h200"]) == status
    said = capsys.readouterr()
    assert "all-to-alls: a rank sends " in said.out
    assert "to the other ranks of its node that share its rows in the " in said.out
    assert "512 tokens on each rank; 2 ranks share a row of up to 1,024 tokens" in said.out
    assert "longest row that fits on 2 ranks" in said.out
    assert "train.sequence_parallel: got 8, but the layers of model.name_or_path (llama) have" in said.err
    assert "train.sequence_parallel: got 3, but" in said.err
