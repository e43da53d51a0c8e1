"""The rewards of the section generate: check them, name their scores by what the values depend on, and load them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefopt_dist.config import Config, Generate, Judge, RewardServer, RewardSource
from prefopt_dist.data.prepare import tokenizer_content
from prefopt_dist.data.template import Template
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import AgreedUserError, UserError
from prefopt_dist.files import digest, json_digest
from prefopt_dist.monitoring.console import say
from prefopt_dist.rollouts.judge import WORDS, JudgeReward, JudgeSettings
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.reward_server import (
    KNOWN,
    KeptRewards,
    RewardServerSettings,
    RewardWay,
    ServedReward,
    check_reward_server,
    found_of_known,
    tolerance_of,
)
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

Part = RewardFolder | RewardServerSettings | JudgeSettings | Callable[..., Any]
"""A checked reward: a model's folder, its server, a judge, or a function"""


@dataclass(frozen=True)
class ConfiguredRewards:
    """The rewards of a configuration; there may be none."""

    config: Config
    rewards: list[tuple[str, Part]]
    """Each reward with its dotted key"""
    scores: str | None
    """Name of their scores in a store of samples; None without rewards"""
    identities: list[dict[str, Any]]
    """What the values of each depend on"""

    @property
    def weights(self) -> tuple[float, ...]:
        """Return the weight of each reward in the mean."""
        return tuple(source.weight for source in self.config.generate.rewards)

    def open(self, template: Template, folder: Path) -> list[Reward]:
        """Check the rewards' servers and load the rewards, unsharded on each rank (all ranks call it).

        Args:
            template: chat template of the trained model.
            folder: of the store of samples, which keeps the rewards that servers give.
        """
        # By one rank: two that find different ways would ask differently for the same reward.
        ways = ranks.run_on_rank_zero(lambda: self._ways(template))
        return ranks.run_on_all_ranks(lambda: self._loaded(template, folder, ways))

    def _ways(self, template: Template) -> dict[int, RewardWay]:
        """Return by the number of each reward that a server computes how it is to be asked (rank 0)."""
        return {
            number: self._way(part, template)
            for number, (_, part) in enumerate(self.rewards)
            if isinstance(part, RewardServerSettings)
        }

    def _loaded(self, template: Template, folder: Path, ways: Mapping[int, RewardWay]) -> list[Reward]:
        found: list[Reward] = []
        for number, (_, part) in enumerate(self.rewards):
            if isinstance(part, RewardFolder):
                found.append(self._classifier(part, template))
            elif isinstance(part, RewardServerSettings):
                kept = KeptRewards(folder, json_digest(self.identities[number])[:16], ranks.rank())
                mine = replace(part, in_flight=max(1, part.in_flight // ranks.world_size()))
                found.append(ServedReward(mine, ways[number], template, kept))
            elif isinstance(part, JudgeSettings):
                found.append(JudgeReward(part))
            else:
                found.append(FunctionReward(part))
        return found

    def _classifier(self, part: RewardFolder, template: Template) -> ClassifierReward:
        return ClassifierReward(
            part,
            template=template,
            dtype=DTYPES[self.config.model.dtype],
            device=ranks.device(),
            batch_tokens=self.config.generate.batch_tokens,
        )

    def _way(self, part: RewardServerSettings, template: Template) -> RewardWay:
        expected = None
        if part.folder.model is not None:
            own = self._classifier(part.folder, template)
            expected = found_of_known(own.score(KNOWN), part.name)
            own.close()
        way = check_reward_server(part, template, expected, tolerance_of(DTYPES[self.config.model.dtype]))
        beside = "" if expected is None else f", as the model in {part.folder.path} does"
        say(f"{part.name}: {part.url} gives rewards at {way.path} with {way.form}{beside}")
        return way

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
    _refuse_other_folders([part.folder for _, part in rewards if isinstance(part, RewardServerSettings)])
    identities = [
        _identity(config, models, source, part)
        for (_, part), source in zip(rewards, config.generate.rewards, strict=True)
    ]
    return ConfiguredRewards(config, rewards, scores_name(identities) if identities else None, identities)


def _refuse_other_folders(folders: Sequence[RewardFolder]) -> None:
    """Raise AgreedUserError where a folder has weights on some nodes alone (all ranks call it).

    All ranks hash the weights together, so a rank without them would leave the others waiting.
    """
    have = ranks.all_gather([folder.model is not None for folder in folders])
    for folder, of_ranks in zip(folders, zip(*have, strict=True), strict=True):
        if len(set(of_ranks)) > 1:
            raise AgreedUserError(
                f"{folder.key}: {folder.path} has weights on rank {of_ranks.index(True)} but none on rank "
                f"{of_ranks.index(False)}, must be the same folder on all nodes; put it on a shared disk, or copy it"
            )


def _keys(config: Config) -> list[tuple[str, RewardSource]]:
    def kind(source: RewardSource) -> str:
        return next(name for name in ("function", "model", "server", "judge") if getattr(source, name) is not None)

    return [(f"generate.rewards[{i}].{kind(s)}", s) for i, s in enumerate(config.generate.rewards)]


def _checked(source: RewardSource, key: str, config: Config) -> Part:
    if source.function is not None:
        return find_function(source.function, key)
    if source.judge is not None:
        return _checked_judge(source.judge, key, config.generate)
    if source.server is not None:
        return _checked_server(source.server, key, config.generate)
    assert source.model is not None
    return inspect_reward(source.model, key)


def _checked_server(server: RewardServer, key: str, generate: Generate) -> RewardServerSettings:
    refuse_address(server.url, f"{key}.url")
    return RewardServerSettings(
        url=server.url,
        model=server.model,
        folder=inspect_reward(server.folder, f"{key}.folder", served=True),
        key=secret_of(server.key_variable, f"{key}.key_variable"),
        in_flight=generate.requests_in_flight,
        request_seconds=generate.request_seconds,
        name=f"{key}.url",
    )


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
    if isinstance(part, RewardServerSettings) and part.folder.model is None:
        return {"served": part.model, "tokenizer": digest(tokenizer_content(part.folder.tokenizer))}
    folder = part.folder if isinstance(part, RewardServerSettings) else part
    if not isinstance(folder, RewardFolder):
        assert source.function is not None
        return dict(ranks.run_on_rank_zero(lambda: function_identity(str(source.function))))
    assert folder.model is not None
    hashed = hash_weights(folder.model, models.dtype, config.cache_dir)
    text = digest(tokenizer_content(folder.tokenizer))
    of_folder = {"model": hashed.key, "tokenizer": text, "pad": folder.model.config.pad_token_id}
    # A server computes within rounding alone what the folder's model does here.
    return of_folder | ({"served": True} if isinstance(part, RewardServerSettings) else {})
