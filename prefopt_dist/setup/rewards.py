"""The rewards of the section generate: checked, known by what their numbers depend on, and asked shard by shard."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt_dist.config import Config, RewardSource
from prefopt_dist.data.prepare import tokenizer_content
from prefopt_dist.data.template import Template
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import UserError
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
    """With their dotted keys"""
    scores: str | None
    """Names their scores in a store of samples; None where there is no reward"""

    @property
    def weights(self) -> tuple[float, ...]:
        """Return each reward's weight in the mean."""
        return tuple(source.weight for source in self.config.generate.rewards)

    def open(self, template: Template) -> list[Reward]:
        """Load the rewards, one whole copy a rank."""
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

    def told(self, prompt: Prompt, number: int, values: Sequence[float | RewardFailure]) -> Scores:
        """Return numbers, and texts for what is none; under on_bad_reward=stop such a text ends the job."""
        told: Scores = [v.reason if isinstance(v, RewardFailure) else v for v in values]
        self.refuse_bad(prompt, number, told)
        return told

    def refuse_bad(self, prompt: Prompt, number: int, said: Scores) -> None:
        """Raise UserError for a reward of response `number` that is no number, under on_bad_reward=stop."""
        if self.config.generate.on_bad_reward != "stop":
            return
        for (key, _), value in zip(self.rewards, said, strict=True):
            if isinstance(value, str):
                raise UserError(
                    f"{key}: for response {number} to the prompt at {prompt.origin} the reward {value}. "
                    "Mend the reward, or leave such responses out with generate.on_bad_reward=drop."
                )


def check_rewards(config: Config) -> None:
    """Raise UserError for a reward that cannot be asked; one process, without weights."""
    for key, source in _keys(config):
        _checked(source, key)


def configured_rewards(config: Config, models: Models) -> ConfiguredRewards:
    """All ranks: check the rewards and hash what their numbers depend on."""
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
    """All ranks: what a reward's numbers depend on."""
    if not isinstance(part, RewardFolder):
        assert source.function is not None
        return dict(ranks.run_on_rank_zero(lambda: function_identity(str(source.function))))
    held = hash_weights(part.model, models.dtype, config.cache_dir)
    text = hashlib.blake2b(tokenizer_content(part.tokenizer), digest_size=16).hexdigest()
    return {"model": held.key, "tokenizer": text, "pad": part.model.config.pad_token_id}
