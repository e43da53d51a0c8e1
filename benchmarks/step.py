"""Speed of our step beside TRL's DPOTrainer, measured in one run: python -m benchmarks.step [--cuda] [--ladder].

Each contestant runs in a process of its own on the same model, pairs and steps. The losses of all steps are compared
before any time is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import meter, report
from benchmarks.floor import SHAPES, Shape
from benchmarks.pairs import MIXES
from benchmarks.world import Task, save_task

RESULTS = Path(__file__).resolve().parent / "results"
VARIANTS: dict[str, dict[str, Any]] = {
    "ours-small": {"micro_batch_tokens": 2048},
    "ours-packed": {"path": "packed"},
    "ours-plain": {"path": "plain"},
    "ours-compiled": {"compiled": True},
    "ours-small-compiled": {"compiled": True, "micro_batch_tokens": 2048},
}
"""Ours with other values of the task."""
STEPS = {"ultrafeedback-like": 4, "hh-like": 6, "long": 2, "uniform": 2}
"""Timed steps by default: as many as half an hour allows."""


def main() -> None:
    """Measure, print and save the comparison."""
    options = _arguments()
    shape = SHAPES[options.shape]
    if options.layers:
        shape = replace(shape, layers=options.layers)
    if options.vocabulary:
        shape = replace(shape, vocabulary=options.vocabulary)
    found: dict[str, Any] = {"shape": options.shape, "head_share": round(shape.head_share, 4), "mixes": {}}
    for mix in options.mix:
        task = Task(
            shape=shape,
            mix=mix,
            pairs=options.pairs or shape.pairs,
            steps=options.steps or STEPS[mix],
            warm_up=1,
            device=options.device,
            seed=options.seed,
            micro_batch_tokens=options.micro_batch_tokens,
            ranks=options.ranks,
        )
        machine, results = measure(task, options.contestants, options.runs)
        difference = report.check_losses(results, task.dtype)
        rate = machine.pop("rate")
        if not found["mixes"]:
            found |= {"machine": machine, "task": _task_facts(task)}
            print(_heading(options.shape, shape, task, machine), flush=True)
        summary = report.summarise(task, results, rate)
        found["mixes"][mix] = summary | {"loss_difference": difference, "matrix_gflops": rate / 1e9}
        runs = f", medians of {options.runs} runs in turn" if options.runs > 1 else ""
        print(f"\n{report.table(mix, found['mixes'][mix])}", flush=True)
        print(f"matrix product: {rate / 1e9:.0f} GFLOP/s{runs}", flush=True)
        if options.ladder and mix == options.mix[0]:
            found["ladder"] = ladder(task)
    if options.save:
        save(found, options.save)


def ladder(task: Task) -> dict[str, Any]:
    """Measure and print the rungs; return their summary."""
    from benchmarks.ladder import RUNGS as rungs

    machine, results = measure(task, [*rungs, "ours"])
    difference = report.check_losses(results, task.dtype)
    summary = report.summarise(task, results, machine["rate"]) | {"loss_difference": difference}
    print(f"\n### the ladder, {task.mix}\n{report.ladder_table(rungs, summary)}", flush=True)
    return summary


def measure(task: Task, contestants: list[str], runs: int = 1) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return facts about the machine, with its speed of matrix products, and each contestant's result.

    The contestants run in turn, `runs` times, so that a machine whose speed changes slows all of them down.
    """
    machines, results = [], {contestant: [] for contestant in contestants}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(runs):
            save_task(folder, task)
            machines.append(_process("machine", folder, task))
            for contestant in contestants:
                changed = VARIANTS.get(contestant)
                save_task(folder, replace(task, **changed) if changed else task)
                results[contestant].append(_process("ours" if changed else contestant, folder, task))
    rate = statistics.median(machine["rate"] for machine in machines)
    return machines[0] | {"rate": rate}, {name: report.medians(of) for name, of in results.items()}


def _process(contestant: str, folder: Path, task: Task) -> dict[str, Any]:
    """Run one contestant; its output is printed only if it fails."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        p for p in (str(RESULTS.parent.parent), os.environ.get("PYTHONPATH")) if p
    )
    # With the store or cache of an earlier contestant, this one would skip its first pass.
    environment |= {"HF_DATASETS_CACHE": str(folder / f"cache-{contestant}"), "HF_HUB_OFFLINE": "1"}
    for left in folder.glob("store/*"):
        left.unlink()
    if task.device == "cpu":
        environment |= meter.SINGLE_THREAD | meter.ALLOCATOR | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    if task.ranks > 1:
        environment["ACCELERATE_USE_DEEPSPEED"] = "true"  # the peer's libraries read it while they are imported
    several = ["torch.distributed.run", "--standalone", f"--nproc-per-node={task.ranks}", "-m"]
    done = subprocess.run(
        [sys.executable, "-m", *(several if task.ranks > 1 else ()), "benchmarks.contestant", contestant, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{contestant} ended with {done.returncode}")
    result: dict[str, Any] = json.loads((folder / f"{contestant}.json").read_text())
    return result


def save(found: dict[str, Any], name: str) -> None:
    """Write results/NAME.json, and the plot where matplotlib is installed.

    Results of other mixes are kept where they were measured with the same model, task and versions on the same machine,
    so that the mixes can be measured one by one.
    """
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    found = _rounded(found)
    before = json.loads(file.read_text()) if file.exists() else {}
    if all(before.get(key) == found[key] for key in ("shape", "head_share", "machine", "task")):
        mixes = before["mixes"] | found["mixes"]
        found = before | found | {"mixes": {mix: mixes[mix] for mix in MIXES if mix in mixes}}
    file.write_text(json.dumps(found, indent=1) + "\n")
    try:
        report.plot(found["mixes"], _title(found), RESULTS / f"{name}.svg")
    except ImportError:
        print("no plot: matplotlib is not installed (pip install -e '.[benchmark]')")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def _task_facts(task: Task) -> dict[str, Any]:
    names = ("pairs", "warm_up", "device", "dtype", "seed", "beta", "learning_rate", "micro_batch_tokens", "ranks")
    return {n: getattr(task, n) for n in names}


def _heading(name: str, shape: Shape, task: Task, machine: dict[str, Any]) -> str:
    return (
        f"{name}: {shape.layers} layers of width {shape.hidden}, {shape.backbone / 1e6:.1f} M parameters, vocabulary "
        f"{shape.vocabulary:,} (head {shape.head_share:.1%} of the layers); {task.pairs} pairs a step, "
        f"{task.dtype}, ranks: {task.ranks}\n{machine['gpu'] or machine['cpu'] + ', one thread a rank'}; "
        f"torch {machine['torch']}, TRL {machine['trl']}"
    )


def _title(found: dict[str, Any]) -> str:
    machine = found["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, one thread"
    return f"DPO training step, model “{found['shape']}”, {where}, TRL {machine['trl']} (bars: share of ours)"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default=None, help="small on the CPU, 1b on CUDA")
    parser.add_argument("--layers", type=int, help="number of layers, to fit the memory")
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--mix", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--contestants", nargs="+", default=["ours", "ours-small", "trl-tuned", "trl"])
    parser.add_argument("--pairs", type=int, help="pairs of a step")
    parser.add_argument("--ranks", type=int, default=1, help="ranks under ZeRO-3; with several, wall seconds count")
    parser.add_argument("--runs", type=int, default=1, help="runs of each contestant, in turn; medians count")
    parser.add_argument("--steps", type=int, help="timed steps, after one that is not; default by mix")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cuda", dest="device", action="store_const", const="cuda", help="--device cuda")
    parser.add_argument("--ladder", action="store_true", help="also measure each optimisation, on the first mix")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json and NAME.svg")
    options = parser.parse_args()
    options.shape = options.shape or ("small" if options.device == "cpu" else "1b")
    if "ours" not in options.contestants:
        parser.error("--contestants: the losses are compared with those of ours")
    if (options.pairs or SHAPES[options.shape].pairs) % options.ranks:
        parser.error("--ranks: must divide the pairs of a step")
    if options.ladder and options.ranks > 1:
        parser.error("--ladder: its rungs have no ranks")
    return options


if __name__ == "__main__":
    main()
