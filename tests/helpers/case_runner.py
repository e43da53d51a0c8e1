"""Many cases in one process group: starting ranks costs seconds, a case only what it does."""

import gc
import inspect
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import patience
from places import PYTHONPATH, REPOSITORY, TESTS


def run_cases(script: str, n: int, folder: Path, names: list[str]) -> None:
    """Runs tests/ranks/<script> FOLDER CASE … on n ranks; FOLDER/<case>.json then has what the case found."""
    environment = os.environ | {
        "PYTHONPATH": PYTHONPATH,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    start = [sys.executable]
    if n > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    done = patience.run([*start, TESTS / "ranks" / script, folder, *names], folder, env=environment, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-6000:]


def found(folder: Path, case: str) -> dict[str, Any]:
    """What the case found; its error fails the test."""
    result: dict[str, Any] = json.loads((folder / f"{case}.json").read_text())
    assert "error" not in result, result["error"]
    return result


def cases_of(*modules: ModuleType) -> dict[str, Callable[[Path], dict[str, Any]]]:
    """The modules' functions of a folder, which are their cases, by name; one name for two of them is refused."""
    cases: dict[str, Callable[[Path], dict[str, Any]]] = {}
    for module in modules:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and [*inspect.signature(function).parameters] == ["folder"]:
                assert name not in cases, f"{name} of {module.__name__} and of {cases[name].__module__}"
                cases[name] = function
    return cases


def serve(cases: Mapping[str, Callable[[Path], dict[str, Any]]], prepare: Callable[[Path], None]) -> None:
    """The script's side, on every rank: `prepare` on rank 0, then each case named on the command line on all."""
    import torch.distributed as dist

    from prefopt_dist.distributed import ranks

    folder, names = Path(sys.argv[1]), sys.argv[2:]
    ranks.COLLECTIVE_TIMEOUT = timedelta(seconds=300)  # ranks that part ways fail instead of hanging
    ranks.start()
    ranks.run_on_rank_zero(lambda: folder.mkdir(parents=True, exist_ok=True))
    ranks.run_on_rank_zero(lambda: prepare(folder))
    gc.freeze()  # what was imported stays: without this each release of an engine would walk it, half a second
    for name in names:
        start = time.monotonic()
        try:
            result = cases[name](folder)
        except Exception:
            result = {"error": traceback.format_exc()}
            print(result["error"], file=sys.stderr, flush=True)
        errors = [e for e in ranks.all_gather(result.get("error")) if e]
        if dist.get_rank() == 0:
            (folder / f"{name}.json").write_text(json.dumps({"error": errors[0]} if errors else result))
            print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
    ranks.end()
    ranks.exit_now(0)
