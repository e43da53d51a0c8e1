"""One machine's part of the check before a job; started once on each, by slurm/job.sh through srun.

    python -m prefopt_dist.preflight --hosts n1,n2 --node I --ranks R --head HOST:PORT --folder RUN

The machines meet in a store at the head. Those that do not answer are named by it, so are those that lack something
or differ, and those whose ranks do not reduce. Ends with 0, with 1 and one line a fault on the head, or with 2 where a
value in the environment is none.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from prefopt_dist.errors import UserError
from prefopt_dist.preflight.machine import MachineReport, Requirements, examine_machine, version_faults
from prefopt_dist.preflight.rendezvous import Rendezvous

MEETING_SECONDS = 30.0
"""For all machines to answer, counted from the head's own start; PREFOPT_MEETING_SECONDS overrides it."""
REDUCTION_SECONDS = 35.0
"""For the ranks of a machine to start and to reduce."""
TOLD_SECONDS = 10.0
"""For the others' word once the head's own ranks are done. All of it is less than 90 s."""
SLOW = 0.5
"""Of the median bandwidth inside a machine."""


def check(meeting: Rendezvous, wanted: Requirements, seconds: float) -> list[str]:
    """Every machine: the faults of all; seconds: for all machines to answer."""
    report = examine_machine(meeting.hosts[meeting.node], wanted)
    meeting.answer("report", dataclasses.asdict(report))
    faults = None
    if meeting.node == 0:
        found = meeting.answers("report", seconds)
        reports = [MachineReport(**r) for r in found.values()]
        faults = [f"{h}: did not answer within {seconds:.0f} s" for h in meeting.hosts if h not in found]
        faults += [f"{r.host}: {fault}" for r in reports for fault in r.faults] + version_faults(reports)
    agreed = meeting.agree("machines", faults, seconds + TOLD_SECONDS)
    if agreed:
        return agreed
    meeting.answer("reduction", _reduce(meeting, wanted.ranks))
    if meeting.node == 0:
        faults = _judge(meeting, meeting.answers("reduction", TOLD_SECONDS))
    return meeting.agree("reductions", faults, REDUCTION_SECONDS + TOLD_SECONDS)


def _reduce(meeting: Rendezvous, ranks: int) -> dict[str, Any]:
    """This machine's ranks take part in the reductions; {"inside": …, "all": …} in GB/s, or {"fault": …}."""
    numbers = map(str, (meeting.port, len(meeting.hosts), ranks, meeting.node))
    command = [sys.executable, "-m", "prefopt_dist.preflight.all_reduce", meeting.host, *numbers]
    # Files, as a pipe that nobody reads yet would hold up a rank that says much (NCCL_DEBUG).
    logs = [tempfile.TemporaryFile("w+") for _ in range(ranks)]  # noqa: SIM115
    started = [
        subprocess.Popen([*command, str(i)], stdout=log, stderr=subprocess.STDOUT, text=True)
        for i, log in enumerate(logs)
    ]
    until = time.monotonic() + REDUCTION_SECONDS
    last: list[str] = []
    fault = ""
    for i, (process, log) in enumerate(zip(started, logs, strict=True)):
        in_time = True
        try:
            process.wait(timeout=max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            in_time = False
            process.kill()
            process.wait()
        with log:
            log.seek(0)
            last.append((log.read().strip().splitlines() or ["no word"])[-1])
        if not in_time:
            fault = fault or f"rank {i} of it did not reduce within {REDUCTION_SECONDS:.0f} s"
        elif process.returncode != 0:
            fault = fault or f"rank {i} of it failed to reduce: {last[-1]}"
    figures: dict[str, Any] = {"fault": fault} if fault else json.loads(last[0])
    return figures


def _judge(meeting: Rendezvous, found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    faults = [f"{h}: its ranks did not answer" for h in meeting.hosts if h not in found]
    faults += [f"{h}: {f['fault']}" for h, f in found.items() if "fault" in f]
    if not faults:
        print(_figures(found), flush=True)
    return faults


def _figures(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for people; a machine far slower than the others is named, though the job may run."""
    text = f"nodes: {len(found)} well"
    together = next(iter(found.values()))["all"]
    if together is not None:
        text += f"; all-reduce {together:.2f} GB/s together"
    inside = {h: f["inside"] for h, f in found.items() if f["inside"] is not None}
    if inside:
        usual = statistics.median(inside.values())
        text += ", inside a machine " + ", ".join(
            f"{host} {speed:.2f}" + (" (SLOW)" if speed < SLOW * usual else "") for host, speed in inside.items()
        )
    return text


def _number(name: str, default: float) -> float:
    """A value of the environment, finite and at least 0."""
    said = os.environ.get(name)
    if said is None:
        return default
    try:
        value = float(said)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise UserError(f"{name}: got {said!r}, must be a number, at least 0; correct it, or unset it for {default:g}")
    return value


def main(arguments: Sequence[str]) -> int:
    """The status of this machine's process."""
    parser = argparse.ArgumentParser(prog="prefopt_dist.preflight")
    parser.add_argument("--hosts", required=True)
    parser.add_argument("--node", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--head", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    asked = parser.parse_args(arguments)
    hosts = asked.hosts.split(",")
    try:
        wanted = Requirements(
            ranks=asked.ranks,
            on_gpus=os.environ.get("DS_ACCELERATOR") != "cpu",
            folder=asked.folder.absolute(),
            disk_gib=_number("PREFOPT_MIN_DISK_GIB", 5),
            shared_memory_gib=_number("PREFOPT_MIN_SHM_GIB", 0.5),
        )
        seconds = _number("PREFOPT_MEETING_SECONDS", MEETING_SECONDS)
    except UserError as e:
        print(f"nodes: {hosts[asked.node]}: {e}", file=sys.stderr)
        return 2
    try:
        meeting = Rendezvous(hosts, asked.node, asked.head, seconds)
        faults = check(meeting, wanted, seconds)
        meeting.part()
    except dist.DistError as e:
        first = str(e).splitlines()[0]
        print(f"nodes: {hosts[asked.node]}: cannot reach the head at {asked.head}: {first}", file=sys.stderr)
        return 1
    if faults and asked.node == 0:
        print("\n".join(f"nodes: {fault}" for fault in faults), file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
