"""What a run leaves when it is done, and what becomes of it when it is started again."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import worlds
from door import Door, one_process_group
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model whose tokenizer has two chat templates, as those that know tools have."""
    folder = tmp_path_factory.mktemp("ends")
    worlds.write_model(folder / "model", seed=1)
    worlds.write_pairs(folder / "pairs.jsonl", 40)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": tokenizer.chat_template + "{# tools #}"}
    tokenizer.save_pretrained(folder / "model")
    with one_process_group():
        yield folder


@pytest.fixture
def done(made: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Door, Path, Path]:
    """The door, the run's file and its folder; the run is made once."""
    door = Door(made, capsys)
    run = door.run(train={"global_batch_pairs": 20, "micro_batch_tokens": 600})
    status, said = door.ends(run)
    assert status == 0, said
    return door, run, made / "runs" / "run"


def test_a_tokenizer_with_several_templates_is_exported(done: tuple[Door, Path, Path]) -> None:
    _, _, folder = done
    exported = AutoTokenizer.from_pretrained(folder / "final").chat_template
    assert set(exported) == {"default", "tool_use"}
    assert exported["tool_use"].endswith("{# tools #}")


def test_a_stop_of_a_run_that_is_done_is_not_that_of_the_next_start(done: tuple[Door, Path, Path]) -> None:
    """launch/run.sh goes by STOPPED when it says how a start has ended."""
    door, run, folder = done
    assert (folder / "DONE").exists()
    for stage in ("reference", "train"):
        for name in ("STOPPED", "STOP"):
            (folder / name).write_text("asked by the file STOP\n")
        status, said = door.ends(run, stage=stage)
        assert status == 0, said
        assert not (folder / "STOPPED").exists()
        assert not (folder / "STOP").exists()
    assert (folder / "DONE").exists()
