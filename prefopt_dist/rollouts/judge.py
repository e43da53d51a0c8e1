"""A judge: a model behind a server that is asked which of two answers to a prompt is better, in both orders.

Models that judge tend to prefer the answer that they see first, or second. So each two answers are shown in both
orders, and one of them wins only where both replies say so; otherwise they tie.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from typing import Any, Literal, get_args

from prefopt_dist.errors import shorten
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.rewards import RewardFailure
from prefopt_dist.rollouts.server_pool import ServerPool
from prefopt_dist.rollouts.server_protocol import ServerFault, ServerLost, ServerRefuses

Verdict = Literal["first", "second", "tie"]
WORDS = ("{prompt}", "{first}", "{second}")
"""What the text of the question must have."""


@dataclass(frozen=True)
class JudgeSettings:
    """Which judge is asked, and how."""

    url: str
    model: str
    """Name of the model at the server"""
    question: str
    """Text with the words of `WORDS`"""
    max_tokens: int
    key: str | None
    """Secret that is sent to the server"""
    in_flight: int
    request_seconds: float
    name: str
    """Dotted key, for messages"""


@dataclass
class JudgeCounts:
    """What a judge was asked and how it answered."""

    comparisons: int = 0
    """Pairs of different answers, each asked in both orders"""
    ties: int = 0
    orders_disagree: int = 0
    """Ties in which each order found another answer better"""
    first: int = 0
    """Replies for the answer that was shown first"""
    second: int = 0
    unreadable: int = 0
    """Replies without a verdict, which count as ties"""
    tokens: int = 0
    """Tokens that the server read and wrote, where it says so"""

    def __add__(self, other: JudgeCounts) -> JudgeCounts:
        """Return the sums."""
        return JudgeCounts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def as_json(self) -> dict[str, int]:
        """Return the counts as JSON values."""
        return asdict(self)

    def text(self) -> str:
        """Return the counts for people."""
        said = (
            f"the judge compared {self.comparisons} pairs of answers in both orders: {self.ties} ties, in "
            f"{self.orders_disagree} of which its orders disagreed; of {2 * self.comparisons} replies {self.first} "
            f"were for the answer shown first, {self.second} for the second, {self.unreadable} unreadable; "
            f"{self.tokens} tokens"
        )
        if self.comparisons and self.unreadable == 2 * self.comparisons:
            said += ". No reply ends with a verdict: see what its prompt asks for, or raise max_tokens"
        elif self.comparisons and self.ties == self.comparisons:
            said += ". All are ties, so the judge decides nothing"
            if self.orders_disagree == self.ties:
                place = "first" if self.first else "second"
                said += f": it takes whatever is shown {place}. Change its prompt, or ask another judge"
        return said


def read_verdict(text: str) -> Verdict | None:
    """Return the verdict in the last line that is not empty; None where it is not `first`, `second` or `tie`."""
    lines = [line for line in text.splitlines() if line.strip()]
    words = re.findall(r"[a-z]+", lines[-1].lower()) if lines else []
    found = {word for word in words if word in ("first", "second", "tie")}
    if found == {"first"}:
        return "first"
    if found == {"second"}:
        return "second"
    return "tie" if found == {"tie"} else None


def ask_text(question: str, prompt: Prompt, first: str, second: str) -> str:
    """Return the question about two answers; braces within prompt and answers stay as they are."""
    text = prompt.prompt if isinstance(prompt.prompt, str) else "\n\n".join(_turn_text(turn) for turn in prompt.prompt)
    if prompt.tools:
        text = f"tools: {json.dumps(prompt.tools, ensure_ascii=False)}\n\n{text}"
    parts = dict(zip(WORDS, (text, first, second), strict=True))
    return re.sub("|".join(map(re.escape, WORDS)), lambda found: parts[found.group()], question)


def _turn_text(turn: dict[str, Any]) -> str:
    """Return one turn of a prompt; of one that calls tools, the calls."""
    parts = [turn.get("content"), *(json.dumps(call, ensure_ascii=False) for call in turn.get("tool_calls") or ())]
    return f"{turn['role']}: " + "\n".join(str(part) for part in parts if part)


class JudgeReward:
    """A reward that is the share of the other answers to a prompt that an answer beats; a tie counts half."""

    def __init__(self, settings: JudgeSettings) -> None:
        self._settings = settings
        self.counts = JudgeCounts()

    def score(self, responses: Sequence[tuple[Prompt, str]]) -> list[float | RewardFailure]:
        """Score as in `Reward`; all answers to a prompt are to be scored together."""
        groups: dict[bytes, list[int]] = {}
        for i, (prompt, _) in enumerate(responses):
            groups.setdefault(prompt.key, []).append(i)
        pairs = [pair for group in groups.values() for pair in combinations(group, 2)]
        won = asyncio.run(self._compare(responses, pairs))
        shares: list[list[float]] = [[] for _ in responses]
        reasons = ["is of a judge, which needs two answers to a prompt"] * len(responses)
        for (i, j), share in zip(pairs, won, strict=True):
            if isinstance(share, RewardFailure):
                reasons[i] = reasons[j] = share.reason
            else:
                shares[i].append(share)
                shares[j].append(1 - share)
        return [
            math.fsum(mine) / len(mine) if mine else RewardFailure(reason)
            for mine, reason in zip(shares, reasons, strict=True)
        ]

    async def _compare(
        self, responses: Sequence[tuple[Prompt, str]], pairs: Sequence[tuple[int, int]]
    ) -> list[float | RewardFailure]:
        """Return for each pair of indices 1 where the first one wins, 0 where the second one wins, 0.5 for a tie.

        A failure stands for a pair that the judge refuses to compare, such as one that is too long for it.
        """
        settings = self._settings
        async with ServerPool(
            [settings.url],
            key=settings.key,
            in_flight=settings.in_flight,
            request_seconds=settings.request_seconds,
            name=settings.name,
        ) as pool:
            slots = asyncio.Semaphore(settings.in_flight)

            async def one(i: int, j: int) -> float | RewardFailure:
                (prompt, a), (_, b) = responses[i], responses[j]
                if a == b:
                    return 0.5  # without asking
                try:
                    async with slots:
                        straight, swapped = await asyncio.gather(
                            self._ask(pool, ask_text(settings.question, prompt, a, b)),
                            self._ask(pool, ask_text(settings.question, prompt, b, a)),
                        )
                except ServerRefuses as e:
                    return RewardFailure(f"is refused ({e})")
                heartbeat.beat("waiting for the judge")
                return self._count(straight, swapped)

            return list(await asyncio.gather(*(one(i, j) for i, j in pairs)))

    def _count(self, straight: Verdict | None, swapped: Verdict | None) -> float:
        """Count two replies, of which the second was shown the answers in the other order; return as `_compare`."""
        self.counts.comparisons += 1
        for verdict in (straight, swapped):
            self.counts.first += verdict == "first"
            self.counts.second += verdict == "second"
            self.counts.unreadable += verdict is None
        if (straight, swapped) == ("first", "second"):
            return 1.0
        if (straight, swapped) == ("second", "first"):
            return 0.0
        self.counts.ties += 1
        self.counts.orders_disagree += straight == swapped and straight in ("first", "second")
        return 0.5

    async def _ask(self, pool: ServerPool, text: str) -> Verdict | None:
        body = {
            "model": self._settings.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": self._settings.max_tokens,
        }
        said, tokens = await pool.ask_any(
            lambda server: pool.ask_json(server, "/v1/chat/completions", body, _read_message)
        )
        self.counts.tokens += tokens
        return read_verdict(said)

    def close(self) -> None:
        """Do nothing: a judge holds no memory here."""


def _read_message(content: Any) -> tuple[str, int]:
    """Return the text of a chat server's reply, and the tokens that it counts."""
    choices = content.get("choices") if isinstance(content, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    if choice.get("finish_reason") in ("abort", "error"):
        raise ServerFault(f"it gave a reply up (finish_reason {choice['finish_reason']!r})")
    message = choice.get("message")
    if not isinstance(message, dict):
        raise ServerLost(f"its reply has no message: {shorten(str(content))}")
    usage = content.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    said = str(message.get("content") or "")
    if choice.get("finish_reason") == "length" and said.strip(" \n*.").lower() not in get_args(Verdict):
        said = ""  # it was cut, so its last line may be a part of its reasons
    return said, tokens if isinstance(tokens, int) else 0
