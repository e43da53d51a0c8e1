"""The rewards of the section generate: check them, name their scores by what the values depend on, and load them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt_dist.config import Config, Generate, Judge, RewardSource
from prefopt_dist.data.prepare import tokenizer_content
from prefopt_dist.data.template import Template
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import UserError
from prefopt_dist.files import digest
from prefopt_dist.rollouts.judge import WORDS, JudgeReward, JudgeSettings
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.rewards import (
    ClassifierReward,
    FunctionReward,
    Reward,
    RewardFailure,
    RewardFolder,
    find_function,
    function_identity,
    inspect_reward,
)
from prefopt_dist.rollouts.store import Scores, scores_name
from prefopt_dist.setup.addresses import refuse_address, secret_of
from prefopt_dist.setup.prepare_models import DTYPES, Models
from prefopt_dist.setup.prepare_reference import hash_weights

Part = RewardFolder | JudgeSettings | Callable[..., Any]
"""A checked reward: a model's folder, a judge, or a function"""


@dataclass(frozen=True)
class ConfiguredRewards:
    """The rewards of a configuration; there may be none."""

    config: Config
    rewards: list[tuple[str, Part]]
    """Each reward with its dotted key"""
    scores: str | None
    """Name of their scores in a store of samples; None without rewards"""

    @property
    def weights(self) -> tuple[float, ...]:
        """Return the weight of each reward in the mean."""
        return tuple(source.weight for source in self.config.generate.rewards)

    def open(self, template: Template) -> list[Reward]:
        """Load the rewards, unsharded on each rank."""
        dtype = DTYPES[self.config.model.dtype]
        found: list[Reward] = []
        for _, part in self.rewards:
            if isinstance(part, RewardFolder):
                found.append(
                    ClassifierReward(
                        part,
                        template=template,
                        dtype=dtype,
                        device=ranks.device(),
                        batch_tokens=self.config.generate.batch_tokens,
                    )
                )
            elif isinstance(part, JudgeSettings):
                found.append(JudgeReward(part))
            else:
                found.append(FunctionReward(part))
        return found

    def to_scores(self, prompt: Prompt, number: int, values: Sequence[float | RewardFailure]) -> Scores:
        """Return one response's values as a store keeps them, with the reason in place of a failed value.

        Args:
            prompt: the prompt.
            number: of the response.
            values: of each reward.

        Raises:
            UserError: a reward failed, under on_bad_reward=stop.
        """
        scores: Scores = [v.reason if isinstance(v, RewardFailure) else v for v in values]
        self.refuse_failures(prompt, number, scores)
        return scores

    def refuse_failures(self, prompt: Prompt, number: int, scores: Scores) -> None:
        """Raise UserError for a failed reward of response `number`, under on_bad_reward=stop."""
        if self.config.generate.on_bad_reward != "stop":
            return
        for (key, _), value in zip(self.rewards, scores, strict=True):
            if isinstance(value, str):
                raise UserError(
                    f"{key}: for response {number} to the prompt at {prompt.origin} the reward {value}. "
                    "Correct the reward, or leave such responses out with generate.on_bad_reward=drop."
                )


def check_rewards(config: Config) -> None:
    """Raise UserError for a reward that cannot be used; one process calls it, and no weights are loaded."""
    for key, source in _keys(config):
        _checked(source, key, config)


def configured_rewards(config: Config, models: Models) -> ConfiguredRewards:
    """Check the rewards and hash what their values depend on (all ranks call it)."""
    rewards = ranks.run_on_all_ranks(lambda: [(k, _checked(source, k, config)) for k, source in _keys(config)])
    identities = [
        _identity(config, models, source, part)
        for (_, part), source in zip(rewards, config.generate.rewards, strict=True)
    ]
    return ConfiguredRewards(config, rewards, scores_name(identities) if identities else None)


def _keys(config: Config) -> list[tuple[str, RewardSource]]:
    def kind(source: RewardSource) -> str:
        return next(name for name in ("function", "model", "judge") if getattr(source, name) is not None)

    return [(f"generate.rewards[{i}].{kind(s)}", s) for i, s in enumerate(config.generate.rewards)]


def _checked(source: RewardSource, key: str, config: Config) -> Part:
    if source.function is not None:
        return find_function(source.function, key)
    if source.judge is not None:
        return _checked_judge(source.judge, key, config.generate)
    assert source.model is not None
    return inspect_reward(source.model, key)


def _checked_judge(judge: Judge, key: str, generate: Generate) -> JudgeSettings:
    refuse_address(judge.server, f"{key}.server")
    file = Path(judge.prompt)
    try:
        question = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{key}.prompt: {file} cannot be read ({e}); name a text file") from e
    missing = [word for word in WORDS if word not in question]
    if missing:
        raise UserError(
            f"{key}.prompt: {file} lacks {', '.join(missing)}, must have {', '.join(WORDS)}, in whose places the "
            "prompt and the answers are written; add them"
        )
    return JudgeSettings(
        url=judge.server,
        model=judge.model,
        question=question,
        max_tokens=judge.max_tokens,
        key=secret_of(judge.key_variable, f"{key}.key_variable"),
        in_flight=generate.requests_in_flight,
        request_seconds=generate.request_seconds,
        name=f"{key}.server",
    )


def _identity(config: Config, models: Models, source: RewardSource, part: Part) -> dict[str, Any]:
    """Return what a reward's values depend on (all ranks call it)."""
    if isinstance(part, JudgeSettings):
        return {"judge": part.model, "question": digest(part.question), "max_tokens": part.max_tokens}
    if not isinstance(part, RewardFolder):
        assert source.function is not None
        return dict(ranks.run_on_rank_zero(lambda: function_identity(str(source.function))))
    hashed = hash_weights(part.model, models.dtype, config.cache_dir)
    text = digest(tokenizer_content(part.tokenizer))
    return {"model": hashed.key, "tokenizer": text, "pad": part.model.config.pad_token_id}
