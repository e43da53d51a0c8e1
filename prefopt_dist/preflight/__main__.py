"""One machine's part of the check before a job; slurm/job.sh starts it once on each machine through srun.

    python -m prefopt_dist.preflight --hosts n1,n2 --node I --ranks R --head HOST:PORT --folder RUN [--plan plan.json]

The machines meet in a key-value store at the head. The head names the machines that do not answer, that lack something,
whose versions differ, or whose ranks fail in an all-reduce. Exit status: 0; 1 with one line per fault on the head; 2
where an environment variable has an invalid value.
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
"""Seconds for all machines to answer, counted from the head's start; PREFOPT_MEETING_SECONDS overrides it."""
REDUCTION_SECONDS = 35.0
"""Seconds for the ranks of a machine to start and to complete the all-reduces."""
REPORT_SECONDS = 10.0
"""Seconds for the other machines' results once the head's own ranks are done. The whole check takes less than 90 s."""
SLOW_SHARE = 0.5
"""Share of the median bandwidth inside a machine below which a machine is marked as slow."""


def check(
    meeting: Rendezvous, requirements: Requirements, seconds: float, network: Mapping[str, float] | None = None
) -> list[str]:
    """Return the faults of all machines (every machine calls it).

    Args:
        meeting: the rendezvous of the machines.
        requirements: what each machine must have.
        seconds: time for all machines to answer.
        network: `network` of the run's plan; None where it is not known.
    """
    report = examine_machine(meeting.hosts[meeting.node], requirements)
    meeting.answer("report", dataclasses.asdict(report))
    faults = None
    if meeting.node == 0:
        found = meeting.answers("report", seconds)
        reports = [MachineReport(**r) for r in found.values()]
        faults = [f"{h}: did not answer within {seconds:.0f} s" for h in meeting.hosts if h not in found]
        faults += [f"{r.host}: {fault}" for r in reports for fault in r.faults] + version_faults(reports)
    agreed = meeting.agree("machines", faults, seconds + REPORT_SECONDS)
    if agreed:
        return agreed
    meeting.answer("reduction", _reduce(meeting, requirements.ranks))
    if meeting.node == 0:
        faults = _reduction_faults(meeting, meeting.answers("reduction", REPORT_SECONDS), network)
    return meeting.agree("reductions", faults, REDUCTION_SECONDS + REPORT_SECONDS)


def _reduce(meeting: Rendezvous, ranks: int) -> dict[str, Any]:
    """Run the all-reduces of this machine's ranks.

    Returns:
        {"inside": …, "all": …} with bandwidths in GB/s, or {"fault": …}.
    """
    numbers = map(str, (meeting.port, len(meeting.hosts), ranks, meeting.node))
    command = [sys.executable, "-m", "prefopt_dist.preflight.all_reduce", meeting.host, *numbers]
    # Files instead of pipes: a rank with much output (NCCL_DEBUG) would block on a pipe that is not read yet.
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
            last.append((log.read().strip().splitlines() or ["no output"])[-1])
        if not in_time:
            fault = fault or f"its rank {i} did not finish the all-reduce within {REDUCTION_SECONDS:.0f} s"
        elif process.returncode != 0:
            fault = fault or f"its rank {i} failed in the all-reduce: {last[-1]}"
    figures: dict[str, Any] = {"fault": fault} if fault else json.loads(last[0])
    return figures


def _reduction_faults(
    meeting: Rendezvous, results: Mapping[str, Mapping[str, Any]], network: Mapping[str, float] | None
) -> list[str]:
    """Return the faults of the all-reduces; print the bandwidths, and a warning about them, where none is found."""
    faults = [f"{h}: its ranks did not answer" for h in meeting.hosts if h not in results]
    faults += [f"{h}: {f['fault']}" for h, f in results.items() if "fault" in f]
    if not faults:
        print(_bandwidth_line(results), flush=True)
        if network is not None and len(results) > 1:
            print(_network_warning(next(iter(results.values()))["all"], network), end="", flush=True)
    return faults


def _network_warning(measured: float, network: Mapping[str, float]) -> str:
    """Return a line where the all-reduce over all ranks is slower than the run's plan needs; else nothing.

    The job starts nevertheless: a slow network makes it slower, not wrong.
    """
    needed = network["needed_gb_per_second"]
    if measured >= needed:
        return ""
    exchanged, remedy = "", ""
    if leaving := network.get("all_to_all_bytes_leaving_a_node", 0):
        exchanged = f", and the all-to-alls of shared rows {leaving / 1e9:.3g} GB out of a node,"
        remedy = ", or set train.sequence_parallel to a divisor of the ranks of a node"
    return (
        f"nodes: WARNING: the all-reduce over all ranks reaches {measured:.3g} GB/s, and this run needs {needed:.3g} "
        f"GB/s: ZeRO-3 moves {network['bytes_a_micro_batch'] / 1e9:.3g} GB{exchanged} in the "
        f"{network['seconds_a_micro_batch']:.3g} s of a micro-batch (plan). The ranks will wait for the network "
        f"about {1 - measured / needed:.0%} of the time. See whether NCCL uses the fast network (NCCL_DEBUG=INFO shows "
        f"NET/IB; NCCL_IB_HCA and NCCL_SOCKET_IFNAME choose it), or raise train.micro_batch_tokens{remedy}\n"
    )


def _bandwidth_line(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the report line; a machine much slower than the others is marked, but it does not stop the job."""
    text = f"nodes: {len(results)} passed the check"
    over_all = next(iter(results.values()))["all"]
    if over_all is not None:
        text += f"; all-reduce {over_all:.2f} GB/s over all ranks"
    inside = {h: f["inside"] for h, f in results.items() if f["inside"] is not None}
    if inside:
        median = statistics.median(inside.values())
        text += ", GB/s inside each machine: " + ", ".join(
            f"{host} {speed:.2f}" + (" (SLOW)" if speed < SLOW_SHARE * median else "") for host, speed in inside.items()
        )
    return text


def _number(name: str, default: float) -> float:
    """Return an environment variable as a finite number of at least 0, or the default where it is not set.

    Raises:
        UserError: the value is not such a number.
    """
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise UserError(f"{name}: got {text!r}, must be a number, at least 0; correct it, or unset it for {default:g}")
    return value


def main(arguments: Sequence[str]) -> int:
    """Check this machine together with the others; return the exit status."""
    parser = argparse.ArgumentParser(prog="prefopt_dist.preflight")
    parser.add_argument("--hosts", required=True)
    parser.add_argument("--node", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--head", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--plan", type=Path)
    options = parser.parse_args(arguments)
    hosts = options.hosts.split(",")
    try:
        requirements = Requirements(
            ranks=options.ranks,
            on_gpus=os.environ.get("DS_ACCELERATOR") != "cpu",
            folder=options.folder.absolute(),
            disk_gib=_number("PREFOPT_MIN_DISK_GIB", 5),
            shared_memory_gib=_number("PREFOPT_MIN_SHM_GIB", 0.5),
        )
        seconds = _number("PREFOPT_MEETING_SECONDS", MEETING_SECONDS)
    except UserError as e:
        print(f"nodes: {hosts[options.node]}: {e}", file=sys.stderr)
        return 2
    try:
        meeting = Rendezvous(hosts, options.node, options.head, seconds)
        network = None if options.plan is None else json.loads(options.plan.read_text())["network"]
        faults = check(meeting, requirements, seconds, network)
        meeting.leave()
    except dist.DistError as e:
        first = str(e).splitlines()[0]
        print(f"nodes: {hosts[options.node]}: cannot reach the head at {options.head}: {first}", file=sys.stderr)
        return 1
    if faults and options.node == 0:
        print("\n".join(f"nodes: {fault}" for fault in faults), file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
