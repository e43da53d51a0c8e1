"""The results of `make test-gpu` as Markdown: python -m benchmarks.gpu_table [runs/gpu/results.jsonl].

The output goes into docs/performance.md, under the heading about GPUs. A file may hold several runs; the last counts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
GIB = 2**30
PARTS = {
    "kernel": "attention beside float32",
    "families": "families beside the CPU",
    "train": "jobs on one GPU",
    "memory": "memory beside the plan",
    "speed": "speed",
    "two-gpus": "jobs on two GPUs",
}


def last_run(file: Path) -> list[Record]:
    """Return the records of the file's last run; a run begins with a record of the part `machine`."""
    found = [json.loads(line) for line in file.read_text().splitlines()]
    starts = [i for i, record in enumerate(found) if record["part"] == "machine"]
    return found[starts[-1] :] if starts else found


def page(file: Path) -> str:
    """Return the tables of the file's last run."""
    found = last_run(file)
    machine = next((r for r in found if r["part"] == "machine"), {})
    sections = [_heading(machine), _summary(found), _kernel(found), _train(found), _memory(found), _speed(found)]
    return "\n\n".join(part for part in sections if part) + "\n"


def _heading(machine: Record) -> str:
    if machine.get("gpu") is None:
        return f"Not a GPU: {machine.get('cpu', 'unknown machine')}, tiny sizes. These numbers say nothing of a GPU."
    count = machine.get("gpus", 1)
    memory = f"{machine['memory'] / GIB:.0f} GiB" if "memory" in machine else "unknown memory"
    return (
        f"Measured on {machine.get('date', 'an unknown day')}, one run, by `make test-gpu`: "
        f"{machine['gpu']} ({memory}; {count} in the machine; driver and power limit "
        f"{machine.get('driver_and_power_limit') or 'unknown'}), torch {machine.get('torch')} "
        f"with CUDA {machine.get('cuda')}, DeepSpeed {machine.get('deepspeed')}, transformers "
        f"{machine.get('transformers')}."
    )


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _of(found: list[Record], part: str) -> list[Record]:
    return [r for r in found if r["part"] == part and r["case"] != "end"]


def _summary(found: list[Record]) -> str:
    def row(part: str, title: str) -> list[str]:
        cases = _of(found, part)
        end = next((r for r in found if r["part"] == part and r["case"] == "end"), None)
        if end is None and not cases:
            return [title, "not run", "", "", ""]
        failed = [r["case"] for r in cases if r["ok"] is False]
        ended = "ended early" if end is None or not end["ok"] else f"{end['seconds']:.0f} s"
        return [title, str(len(cases)), str(sum(r["ok"] is True for r in cases)), str(len(failed)), ended]

    failures = [
        f"- {PARTS.get(r['part'], r['part'])}, {r['case']}: "
        f"{r.get('error') or r.get('why') or r.get('sync') or _numbers(r)}"
        for r in found
        if r["ok"] is False
    ]
    table = _table(["part", "cases", "as expected", "not as expected", "time"], [row(p, t) for p, t in PARTS.items()])
    return table + ("\n\nNot as expected:\n\n" + "\n".join(failures) if failures else "")


def _numbers(record: Record) -> str:
    shown = {k: v for k, v in record.items() if k not in ("part", "case", "ok", "seconds", "top", "shares")}
    return ", ".join(f"{k} {v}" for k, v in shown.items())


def _worst(records: list[Record], key: str) -> str:
    values = [r[key] for r in records if r.get(key) is not None]
    return f"{max(values):.1e}" if values else "—"


def _kernel(found: list[Record]) -> str:
    cases = [r for r in _of(found, "kernel") if "dq" in r]
    families = [r for r in _of(found, "families") if "gradients" in r]
    lines = []
    if cases:
        worst = ", ".join(f"{name} {_worst(cases, name)}" for name in ("out", "dq", "dk", "dv", "worst_segment"))
        lines.append(f"Attention beside float32 math, largest ‖Δ‖/‖exact‖ of {len(cases)} cases: {worst}.")
    lines += [
        f"{r['case']}: {r['different']} of the others differ from the first."
        for r in _of(found, "kernel")
        if "different" in r
    ]
    lines += [
        f"One layer's attention of an 8B model on {r['tokens']:,} tokens: forward {r['forward_ms']:.2f} ms, "
        f"forward and backward {r['forward_backward_ms']:.2f} ms."
        for r in _of(found, "kernel")
        if "forward_ms" in r
    ]
    for dtype in ("float32", "bfloat16"):
        of_dtype = [r for r in families if r["case"].endswith(dtype)]
        if of_dtype:
            synced = [r["case"].partition(",")[0] for r in of_dtype if r["sync"]]
            lines.append(
                f"{len(of_dtype)} models in {dtype} beside the CPU's float32: sums within {_worst(of_dtype, 'sums')}, "
                f"gradients within {_worst(of_dtype, 'gradients')}; the host waits in: {', '.join(synced) or 'none'}."
            )
    return "\n".join(lines)


def _train(found: list[Record]) -> str:
    jobs = [r for part in ("train", "two-gpus") for r in _of(found, part) if "different_tensors" in r]
    if not jobs:
        return ""
    head = [
        "job",
        "killed after step",
        "went on from",
        "tensors that differ from the twin's",
        "largest loss difference",
    ]
    return _table(
        head,
        (
            [
                r["case"],
                str(r["killed_after_step"]),
                str(r["resumed_from_step"]),
                f"{r['different_tensors']} of {r['tensors']}",
                f"{r['largest_loss_difference']:.1e}",
            ]
            for r in jobs
        ),
    )


def _memory(found: list[Record]) -> str:
    rows = [r for r in _of(found, "memory") if "deviation" in r]
    if not rows:
        return ""

    def gib(record: Record, key: str) -> str:
        return f"{record[key] / GIB:.2f}" if record.get(key) is not None else "—"

    def deviation(record: Record) -> str:
        return "—" if record["deviation"] is None else f"{record['deviation']:+.0%}"

    head = ["memory, GiB", "peak", "planned", "plan − peak", "kept by forward", "planned activations", "reserved peak"]
    table = _table(
        head,
        (
            [
                r["case"],
                *(gib(r, k) for k in ("peak", "planned")),
                deviation(r),
                *(gib(r, k) for k in ("kept_by_forward", "planned_activations", "reserved_peak")),
            ]
            for r in rows
        ),
    )
    left = [f"{r['case']}: {r['left'] / 2**20:.1f} MiB left." for r in _of(found, "memory") if "left" in r]
    return table + ("\n\n" + "\n".join(left) if left else "")


def _speed(found: list[Record]) -> str:
    cases = _of(found, "speed")
    rows = [r for r in cases if "tokens_per_second" in r]
    if not rows:
        return ""

    def share(record: Record, key: str) -> str:
        return f"{record[key]:.1%}" if record.get(key) is not None else "—"

    head = ["1B, pairs like UltraFeedback's", "tokens/s", "pairs/s", "MFU", "share of a matrix product's speed"]
    head += ["peak GiB"]
    table = _table(
        head,
        (
            [
                r["case"],
                f"{r['tokens_per_second']:,.0f}",
                f"{r['pairs_per_second']:.1f}",
                share(r, "mfu"),
                share(r, "share_of_matrix_product"),
                f"{r['peak_memory'] / GIB:.1f}" if "peak_memory" in r else "—",
            ]
            for r in rows
        ),
    )
    profiles = [_profile(r) for r in cases if "shares" in r]
    return "\n\n".join([table, *profiles])


def _profile(record: Record) -> str:
    """Return the shares of the kinds of kernels and the kernels that take the most."""
    percent: Callable[[float], str] = "{:.1%}".format
    kinds = ", ".join(f"{kind} {percent(share)}" for kind, share in record["shares"].items())
    top = _table(
        ["kernel", "share", "calls"],
        ([f"`{k['name'].replace('|', '/')}`", percent(k["share"]), str(k["calls"])] for k in record["top"]),
    )
    idle = "unknown" if record.get("idle") is None else percent(record["idle"])
    return f"{record['case']}: the GPU's idle share {idle}; of the kernels' time: {kinds}.\n\n{top}"


def main() -> None:
    """Print the tables of the file that the command line names."""
    file = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/gpu/results.jsonl")
    if not file.exists():
        raise SystemExit(f"{file} does not exist; run `make test-gpu` on a machine with a GPU first")
    print(page(file), end="")


if __name__ == "__main__":
    main()
