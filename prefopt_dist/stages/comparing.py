"""What `evaluate` and `rounds` share: two models that answer the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.config import Config
from prefopt_dist.data.micro_batch import Unit
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.generation import comparison
from prefopt_dist.generation.likelihood import answer_sums, units_of
from prefopt_dist.generation.store import Answered
from prefopt_dist.model.load import ModelFolder, load_sharded
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.stages import answering, ingredients
from prefopt_dist.stages.ingredients import Models


def compare(
    config: Config,
    models: Models,
    policy: ModelFolder,
    against: ModelFolder,
    reference: ModelFolder,
    *,
    start: ModelFolder | None = None,
    stop_asked: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """All ranks: both models answer evaluate.prompts; rewards, wins, and the policy's KL from the live reference.

    start: one more model that the policy is compared with, as `from_start`.
    Raises StoppedInFirstPass where a stop was asked; what was answered is kept.
    """
    evaluate = config.evaluate
    assert evaluate.prompts is not None
    asked = {"policy": policy, "against": against} | ({} if start is None else {"start": start})
    found: dict[Path, list[Answered]] = {}
    for what, model in asked.items():
        if model.path in found:
            continue
        job = answering.prepare(
            config,
            models,
            model,
            evaluate.prompts,
            "evaluate.prompts",
            n=evaluate.samples,
            temperature=evaluate.temperature,
            top_p=1.0,  # all tokens, as the KL is over all of them
            what=what,
            own_draws=True,
        )
        job.run(stop_asked)
        found[model.path] = ranks.together(job.answered)
    mine, theirs = found[policy.path], found[against.path]
    units = units_of(mine)
    sums = [_sums(config, models, model, units) for model in (policy, reference)]
    compared = {
        "prompts": len(mine),
        "samples": evaluate.samples,
        "temperature": evaluate.temperature,
        "policy": comparison.summary(mine, job.reward_weights),
        "against": comparison.summary(theirs, job.reward_weights),
        **comparison.compared(mine, theirs, job.reward_weights),
        "kl": comparison.kl(mine, *sums),
    }
    if start is not None:
        compared["from_start"] = comparison.compared(mine, found[start.path], job.reward_weights)
    return compared


def _sums(config: Config, models: Models, model: ModelFolder, units: Sequence[Unit]) -> NDArray[np.float64]:
    settings = ingredients.reference_settings(config, models)
    engine = zero3.reference_engine(Scorer(load_sharded(model, dtype=models.dtype, settings=settings)), settings)
    try:
        return answer_sums(engine, units, config.reference_micro_batch_tokens, "log-probs of answers")
    finally:
        zero3.release(engine)
        del engine


def compared_text(found: dict[str, Any], policy: str, against: str) -> str:
    """What `compare` found, for people."""
    lines = [f"answers to {found['prompts']} prompts, intervals of 95 %:"]
    for name, what in ((policy, "policy"), (against, "against")):
        one = found[what]
        lines.append(f"  {name}: reward {comparison.shown(one['reward'])}, {one['tokens']:.1f} tokens an answer")
    lines += [
        f"  win rate {comparison.shown(found['win_rate'])}, difference of rewards "
        f"{comparison.shown(found['difference'])}",
        f"  KL from the reference on the policy's answers {comparison.shown(found['kl'])}",
    ]
    return "\n".join(lines)
