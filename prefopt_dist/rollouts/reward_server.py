"""A reward model behind a server: how it is asked is found by asking, and each reward is kept as soon as it is there.

The text is written here by the reward model's own chat template, so that a server scores what a local copy would.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from prefopt_dist.data.template import Template
from prefopt_dist.errors import UserError, shorten
from prefopt_dist.files import json_digest
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.rollouts import server_pool
from prefopt_dist.rollouts.kept_lines import append_line, read_lines
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.rewards import RewardFailure, RewardFolder, finite_or_failure, scored_ids
from prefopt_dist.rollouts.sampling import Ids
from prefopt_dist.rollouts.server_client import Hangs
from prefopt_dist.rollouts.server_pool import ServerPool
from prefopt_dist.rollouts.server_protocol import ServerFault, ServerLost, ServerRefuses, text_of

T = TypeVar("T")
Form = Literal["ids", "text"]
WAYS: tuple[tuple[str, Form], ...] = (
    ("/classify", "ids"),
    ("/pooling", "ids"),
    ("/classify", "text"),
    ("/pooling", "text"),
)
"""Paths at a server and forms of what is scored, from the most exact to the plainest"""
QUESTION = Prompt(0, "the check", "What is two and two?", None, {}, [])
KNOWN = [(QUESTION, "Two and two make four."), (QUESTION, "I do not like to count, so ask somebody else.")]
"""Two answers whose rewards are compared before the first one"""


@dataclass(frozen=True)
class RewardServerSettings:
    """Which server is asked for rewards, and how."""

    url: str
    model: str
    """Name of the model at the server"""
    folder: RewardFolder
    """Its tokenizer and chat template, and where `model` is not None its weights"""
    key: str | None
    """Secret that is sent to the server"""
    in_flight: int
    request_seconds: float
    name: str
    """Dotted key, for messages"""

    def pool(self) -> ServerPool:
        """Open a client, within a running event loop."""
        return ServerPool(
            [self.url],
            key=self.key,
            in_flight=self.in_flight,
            request_seconds=self.request_seconds,
            name=self.name,
        )

    def body(self, ids: Ids, form: Form) -> dict[str, Any] | None:
        """Return the JSON that asks for one reward; None where no text is split into these ids."""
        asked = ids if form == "ids" else text_of(ids, self.folder.tokenizer)
        if asked is None:
            return None
        # The reward is the model's own output, without the sigmoid that these paths apply by default.
        return {"model": self.model, "input": asked, "use_activation": False}


def read_reward(content: Any, tokens: int) -> float:
    """Return the reward in a server's reply; it may be NaN.

    Args:
        content: the JSON of the reply.
        tokens: number of tokens that were sent.

    Raises:
        ServerLost: the reply makes no sense.
    """
    rows = content.get("data") if isinstance(content, dict) else None
    row = rows[0] if isinstance(rows, list) and len(rows) == 1 and isinstance(rows[0], dict) else {}
    values = row.get("probs", row.get("data"))
    if not isinstance(values, list) or not all(isinstance(v, float | int) and not isinstance(v, bool) for v in values):
        raise ServerLost(f"its reply has no reward: {shorten(str(content))}")
    if len(values) != 1:
        raise ServerLost(f"it gave {len(values)} numbers, must give one, the reward: {shorten(str(content))}")
    usage = content.get("usage")
    read = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if isinstance(read, int) and read != tokens:
        raise ServerLost(f"it read {read} tokens where {tokens} were sent; its tokenizer splits the text otherwise")
    return float(values[0])


@dataclass(frozen=True)
class RewardWay:
    """How a server is to be asked for rewards, as the check found it."""

    path: str
    form: Form


def check_reward_server(
    settings: RewardServerSettings, template: Template, expected: Sequence[float] | None, tolerance: float
) -> RewardWay:
    """Ask for two known rewards, alone and together, and return how the server is to be asked.

    Args:
        settings: of the server.
        template: chat template of the trained model.
        expected: what the model's folder gives for `KNOWN`; None where it has no weights.
        tolerance: largest difference, as a share of a reward, or of 1 where that is larger.

    Raises:
        UserError: the server holds another model or none that gives rewards, or does not repeat itself.
    """
    known = found_of_known([scored_ids(settings.folder, template, *one) for one in KNOWN], settings.name)

    async def ask(pool: ServerPool, way: RewardWay, ids: Ids) -> float:
        body = settings.body(ids, way.form)
        if body is None:
            raise ServerLost("it takes text alone, and no text is split into the tokens of the chat template")
        for rest in (*server_pool.RESTS, None):
            try:
                return read_reward(await pool.client.post(pool.servers[0].url + way.path, body), len(ids))
            except ServerFault as e:
                heartbeat.beat("waiting for the server of a reward")
                if rest is None:
                    raise UserError(f"{settings.name}: {settings.url}: {e}; start or repair it") from e
                await asyncio.sleep(rest)
        raise AssertionError

    async def check() -> RewardWay:
        async with settings.pool() as pool:
            refused = []
            for path, form in WAYS:
                way = RewardWay(path, form)
                try:
                    alone = [await ask(pool, way, ids) for ids in known]
                    together = await asyncio.gather(*(ask(pool, way, ids) for ids in [*known, *known]))
                except Hangs as e:
                    raise UserError(f"{settings.name}: {settings.url}: {e}; repair it") from e
                except ServerLost as e:
                    refused.append(f"{path} with {form}: {e}")
                    continue
                _refuse_rewards(settings, alone, together, expected, tolerance)
                return way
            raise UserError(
                f"{settings.name}: {settings.url} gives no rewards:\n  "
                + "\n  ".join(refused)
                + "\nServe a sequence classifier with one output, as vLLM does with --runner pooling."
            )

    return asyncio.run(check())


def _refuse_rewards(
    settings: RewardServerSettings,
    alone: Sequence[float],
    together: Sequence[float],
    expected: Sequence[float] | None,
    tolerance: float,
) -> None:
    """Raise UserError where these are not the rewards of one model, or not of the one expected."""

    def differ(a: Sequence[float], b: Sequence[float]) -> bool:
        # Not a > comparison, which is false of NaN.
        return not all(abs(x - y) <= tolerance * max(1.0, abs(y)) for x, y in zip(a, b, strict=True))

    where = f"{settings.name}: {settings.url}"
    if expected is not None and differ(alone, expected):
        raise UserError(
            f"{where} gives the rewards {_text(alone)} to two known answers, and the model in {settings.folder.path} "
            f"gives {_text(expected)} (tolerance {tolerance:g} of a reward); serve that model, or name its folder"
        )
    if differ(together, [*alone, *alone]):
        raise UserError(
            f"{where} does not repeat itself: it gave {_text(alone)} to two answers alone and {_text(together)} to "
            "the same ones together, so a restart would make other pairs; ask another server"
        )
    if alone[0] == alone[1]:
        raise UserError(
            f"{where} gives the same reward, {_text(alone[:1])}, to two different answers, so it cannot rank any; "
            "serve a reward model with one output, without a softmax over it"
        )


def _text(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.5g}" for value in values)


class KeptRewards:
    """A server's rewards in a store, by digests of what was scored; each rank appends to a file of its own."""

    def __init__(self, folder: Path, name: str, rank: int) -> None:
        """Read what all ranks of earlier starts have kept.

        Args:
            folder: of the store.
            name: of the reward, a digest of what it depends on.
            rank: of this process.
        """
        self._file = folder / f"rewards-{name}-{rank}.jsonl"
        self.values: dict[str, float] = {}
        for file in {self._file, *folder.glob(f"rewards-{name}-*.jsonl")}:
            self.values |= dict(read_lines(file))

    def add(self, key: str, value: float) -> None:
        """Keep a reward; it is in the hands of the operating system when this returns."""
        self.values[key] = value
        append_line(self._file, [key, value])


class ServedReward:
    """A reward that a server computes."""

    def __init__(self, settings: RewardServerSettings, way: RewardWay, template: Template, kept: KeptRewards) -> None:
        self._settings, self._way, self._template, self._kept = settings, way, template, kept

    def score(self, responses: Sequence[tuple[Prompt, str]]) -> list[float | RewardFailure]:
        """Score as in `Reward`; a sequence that was scored before is not asked for."""
        lines = [scored_ids(self._settings.folder, self._template, *one) for one in responses]
        asked = {json_digest(ids): ids for ids in lines if not isinstance(ids, RewardFailure)}
        missing = {key: ids for key, ids in asked.items() if key not in self._kept.values}
        failed = asyncio.run(self._ask(missing)) if missing else {}

        def found(ids: Ids) -> float | RewardFailure:
            key = json_digest(ids)
            return failed.get(key) or finite_or_failure(self._kept.values[key])

        return [ids if isinstance(ids, RewardFailure) else found(ids) for ids in lines]

    async def _ask(self, missing: Mapping[str, Ids]) -> dict[str, RewardFailure]:
        """Ask for these rewards and keep them; return those that cannot be asked for."""
        settings, way = self._settings, self._way
        failed: dict[str, RewardFailure] = {}
        async with settings.pool() as pool:
            slots = asyncio.Semaphore(settings.in_flight)

            async def one(key: str, ids: Ids) -> None:
                body = settings.body(ids, way.form)
                if body is None:
                    failed[key] = RewardFailure("cannot be asked for as text, which would be split into other tokens")
                    return
                try:
                    async with slots:
                        value = await pool.ask_any(
                            lambda server: pool.ask_json(server, way.path, body, lambda c: read_reward(c, len(ids)))
                        )
                except ServerRefuses as e:  # such as one that is too long
                    failed[key] = RewardFailure(f"is refused ({e})")
                    return
                heartbeat.beat("waiting for rewards")
                self._kept.add(key, value)

            await asyncio.gather(*(one(key, ids) for key, ids in missing.items()))
        return failed

    def close(self) -> None:
        """Do nothing: a server's memory is elsewhere."""


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the largest difference that rounding in a dtype may cause, as a share of a reward."""
    return 1e-3 if dtype == torch.float32 else 5e-2


def found_of_known(found: Sequence[T | RewardFailure], name: str) -> list[T]:
    """Return what was found for each of `KNOWN`; raise UserError where one of them has no reward.

    Args:
        found: what was found for each, or why it has no reward.
        name: dotted key, for the message.
    """
    for (_, response), one in zip(KNOWN, found, strict=True):
        if isinstance(one, RewardFailure):
            raise UserError(f"{name}: the reward of the known answer {response!r} {one.reason}")
    return [one for one in found if not isinstance(one, RewardFailure)]
