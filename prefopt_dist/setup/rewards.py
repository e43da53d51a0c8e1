"""The rewards of the section generate: check them, name their scores by what the values depend on, and load them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt_dist.config import Config, RewardSource
from prefopt_dist.data.prepare import tokenizer_content
from prefopt_dist.data.template import Template
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import UserError
from prefopt_dist.files import digest
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
from prefopt_dist.setup.prepare_models import DTYPES, Models
from prefopt_dist.setup.prepare_reference import hash_weights


@dataclass(frozen=True)
class ConfiguredRewards:
    """The rewards of a configuration; there may be none."""

    config: Config
    rewards: list[tuple[str, RewardFolder | Callable[..., Any]]]
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
        _checked(source, key)


def configured_rewards(config: Config, models: Models) -> ConfiguredRewards:
    """Check the rewards and hash what their values depend on (all ranks call it)."""
    rewards = ranks.run_on_all_ranks(lambda: [(k, _checked(source, k)) for k, source in _keys(config)])
    identities = [
        _identity(config, models, source, part)
        for (_, part), source in zip(rewards, config.generate.rewards, strict=True)
    ]
    return ConfiguredRewards(config, rewards, scores_name(identities) if identities else None)


def _keys(config: Config) -> list[tuple[str, RewardSource]]:
    return [
        (f"generate.rewards[{i}].{'function' if s.model is None else 'model'}", s)
        for i, s in enumerate(config.generate.rewards)
    ]


def _checked(source: RewardSource, key: str) -> RewardFolder | Callable[..., Any]:
    if source.function is not None:
        return find_function(source.function, key)
    assert source.model is not None
    return inspect_reward(source.model, key)


def _identity(
    config: Config, models: Models, source: RewardSource, part: RewardFolder | Callable[..., Any]
) -> dict[str, Any]:
    """Return what a reward's values depend on (all ranks call it)."""
    if not isinstance(part, RewardFolder):
        assert source.function is not None
        return dict(ranks.run_on_rank_zero(lambda: function_identity(str(source.function))))
    hashed = hash_weights(part.model, models.dtype, config.cache_dir)
    text = digest(tokenizer_content(part.tokenizer))
    return {"model": hashed.key, "tokenizer": text, "pad": part.model.config.pad_token_id}
