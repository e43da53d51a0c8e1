"""Table, summary and plot of the contestants' results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.floor import distinct_tokens, first_pass_flop, step_flop
from benchmarks.pairs import MIXES, padding, usual_padding
from benchmarks.world import Task

LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Tolerated relative difference of a loss; the times are comparable only if all contestants take the same steps."""

NAMES = {
    "ours": "ours",
    "ours-small": "ours, 2,048-token micro-batches",
    "ours-packed": "ours, path packed",
    "ours-plain": "ours, path plain",
    "trl": "TRL as it comes",
    "trl-tuned": "TRL tuned",
}
PEERS = ("trl", "trl-tuned")
COLUMNS = (
    *("contestant", "pairs/s", "tokens/s", "s/step", "wall", "first pass", "peak memory", "of the floor"),
    *("step: times TRL / tuned", "epoch: times TRL / tuned"),
)


def check_losses(results: dict[str, dict[str, Any]], dtype: str) -> float:
    """Return the largest relative difference from our losses at any step.

    Raises:
        AssertionError: a difference exceeds the tolerance, or the numbers of steps differ.
    """
    ours, worst = results["ours"]["losses"], 0.0
    for name, found in results.items():
        assert len(found["losses"]) == len(ours), f"{name} made {len(found['losses'])} steps, ours {len(ours)}"
        for k, (mine, other) in enumerate(zip(ours, found["losses"], strict=True)):
            difference = abs(mine - other) / abs(mine)
            assert difference <= LOSS_TOLERANCE[dtype], f"step {k}: ours {mine}, {name} {other}"
            worst = max(worst, difference)
    return worst


def medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the result of one contestant whose times and peak are the medians of several runs."""

    def middle(marks: Sequence[dict[str, float]]) -> dict[str, float]:
        return {clock: statistics.median(mark[clock] for mark in marks) for clock in marks[0]}

    return runs[0] | {
        "steps": [middle(of) for of in zip(*(run["steps"] for run in runs), strict=True)],
        "first_pass": middle([run["first_pass"] for run in runs]) if runs[0]["first_pass"] else None,
        "peak": statistics.median(run["peak"] for run in runs),
        "baseline": statistics.median(run["baseline"] for run in runs),
    }


def summarise(task: Task, results: dict[str, dict[str, Any]], rate: float) -> dict[str, Any]:
    """Return the values that the table shows for one mix; call `check_losses` first."""
    lengths = [(len(p), len(c), len(r)) for p, c, r in task.drawn()]
    timed = lengths[task.warm_up * task.pairs :]
    floor = step_flop(task.shape, timed) / len(timed)
    floor_pass = first_pass_flop(task.shape, lengths) / len(lengths)
    # On the CPU the thread's CPU seconds count, which do not depend on other processes; wall time on CUDA and where
    # ranks wait for each other.
    clock = "cpu" if task.device == "cpu" and task.ranks == 1 else "wall"
    rate *= task.ranks
    rows: dict[str, Any] = {}
    for name, found in results.items():
        steps = found["steps"][task.warm_up :]
        pair = sum(s[clock] for s in steps) / len(timed)
        first = found["first_pass"][clock] / len(lengths) if found["first_pass"] else 0.0
        rows[name] = {
            "pairs_per_second": 1 / pair,
            "tokens_per_second": distinct_tokens(timed) / len(timed) / pair,
            "step_seconds": pair * task.pairs,
            "step_wall_seconds": sum(s["wall"] for s in steps) / len(steps),
            "first_pass_seconds_per_pair": first,
            "epoch_seconds_per_pair": pair + first,
            "peak_mib": (found["peak"] - found["baseline"]) / 2**20,
            "baseline_mib": found["baseline"] / 2**20,
            "efficiency": floor / pair / rate,
            "first_pass_efficiency": floor_pass / first / rate if first else None,
            "losses": found["losses"],
        }
        if any(found.get("padding", ())):
            timed_padding = found["padding"][task.warm_up :]
            rows[name]["padding"] = sum(timed_padding) / len(timed_padding)
    return {
        "steps": task.steps,
        "floor_gflop_per_pair": floor / 1e9,
        "tokens_per_pair": distinct_tokens(timed) / len(timed),
        "padding": padding(timed, task.pairs // task.ranks),
        "padding_of_the_mix": usual_padding(MIXES[task.mix], task.pairs // task.ranks),
        "rows": rows,
    }


def ratios(rows: dict[str, Any], name: str, what: str) -> str:
    """Return the ratios of pairs per second to each peer that was measured; what: `step` or `epoch`."""

    def seconds(row: dict[str, Any]) -> float:
        return 1 / row["pairs_per_second"] if what == "step" else row["epoch_seconds_per_pair"]

    return " / ".join(f"{seconds(rows[peer]) / seconds(rows[name]):.2f}" for peer in PEERS if peer in rows) or "–"


def table(mix: str, summary: dict[str, Any]) -> str:
    """Return the table of one mix as Markdown.

    Times are CPU seconds of one thread (on CUDA and of several ranks wall time). Memory is what a rank, the first, uses
    beyond the imports. An epoch
    includes the first pass where there is one. Efficiency is the floor's operations divided by time and by the speed of
    a matrix product.
    """
    lines = [
        f"### {mix}: {summary['tokens_per_pair']:.0f} distinct tokens and {summary['floor_gflop_per_pair']:.1f} GFLOP "
        f"a pair, {summary['steps']} steps timed; losses equal within {summary['loss_difference']:.0e}\n"
        f"padded tokens over distinct ones in the timed steps {summary['padding']:.3f}, in the mix "
        f"{summary['padding_of_the_mix']:.3f}\n",
        "| " + " | ".join(COLUMNS) + " |",
        "| --- " + "| ---: " * (len(COLUMNS) - 1) + "|",
    ]
    rows = summary["rows"]
    for name, row in rows.items():
        first, of_floor = row["first_pass_seconds_per_pair"], row["first_pass_efficiency"]
        cells = (
            NAMES.get(name, name),
            f"{row['pairs_per_second']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['step_seconds']:.2f}",
            f"{row['step_wall_seconds']:.2f}",
            f"{first * 1000:.0f} ms/pair ({of_floor:.0%})" if first else "–",
            f"{row['peak_mib']:.0f} MiB",
            f"{row['efficiency']:.0%}",
            ratios(rows, name, "step"),
            ratios(rows, name, "epoch"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ladder_table(rungs: dict[str, str], summary: dict[str, Any]) -> str:
    """Return the rungs as Markdown."""
    lines = ["| rung | s/step | peak | faster than the first |", "| --- | ---: | ---: | ---: |"]
    first = summary["rows"][next(iter(rungs))]["step_seconds"]
    for name, what in {**rungs, "ours": "… under the ZeRO-3 engine, with its metrics: ours"}.items():
        row = summary["rows"][name]
        lines.append(
            f"| {what} | {row['step_seconds']:.2f} | {row['peak_mib'] + row['baseline_mib']:.0f} MiB "
            f"| {first / row['step_seconds']:.2f}× |"
        )
    return "\n".join(lines)


def plot(mixes: dict[str, dict[str, Any]], title: str, file: Path) -> None:
    """Plot the pairs per second of each contestant on each mix, and the limit that the floor sets."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "prefopt"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(mixes), figsize=(2.6 * len(mixes), 3.2), squeeze=False, layout="constrained")
    colours = {"ours": "#1b7f5c", "ours-small": "#7fc4a8", "ours-packed": "#5b8fc4", "ours-plain": "#9a7fc4"}
    colours |= {"trl-tuned": "#d08c3c", "trl": "#a8443a"}
    for axis, (mix, summary) in zip(axes[0], mixes.items(), strict=True):
        rows = {n: r for n, r in summary["rows"].items() if n in colours}
        bars = axis.bar(
            [NAMES[n].replace(", ", ",\n").replace(" as", "\nas").replace(" tuned", "\ntuned") for n in rows],
            [r["pairs_per_second"] for r in rows.values()],
            color=[colours[n] for n in rows],
        )
        ours = summary["rows"]["ours"]
        speeds = [r["pairs_per_second"] / ours["pairs_per_second"] for r in rows.values()]
        axis.bar_label(bars, labels=[f"{s:.2f}" for s in speeds], fontsize=7)
        limit = ours["pairs_per_second"] / ours["efficiency"]
        axis.axhline(limit, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(mix, fontsize=9)
        axis.tick_params(axis="x", labelsize=6)
        axis.tick_params(axis="y", labelsize=7)
    axes[0][0].set_ylabel("pairs/s (dotted: the floor at matrix speed)", fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
