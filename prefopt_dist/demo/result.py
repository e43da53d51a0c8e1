"""The result of a demo's run: result.json, and the same as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.demo import parts
from prefopt_dist.demo.reward import score
from prefopt_dist.demo.world import FORMAL_TO
from prefopt_dist.files import read_json
from prefopt_dist.monitoring.metrics_file import MetricsFile
from prefopt_dist.monitoring.statistics import interval, interval_text


def result_of(folder: Path, seed: int, recipe: str) -> dict[str, Any]:
    """Return the content of result.json, from FOLDER/judged and the run's metrics."""
    judged = read_json(parts.judged_file(folder, recipe))
    controls = {rate: read_json(parts.judged_file(folder, parts.control_name(rate))) for rate in parts.CONTROL_RATES}
    best = max(controls, key=lambda rate: float(controls[rate]["policy"]["reward"]["mean"]))
    difference = judged["difference"]
    return {
        "seed": seed,
        "recipe": recipe,
        "reward": {
            "before": judged["against"]["reward"]["mean"],
            "after": judged["policy"]["reward"]["mean"],
            "difference": difference["mean"],
            "low": difference["low"],
            "high": difference["high"],
        },
        "control": controls[best]["policy"]["reward"]["mean"],
        "control_difference": interval(_rewards(judged) - _rewards(controls[best])),
        "control_interval": controls[best]["policy"]["reward"],
        "after_interval": judged["policy"]["reward"],
        "control_rate": best,
        "win_rate": judged["win_rate"]["mean"],
        "kl": judged["kl"]["mean"],
        **_on_pairs(parts.config_of(recipe, folder, seed).run_dir / "metrics.jsonl"),
        "whole": {"before": judged["whole"]["against"], "after": judged["whole"]["policy"]},
        "tokens": {"before": judged["against"]["tokens"], "after": judged["policy"]["tokens"]},
        "unfinished": {"before": judged["against"]["unfinished"], "after": judged["policy"]["unfinished"]},
        "verdict": judged["verdict"],
    }


def _rewards(judged: dict[str, Any]) -> NDArray[np.float64]:
    """Return the true rewards of the trained model's answers: float64 [prompts]."""
    return np.array([score(prompt, text, {}) for prompt, text in judged["texts"]["policy"]])


def _on_pairs(metrics: Path) -> dict[str, float | None]:
    """Return accuracy and margin on the pairs of held-out prompts; None each where the run did not evaluate on them."""
    rows = [row for row in MetricsFile(metrics).rows() if row["kind"] == "eval"] if metrics.exists() else []
    last = rows[-1] if rows else {}
    return {"accuracy": last.get("eval/rewards/accuracies"), "margin": last.get("eval/rewards/margins")}


def text(found: dict[str, Any], folder: Path, seconds: float) -> str:
    """Return the result as text: reward, control, other measures, and answers to two prompts before and after.

    Args:
        found: content of result.json.
        folder: the demo's folder.
        seconds: how long this call took.
    """
    judged = read_json(parts.judged_file(folder, found["recipe"]))
    reward, whole = found["reward"], found["whole"]
    lines = [
        "",
        f"demo: {found['verdict']}, in {seconds:.0f} s. Answers to {judged['prompts']} prompts that are in no "
        "training data, before (SFT) → after:",
        f"  true reward, 0 to 1:     {reward['before']:.3f} → {reward['after']:.3f}, difference "
        f"{interval_text(judged['difference'])}, 95 % interval by prompt",
        f"  control:                 {found['control']:.3f} after SFT on the same chosen answers only, with as many "
        f"steps, the best of {len(parts.CONTROL_RATES)} learning rates",
        f"  wins against before:     {found['win_rate']:.1%}, at {found['kl']:.1f} nats of KL an answer",
        f"  whole letters:           {whole['before']:.1%} → {whole['after']:.1%}",
    ]
    if found["accuracy"] is not None:
        lines += [
            f"  reward accuracy:         {found['accuracy']:.1%} of held-out pairs, whose labels are noisy",
            f"  reward margin:           {found['margin']:.2f}",
        ]
    for prompt, before, after in _examples(judged):
        lines += ["", f"  {prompt}"]
        for when, answer in (("before", before), ("after", after)):
            lines.append(f"    {when + ':':8}{answer}  [{score(prompt, answer, {}):.2f}]")
    run = parts.config_of(found["recipe"], folder, found["seed"]).run_dir
    lines += [
        "",
        f"  models: {folder / 'sft' / 'final'} and {parts.model_of(found['recipe'], folder)} (Hugging Face folders)",
        f"  pairs:  {folder / 'pairs' / 'train.jsonl'};  every answer: {parts.judged_file(folder, found['recipe'])}",
        f"  run:    {run} (metrics.jsonl, run.json);  this result: {folder / 'result.json'}",
    ]
    return "\n".join(lines)


def _examples(judged: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the first prompt of each tone (formal, casual) with the answers before and after."""
    found: dict[bool, tuple[str, str, str]] = {}
    for (prompt, after), (_, before) in zip(judged["texts"]["policy"], judged["texts"]["against"], strict=True):
        found.setdefault(any(f" my {to} " in prompt for to in FORMAL_TO), (prompt, before, after))
    return [found[key] for key in (True, False) if key in found]
