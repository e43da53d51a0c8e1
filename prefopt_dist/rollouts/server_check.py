"""Check a server before the first prompt: what it can do, whether it holds this model, and whether it samples.

What a server says about itself is not believed. Its greedy answers, and its log-probs where it has them, are compared
with those of this model, and its samples with this model's distribution.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from prefopt_dist.rollouts import server_pool
from prefopt_dist.rollouts.model_comparison import ModelComparison
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.server_pool import Contract, Server, ServerPool
from prefopt_dist.rollouts.server_protocol import (
    DIALECTS,
    AnswerRequest,
    Dialect,
    Known,
    Reply,
    ServerFault,
    ServerLost,
    body_of,
    read_reply,
    request_for,
    text_of,
)

PROMPTS = 8
"""Most prompts that the check asks."""
TOKENS = 32
"""Most tokens of an answer in the check."""
ALONE = 4
"""Number of requests that are repeated one by one, to see whether seeds hold."""
LISTED = 8
"""Most names of models that are tried of those that a server lists."""


@dataclass(frozen=True)
class Checker:
    """What the check of each server needs."""

    pool: ServerPool
    model: ModelComparison
    prompts: Sequence[Prompt]
    vocabulary: int

    async def check(self, server: Server) -> str:
        """Check one server; return what was found, for people. The server gets its contract, or is left out.

        Raises:
            UserError: the server holds another model, or does not sample as asked.
        """
        step = max(1, len(self.prompts) // PROMPTS)
        chosen = self.prompts[::step][:PROMPTS]
        texts = [text_of(prompt.ids, self.model.tokeniser.tokenizer) for prompt in chosen]
        tokens = min(TOKENS, self.model.sampling.max_new_tokens)
        short = replace(self.model.sampling, max_new_tokens=tokens)
        sampled = [request_for(p, t, k, short) for p, t in zip(chosen, texts, strict=True) for k in range(2)]
        greedy = [replace(request, temperature=0.0, top_p=1.0, logprobs=True) for request in sampled[::2]]
        try:
            model, dialect = await self._dialect(server, greedy[0])
            await self._refuse_short_context(server, model)
            contract = Contract(model, dialect, seeds_hold=False)
            if dialect != "ids":
                greedy = [request for request in greedy if request.text is not None]
                sampled = [request for request in sampled if request.text is not None]
            answers = await self._together(server, greedy, contract)
            samples = await self._together(server, sampled, contract)
            alone = [await self._asked(server, request, contract) for request in sampled[:ALONE]]
        except ServerFault as e:
            server.lost = str(e)
        except ServerLost as e:
            server.lost = server.lost or str(e)
        if server.lost is not None:
            return f"{server.url} is left out: {server.lost}"
        held = sum(one.response == other.response for one, other in zip(alone, samples, strict=False))
        known = Known(greedy[0], answers[0], self.model.tolerance.largest)
        server.contract = replace(contract, seeds_hold=held == len(alone), known=known)
        same = self.model.compare_greedy(server, greedy, answers)
        drawn = self.model.compare_samples(server, sampled, samples)
        how = {"ids": "token ids", "generation_config": "text and a generation_config", "text": "text"}[dialect]
        kept = (
            "seeds hold in company"
            if server.contract.seeds_hold
            else f"seeds do not hold in company ({held} of {len(alone)} answers repeated), so a request that a kill "
            "cut off gets another answer when it is asked again"
        )
        return f"{server.url} holds this model ({same}; {drawn}); it is asked with {how}; {kept}"

    async def _dialect(self, server: Server, request: AnswerRequest) -> tuple[str, Dialect]:
        """Return the model's name at the server and the most exact dialect that it answers."""
        reasons: list[str] = []
        for rest in (*server_pool.RESTS, None):
            reasons, passing = [], False
            for name in dict.fromkeys([*self.model.names, *list(await self.pool.client.models(server.url))[:LISTED]]):
                for dialect in DIALECTS:
                    if dialect != "ids" and request.text is None:
                        reasons.append(f"{dialect}: the prompt at {request.prompt.origin} cannot be written as text")
                        continue
                    try:
                        content = await self.pool.client.post(
                            server.url + "/v1/completions", body_of(request, dialect, name)
                        )
                        read_reply(content, request, dialect, self.vocabulary)
                        return name, dialect
                    except ServerFault as e:
                        passing = True
                        reasons.append(f"{dialect}, model {name!r}: {e}")
                    except ServerLost as e:
                        reasons.append(f"{dialect}, model {name!r}: {e}")
                        if "generate.request_seconds" in str(e):
                            raise
            if not passing or rest is None:
                break
            await asyncio.sleep(rest)
        raise ServerLost("it answers in none of the ways that were tried: " + "; ".join(dict.fromkeys(reasons)))

    async def _refuse_short_context(self, server: Server, model: str) -> None:
        """Raise ServerLost where the server says that the longest prompt and its answer are too long for it."""
        longest = max(self.prompts, key=lambda prompt: len(prompt.ids))
        tokens = len(longest.ids) + self.model.sampling.max_new_tokens
        context = (await self.pool.client.models(server.url)).get(model)
        if context is not None and tokens > context:
            raise ServerLost(
                f"it takes at most {context} tokens (max_model_len), and the prompt at {longest.origin} and its answer "
                f"may have {tokens}; start it with a longer context (data.max_length)"
            )

    async def _together(self, server: Server, requests: Sequence[AnswerRequest], contract: Contract) -> list[Reply]:
        return list(await asyncio.gather(*(self._asked(server, request, contract) for request in requests)))

    async def _asked(self, server: Server, request: AnswerRequest, contract: Contract) -> Reply:
        """Ask this server until it answers or is left out."""
        while True:
            try:
                return await self.pool.ask_one(server, request, contract)
            except ServerFault:
                if server.lost is not None:
                    raise
                await asyncio.sleep(max(0.1, server_pool.RESTS[max(0, server.failures - 1)]))
