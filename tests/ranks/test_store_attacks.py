"""A stored reference is never used for other weights, and nothing is scored twice: store_cases.py on two ranks."""

from pathlib import Path
from typing import Any

import case_runner
import pytest

CASES = [
    "what_does_not_change_the_reference",
    "new_weights_at_the_same_path",
    "weights_that_change_while_they_are_read",
    "what_changes_the_numbers",
    "resume_with_the_store_deleted",
    "an_altered_byte_in_any_shard",
    "a_store_on_the_nodes_own_disks",
    "a_model_on_the_nodes_own_disks",
    "stopped_while_it_waits_for_its_turn",
    "every_micro_batch_fits_the_budget",
]
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("attacks")
    case_runner.run_cases("store_cases.py", 2, made, CASES)
    return made


def found(folder: Path, case: str) -> Any:
    return case_runner.found(folder, case)


def test_what_does_not_change_the_reference_scores_nothing(folder: Path) -> None:
    f = found(folder, "what_does_not_change_the_reference")
    assert f["first"] == [f["distinct"], 0]
    assert f["others"] == dict.fromkeys(
        ("beta", "rate", "seed", "order", "run-folder", "epochs", "subset", "model-path"), 0
    )
    assert f["more"] == [f["more distinct"] - f["distinct"], f["distinct"]]
    assert f["more"][0] > 0
    assert f["worst"] < ROUNDING


def test_new_weights_at_the_same_path_are_scored_anew(folder: Path) -> None:
    f = found(folder, "new_weights_at_the_same_path")
    assert f["remembered"] == 1, "the memory of digests must be in play"
    assert f["again"] == 0
    assert len(set(f["sizes"])) == 1
    assert f["scored"] == [f["distinct"]] * 3
    assert max(f["worst"]) < ROUNDING


def test_weights_that_change_between_hashing_and_loading_are_refused(folder: Path) -> None:
    f = found(folder, "weights_that_change_while_they_are_read")
    assert "changed while the job was reading them" in f["message"]
    assert f["shards"] == 0


def test_what_changes_the_numbers_is_never_reused(folder: Path) -> None:
    f = found(folder, "what_changes_the_numbers")
    assert f["dtype"] == f["rope"] == f["first"] > 0
    assert f["cut"] == f["cut distinct"] > 0
    assert f["uncut"] > 0
    assert max(f["worst"]) < ROUNDING


def test_a_resume_with_the_store_deleted_scores_the_start(folder: Path) -> None:
    f = found(folder, "resume_with_the_store_deleted")
    assert "max_hours" in f["stopped"]
    assert f["again"] == f["first"]
    assert f["again"][0] > 0
    assert f["same rows"]
    assert f["same end"]
    assert f["trained"]


def test_an_altered_byte_in_any_shard_is_found(folder: Path) -> None:
    f = found(folder, "an_altered_byte_in_any_shard")
    assert len(f["rows"]) >= 2
    assert f["scored"] == f["rows"], "what the damaged shard had is scored again, and nothing else"
    assert f["same rows"]
    assert f["worst"] < ROUNDING


def test_a_store_on_local_disks_is_refused(folder: Path) -> None:
    f = found(folder, "a_store_on_the_nodes_own_disks")
    for word in ("reference.store", "/proc/self/cwd/store", "all nodes share", "run.cache"):
        assert word in f["message"]
    assert f["shards"] == 0
    assert not f["run"]


def test_a_model_that_differs_between_nodes_is_refused(folder: Path) -> None:
    f = found(folder, "a_model_on_the_nodes_own_disks")
    assert f["files"] > 1
    for case, file in (
        ("weights", f"model-0000{f['files']}-of-0000{f['files']}.safetensors"),
        ("config", "config.json"),
    ):
        first, second = f[case]["messages"]
        assert first == second
        for word in (
            "AgreedUserError: model.name_or_path: ",
            f"/proc/self/cwd/{case} on n2 (rank 1) is not the folder that n1 (rank 0) has",
            f": other content in {file}. ",
            "copy n1's folder to the others",
        ):
            assert word in first
        assert f[case]["scored"] == f[case]["stores"] == 0
    for case in ("same", "shared"):
        assert f[case]["messages"] == ["", ""]
        assert f[case]["scored"] > 0
        assert f[case]["stores"] == 1
    assert f["same"]["read"] == [f["files"]] * 2, "each node reads its own disk"
    assert sum(f["shared"]["read"]) == f["files"], "a shared disk is read once"
    assert min(f["shared"]["read"]) > 0


def test_a_waiting_job_obeys_stop(folder: Path) -> None:
    f = found(folder, "stopped_while_it_waits_for_its_turn")
    assert "STOP" in f["stopped"]
    assert f["shards"] == 0
    assert f["then"][0] > 0


def test_every_micro_batch_fits_the_budget(folder: Path) -> None:
    """The spot check's and the export check's too, or what ran well at first could run out of memory later."""
    f = found(folder, "every_micro_batch_fits_the_budget")
    assert f["before"][0] > 0, "there must be stored rows to check"
    assert f["export check"] > f["budget"], "the export check's rows together must exceed the budget"
    first, second = f["computed"]
    for kind in ("spot check", "export check", "export", "other"):
        assert len(first[kind]) == len(second[kind]) > 1, kind
        assert max(first[kind] + second[kind]) <= f["budget"], kind
