"""A run makes the step-0 check by itself."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import worlds
from door import Door, one_process_group

from prefopt_dist.setup import prepare_reference


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model and pairs."""
    folder = tmp_path_factory.mktemp("start")
    worlds.write_model(folder / "model", seed=1, scale=2.0)
    worlds.write_pairs(folder / "pairs.jsonl", 20)
    with one_process_group():
        yield folder


def test_a_run_checks_its_reference_at_step_0(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check is made by the run itself: stored values that are not the start's end it before an update."""
    door = Door(made, capsys)
    score = prepare_reference.run_first_pass

    def half_a_nat_more(**given: Any) -> Any:
        done = score(**given)
        return replace(done, sums=[sums + 0.5 for sums in done.sums])

    monkeypatch.setattr(prepare_reference, "run_first_pass", half_a_nat_more)
    status, said = door.ends(door.run("another-reference"))
    assert status == 2
    assert "step 0: stored and live log-probs of a sequence differ by up to 0.5" in said
    assert not (door.folder / "runs" / "another-reference" / "final").exists()
