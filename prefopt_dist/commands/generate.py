"""`generate`: sample n responses to each prompt, reward them, write pairs to RUN/pairs.jsonl; resumes by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from prefopt_dist.config import Config, differing_keys
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import StopRequested, UserError
from prefopt_dist.files import checksum, digest, read_json, write_atomic, write_json
from prefopt_dist.model.folder import ModelFolder
from prefopt_dist.monitoring.console import say
from prefopt_dist.monitoring.statistics import interval_text
from prefopt_dist.rollouts import comparison, pairs
from prefopt_dist.rollouts.prompts import Turn
from prefopt_dist.rollouts.store import AnsweredPrompt
from prefopt_dist.setup import prepare_models, prepare_rollouts
from prefopt_dist.setup.open_run import requests_for, run_folder
from prefopt_dist.setup.rollout_job import RolloutJob
from prefopt_dist.training.stop import Requests

FACTS = "generation.json"
"""File in the run folder: settings that RUN/pairs.jsonl was made with, and counts of all answers"""
KEYS = {
    "engine": "generate.engine",
    "template": "data.template",
    "max_length": "data.max_length",
    "sampling.n": "generate.n",
    "sampling.temperature": "generate.temperature",
    "sampling.top_p": "generate.top_p",
    "sampling.max_new_tokens": "generate.max_new_tokens",
    "sampling.seed": "run.seed, as sampling.seed",  # a round has a seed of its own
    "pairing": "generate.pairing",
    "min_margin": "generate.min_margin",
    "on_bad_reward": "generate.on_bad_reward",
}
"""Keys of the configuration behind the names that RUN/generation.json gives them"""


def run(
    config: Config,
    asked: Requests | None = None,
    *,
    served: bool = False,
    turn: Turn | None = None,
    by: ModelFolder | None = None,
) -> bool:
    """Generate pairs (all ranks call it).

    Args:
        config: the resolved configuration.
        asked: requests to the rounds that this is a part of; None: requests to this run.
        served: whether a training on the pairs is done; they are then only checked by their settings and may be gone.
        turn: the part of the prompts that is answered; None for all.
        by: the model that answers; None for the one that the configuration starts from.

    Returns:
        Whether the pairs are made; False after a request to stop.
    """
    # A run begins with its training: until then all that the pairs do not depend on may change.
    with run_folder(config, begins=False, bare=True) as folder:
        ranks.run_on_rank_zero(folder.clear_earlier_stop)
        requests = asked or requests_for(config)
        models = prepare_models.load_models(config, trains=False)
        generate = config.generate
        job = prepare_rollouts.prepare(
            config,
            models,
            by or models.start,
            config.prompt_sources,
            "data.train" if generate.prompts is None else "generate.prompts",
            n=generate.n,
            temperature=generate.temperature,
            top_p=generate.top_p,
            what="generate",
            turn=turn,
        )
        ranks.run_on_rank_zero(lambda: _refuse_others(config, job, served=served))
        made = ranks.run_on_rank_zero(lambda: _finished_pairs(config))
        if served or made is not None:  # whatever has become of the answers in the cache
            say(made or "generate: the pairs have been trained on")
            return True
        try:
            job.run(lambda: requests.look().stop)
        except StopRequested:
            if ranks.rank() == 0:
                folder.write_stopped(requests.reason(), None, "while generating")
                requests.obeyed()
            say("stopped on request while generating; start again to go on")
            return False
        say(ranks.run_on_rank_zero(lambda: _write_pairs(config, job)))
        if ranks.rank() == 0:
            requests.obeyed()
    return True


def _pairs_fingerprint(job: RolloutJob) -> dict[str, Any]:
    """Return all that decides the pairs."""
    generate = job.config.generate
    return {
        "samples": job.store.folder.name,
        "scores": job.scores,
        "weights": list(job.reward_weights),
        "pairing": generate.pairing,
        "min_margin": generate.min_margin,
        "on_bad_reward": generate.on_bad_reward,
    }


def _sampled_by(job: RolloutJob) -> dict[str, Any]:
    """Return the settings behind the digest of the samples, under flat names."""
    settings = {name: value for name, value in job.store.settings.items() if name not in ("shards", "sampling")}
    return settings | {f"sampling.{name}": value for name, value in job.store.settings["sampling"].items()}


def _by_key(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide the pairs under the keys of the configuration, where they have one."""
    return {KEYS.get(name, name): value for name, value in settings.items()}


def _refuse_others(config: Config, job: RolloutJob, *, served: bool) -> None:
    """Raise UserError where pairs exist that were made with other settings or by a person (rank 0).

    Args:
        config: the resolved configuration.
        job: the rollouts to be made.
        served: whether a training on the pairs is done, so that nothing will be written.
    """
    file, facts = config.pairs_file, config.run_dir / FACTS
    if not facts.exists():
        if file.exists():
            raise UserError(f"generate.pairs: {file} exists and was not made by this run; name another file")
        return
    before = read_json(facts)
    changed = differing_keys(before["made_of"], _pairs_fingerprint(job))
    if changed:
        sampling = differing_keys(_by_key(before.get("sampled_by", {})), _by_key(_sampled_by(job)))
        others = differing_keys(_by_key(before["made_of"]), _by_key(_pairs_fingerprint(job)))
        changed = [*sampling, *(line for line in others if not line.startswith("samples:"))]
        # Without the files of pairs that a model has learnt from, the run would claim settings that it had not.
        remedy = (
            "A training on these pairs is done: set these keys back to go on, or choose another run.dir."
            if served
            else f"Set these keys back to go on, choose another run.dir, or remove {file} and {facts}."
        )
        raise UserError(
            f"generate.pairs: {file} was made with other prompts, weights or settings:\n  "
            + "\n  ".join(changed)
            + f"\n{remedy}"
        )
    if not served and file.exists() and checksum(file) != before["pairs_blake2b"]:
        raise UserError(
            f"generate.pairs: {file} is not as this run wrote it, by the digest in {facts}. To keep it, move it and "
            "name it in data.train; to have the run's own again, remove it."
        )


def has_pairs(folder: Path) -> bool:
    """Return whether a run folder has pairs that its run has made, by their files alone."""
    return (folder / FACTS).exists() and (folder / "pairs.jsonl").exists()


def _finished_pairs(config: Config) -> str | None:
    """Return the summary of pairs that exist as they were written; None where they do not (rank 0)."""
    file = config.run_dir / FACTS
    facts = read_json(file) if file.exists() else None
    if facts is None or not config.pairs_file.exists() or checksum(config.pairs_file) != facts["pairs_blake2b"]:
        return None
    return _text(config, facts)


def _write_pairs(config: Config, job: RolloutJob) -> str:
    """Write the pairs and their facts; return a summary for people (rank 0)."""
    found, generate = job.answered(), config.generate
    rule = pairs.PairingRule(generate.pairing, generate.min_margin, job.reward_weights, config.run.seed)
    about = {"model": job.model_key, "sampling": asdict(job.sampling), "rewards": job.scores}
    tally = pairs.PairCounts()
    make_row = pairs.ranked_row if generate.pairing == "ranked" else pairs.pair_row
    rows = [make_row(one.prompt, answers, about) for one in found for answers in pairs.make_pairs(one, rule, tally)]
    judged = job.judged()
    if not rows:
        by_judge = "" if judged is None else f" Of the judge: {judged.text()}."
        raise UserError(
            f"generate: no pair is left of {len(found)} prompts ({_counts(tally.prompts)}; answers left out: "
            f"{_counts(tally.answers)}). Sample more or wider (generate.n, generate.temperature), let responses end "
            "(generate.max_new_tokens), or lower generate.min_margin." + by_judge
        )
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    pairs_digest = digest(text)
    facts = {
        "pairs": len(rows),
        "prompts": len(found),
        "prompts_without_pair": dict(tally.prompts),
        "answers": {
            "all": sum(len(f.answers) for f in found),
            "left_out": dict(tally.answers),
            "retokenised": tally.retokenised,
        },
        "best_of_n": _best(found, job.reward_weights),
        **comparison.summary(found, job.reward_weights),
        **({} if judged is None else {"judged": judged.as_json()}),
        **({"asked": asked} if (asked := job.store.asked()) else {}),
        "made_of": _pairs_fingerprint(job),
        "sampled_by": _sampled_by(job),
        "pairs_blake2b": pairs_digest,
    }
    # First the facts, which say that the pairs are of this run, then the pairs: after a kill in between the next start
    # writes them.
    write_json(config.run_dir / FACTS, facts)
    if not config.pairs_file.exists() or checksum(config.pairs_file) != pairs_digest:
        write_atomic(config.pairs_file, text)
    return _text(config, facts)


def _best(found: Sequence[AnsweredPrompt], weights: Sequence[float]) -> float:
    """Return the mean over prompts of the best answer's reward."""
    rewards = [comparison.rewards_of(one, weights) for one in found]
    return float(np.mean([np.nanmax(r) for r in rewards if not np.isnan(r).all()]))


def _counts(tally: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(tally.items())) or "none"


def _text(config: Config, facts: dict[str, Any]) -> str:
    reward, answers = facts["reward"], facts["answers"]
    rows = "ranked rows" if config.generate.pairing == "ranked" else "pairs"
    return (
        f"done: {facts['pairs']} {rows} of {facts['prompts']} prompts in {config.pairs_file}\n"
        f"  reward: mean {interval_text(reward)}, best of {config.generate.n} {facts['best_of_n']:.3f}; "
        f"{facts['tokens']:.1f} tokens an answer\n"
        f"  answers left out: {_counts(answers['left_out'])}; prompts without a pair: "
        f"{_counts(facts['prompts_without_pair'])}\n"
        f"  answers in {rows} that training splits into other tokens than were sampled, or whose sampled tokens are "
        f"not known: {answers['retokenised']}"
    )
