"""The flight recorder: what a rank that hangs leaves of its collectives, and how a waiting rank is known on a GPU."""

from __future__ import annotations

import mmap
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from prefopt_dist.distributed import flight_recorder
from prefopt_dist.distributed.flight_recorder import FlightRecorder
from prefopt_dist.distributed.watchdog import Watchdog

NAMES = ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DUMP_ON_TIMEOUT")
OLDER = ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")


class StandIn:
    """torch's dump of NCCL's collectives, in the form that torch 2.13 gives gloo's; not run on a GPU."""

    def __init__(self) -> None:
        self.begun, self.complete = 40, 40
        self.asked: list[dict[str, bool]] = []

    def __call__(self, **asked: bool) -> bytes:
        self.asked.append(asked)
        status = {
            "last_enqueued_collective": self.begun,
            "last_started_collective": -1,
            "last_completed_collective": self.complete,
        }
        return pickle.dumps({"version": "2.10", "pg_status": {"0": status}})


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*NAMES, *OLDER):
        monkeypatch.setenv(name, "")  # so that it is restored afterwards
        monkeypatch.delenv(name)
    return monkeypatch


def test_the_variables_that_torch_reads(variables: pytest.MonkeyPatch, tmp_path: Path) -> None:
    variables.chdir(tmp_path)
    flight_recorder.set_environment(Path("run"))
    assert [os.environ[n] for n in NAMES] == ["2000", str(tmp_path / "run" / "collectives-rank-"), "1"]
    torch_folder = Path(dist.__file__).parents[1]
    with (torch_folder / "lib/libtorch_cpu.so").open("rb") as file:
        library = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    assert all(library.find(name.encode()) >= 0 for name in NAMES[:2])
    assert NAMES[2] in (torch_folder / "include/torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp").read_text()


def test_values_of_the_user_stay(variables: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*OLDER, NAMES[2]):
        variables.setenv(name, "7")
    flight_recorder.set_environment(tmp_path)
    assert {n: os.environ.get(n) for n in (*NAMES, *OLDER)} == dict.fromkeys((*OLDER, NAMES[2]), "7") | dict.fromkeys(
        NAMES[:2]
    )


def test_a_rank_waits_while_a_collective_is_not_complete() -> None:
    dump = StandIn()
    recorder = FlightRecorder(dump, of_nccl=True)
    assert not recorder.waits()
    dump.begun = 41
    assert recorder.waits()
    assert not any(asked["includeCollectives"] for asked in dump.asked), "an entry would ask the device for its state"
    assert recorder.text() == "collectives begun: 41 in process group 0"
    assert not FlightRecorder(dump, of_nccl=False).waits(), "gloo's numbers are not in order"


def test_the_watchdog_knows_a_waiting_rank_by_its_collective(tmp_path: Path) -> None:
    """The main thread is in no collective by its stack, as on a GPU, where it reads a number."""
    dump = StandIn()
    watchdog = Watchdog(tmp_path, rank=0, world_size=2, minutes=1, recorder=FlightRecorder(dump, of_nccl=True))
    watchdog._update_own_state(1)
    assert not watchdog._states[0].waits
    dump.begun = 41
    watchdog._update_own_state(2)
    assert watchdog._states[0].waits
    assert watchdog._probable_cause() == 1


def test_a_trace_of_another_form_does_not_end_the_reports(tmp_path: Path) -> None:
    recorder = FlightRecorder(lambda **_: pickle.dumps({}), of_nccl=True)
    watchdog = Watchdog(tmp_path, rank=0, world_size=2, minutes=1, recorder=recorder)
    watchdog._update_own_state(1)
    assert watchdog._states[0].reports == 1
    assert not watchdog._states[0].waits


def test_the_trace_lies_beside_the_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def ended(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr("os._exit", ended)
    dump = StandIn()
    recorder = FlightRecorder(dump, of_nccl=True)
    with pytest.raises(SystemExit):
        Watchdog(tmp_path, rank=3, world_size=4, minutes=1, recorder=recorder)._end_job()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["collectives-rank-3", "hang-rank-3.txt"]
    read: dict[str, Any] = pickle.loads((tmp_path / "collectives-rank-3").read_bytes())
    assert read["pg_status"]["0"]["last_enqueued_collective"] == 40
    assert dump.asked[-1] == {"includeCollectives": True, "includeStackTraces": True, "onlyActive": False}
    assert "collectives begun: 40 in process group 0" in capfd.readouterr().err


def test_of_gloo_by_torch_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one function of torch that exists without CUDA takes the same arguments and gives the same form."""
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    recorder = FlightRecorder.of_group()
    recorder.write(tmp_path / "trace")
    read = pickle.loads((tmp_path / "trace").read_bytes())
    assert isinstance(read["pg_status"], dict)
    nccl = StandIn()
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", nccl, raising=False)
    nccl.begun = 41
    assert FlightRecorder.of_group().waits()
