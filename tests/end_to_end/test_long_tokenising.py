"""A data set whose tokenising takes longer than the time-out of the collectives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import worlds
from places import PYTHONPATH, REPOSITORY

SCRIPT = """
import time
from datetime import timedelta
from prefopt_dist import cli
from prefopt_dist.data import prepare
from prefopt_dist.distributed import ranks

if __name__ == "__main__":
    ranks.COLLECTIVE_TIMEOUT = timedelta(seconds=12)
    append = prepare._Columns.append

    def slowly(*arguments):
        time.sleep(SECONDS)
        append(*arguments)

    prepare._Columns.append = slowly
    cli.run()
"""


@pytest.mark.slow
def test_a_data_set_that_takes_longer_than_a_time_out_is_trained_on(tmp_path: Path) -> None:
    worlds.write_model(tmp_path / "model")
    worlds.write_pairs(tmp_path / "pairs.jsonl", 8)
    worlds.write_run(
        tmp_path / "run.yaml", tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "run",
        train={"global_batch_pairs": 4, "max_steps": 2},
    )  # fmt: skip
    (tmp_path / "door.py").write_text(SCRIPT.replace("SECONDS", "30"))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(tmp_path / "door.py"), "train", str(tmp_path / "run.yaml")),
        ],
        env=os.environ | {"PYTHONPATH": f"{PYTHONPATH}:{REPOSITORY}", "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "DONE").exists()
