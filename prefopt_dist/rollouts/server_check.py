"""Check a server before the first prompt: what it can do, whether it holds this model, and whether it samples.

What a server says about itself is not believed. Its greedy answers, and its log-probs where it has them, are compared
with those of this model, and its samples with this model's distribution.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from prefopt_dist.data.tokenise import Tokeniser
from prefopt_dist.errors import UserError
from prefopt_dist.rollouts import server_pool
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.sampling import Ids, Sampling, TextResponse
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
from prefopt_dist.rollouts.store import ids_of_text

PROMPTS = 8
"""Most prompts that the check asks."""
TOKENS = 32
"""Most tokens of an answer in the check."""
ALONE = 4
"""Number of requests that are repeated one by one, to see whether seeds hold."""
LISTED = 8
"""Most names of models that are tried of those that a server lists."""
COLD = 1e-6
"""A temperature at which the most likely token is drawn."""
DEVIATIONS = 6.0
SLACK_NATS = 10.0
"""A single token of small probability may surprise by so much, which the variance of few tokens does not show."""


class OwnModel(Protocol):
    """The model that the server should hold, loaded here."""

    def logits_before(self, prompt: Ids, response: Ids) -> torch.Tensor:
        """Return the logits from which each token of a response is drawn: float32 [tokens, V]."""
        ...

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Ids]]:
        """Sample as in `Engine`."""
        ...


@dataclass(frozen=True)
class Tolerance:
    """Largest differences of log-probs, in nats, that rounding may cause."""

    mean: float
    largest: float


TOLERANCES = {torch.float32: Tolerance(1e-3, 1e-2)}
HALF = Tolerance(0.05, 0.5)
"""Of 16-bit models, whose kernels differ in the last digits."""


@dataclass(frozen=True)
class Checker:
    """What the check of each server needs."""

    pool: ServerPool
    own: OwnModel
    prompts: Sequence[Prompt]
    sampling: Sampling
    tokeniser: Tokeniser
    tolerance: Tolerance
    names: Sequence[str]
    """Names under which a server may know the model, besides those that it lists"""
    vocabulary: int

    async def check(self, server: Server) -> str:
        """Check one server; return what was found, for people. The server gets its contract, or is left out.

        Raises:
            UserError: the server holds another model, or does not sample as asked.
        """
        step = max(1, len(self.prompts) // PROMPTS)
        chosen = self.prompts[::step][:PROMPTS]
        texts = [text_of(prompt.ids, self.tokeniser.tokenizer) for prompt in chosen]
        tokens = min(TOKENS, self.sampling.max_new_tokens)
        short = replace(self.sampling, max_new_tokens=tokens)
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
        known = Known(greedy[0], answers[0], self.tolerance.largest)
        server.contract = replace(contract, seeds_hold=held == len(alone), known=known)
        same = self._compare_greedy(server, greedy, answers)
        drawn = self._compare_samples(server, sampled, samples)
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
            for name in dict.fromkeys([*self.names, *list(await self.pool.client.models(server.url))[:LISTED]]):
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
        tokens = len(longest.ids) + self.sampling.max_new_tokens
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

    def _ids(self, reply: Reply) -> Ids | None:
        """Return the answer's token ids; None where its text is split otherwise than it was sampled."""
        if not isinstance(reply.response, TextResponse):
            return reply.response
        text = reply.response
        ids = ids_of_text(text.text, text.ended, self.sampling.stop_ids, self.tokeniser)
        return ids if reply.tokens in (None, len(ids)) else None

    def _compare_greedy(self, server: Server, requests: Sequence[AnswerRequest], replies: Sequence[Reply]) -> str:
        """Compare greedy answers with this model's most likely tokens, and log-probs with its own.

        Raises:
            UserError: they differ by more than the tolerance.
        """
        tokens, largest, apart = 0, 0.0, []
        for request, reply in zip(requests, replies, strict=True):
            ids = self._ids(reply)
            if ids is None:
                tokens += self._same_text(request, reply)
                continue
            logps = torch.log_softmax(self.own.logits_before(request.prompt.ids, ids), -1)
            best = logps.max(-1)
            mine = logps.gather(-1, torch.tensor(ids)[:, None])[:, 0]
            if isinstance(reply.response, TextResponse) and reply.response.ended:  # by which stop token is not known
                mine[-1] = logps[-1, list(request.stop_ids)].max()
            gap, at = (best.values - mine).max(0)
            if gap > self.tolerance.largest:
                t = int(at)
                raise self._other_model(
                    server,
                    f"token {t + 1} of its greedy answer to the prompt at {request.prompt.origin} is "
                    f"{self._token(ids[t])}, whose log-prob under this model is {float(mine[t]):.3f}, while that of "
                    f"{self._token(int(best.indices[t]))} is {float(best.values[t]):.3f}",
                )
            tokens, largest = tokens + len(ids), max(largest, float(gap))
            if reply.logprobs is not None:
                apart += [abs(a - b) for a, b in zip(reply.logprobs, mine.tolist(), strict=True)]
        if not tokens:
            raise UserError(
                f"generate.servers: none of the {len(requests)} answers of {server.url} could be compared with this "
                "model's: their texts are other ones than this model's and are split into other numbers of tokens "
                f"than the server sampled. See whether it holds {self.names[0]}, or use a server that gives token ids."
            )
        said = f"{tokens} greedy tokens are its most likely ones within {largest:.2g} nats"
        if apart:
            mean = math.fsum(apart) / len(apart)
            if mean > self.tolerance.mean or max(apart) > self.tolerance.largest:
                raise self._other_model(
                    server,
                    f"its log-probs of {len(apart)} tokens differ from this model's by {mean:.3g} nats on average and "
                    f"{max(apart):.3g} at most",
                )
            said += f", log-probs within {max(apart):.2g} nats"
        return said

    def _same_text(self, request: AnswerRequest, reply: Reply) -> int:
        """Return the number of tokens of this model's greedy answer if its text is the reply's, else 0."""
        assert isinstance(reply.response, TextResponse)
        greedy = replace(self.sampling, n=1, temperature=COLD, top_p=1.0, max_new_tokens=request.max_tokens)
        ((ids,),) = self.own.sample([request.prompt], greedy)
        ended = ids[-1] in request.stop_ids
        decode = self.tokeniser.tokenizer.decode
        texts = [decode(ids[:-1] if ended else ids, skip_special_tokens=skip) for skip in (True, False)]
        return len(ids) if reply.response.text in texts else 0

    def _other_model(self, server: Server, found: str) -> UserError:
        limits = f"at most {self.tolerance.largest} nats for one token, {self.tolerance.mean} on average"
        return UserError(
            f"generate.servers: {server.url} holds another model than {self.names[0]}: {found} (tolerance: {limits}). "
            "Start the server with this model's folder, in the same dtype (model.dtype)."
        )

    def _compare_samples(self, server: Server, requests: Sequence[AnswerRequest], replies: Sequence[Reply]) -> str:
        """Compare the surprise of samples, Σ −log q(token), with what the distribution q that was asked for gives.

        Given the beginning of an answer, a token's surprise has the entropy of q as its mean. So the sum of the
        differences is near 0, within a few of its standard deviations.

        Raises:
            UserError: the answers are not samples of that distribution.
        """
        temperature = requests[0].temperature
        if temperature == 0:
            return "it is asked for the most likely tokens alone"
        surprise = expected = variance = 0.0
        tokens = compared = 0
        for request, reply in zip(requests, replies, strict=True):
            ids = self._ids(reply)
            if ids is None:
                continue
            logits = self.own.logits_before(request.prompt.ids, ids)
            one = surprises(logits, ids, request)
            surprise, expected, variance = surprise + one[0], expected + one[1], variance + one[2]
            tokens, compared = tokens + len(ids), compared + 1
        if 2 * compared < len(requests):
            others = f"the texts of {len(requests) - compared} of {len(requests)}"
            return f"samples were not compared: {others} are split otherwise than they were sampled"
        spread = math.sqrt(variance)
        rounding = self.tolerance.mean * tokens / temperature
        if abs(surprise - expected) > DEVIATIONS * spread + SLACK_NATS + rounding:
            greedy = surprise < expected
            raise UserError(
                f"generate.servers: the answers of {server.url} are not samples at generate.temperature "
                f"{self.sampling.temperature} and generate.top_p {self.sampling.top_p}: the surprise of {tokens} "
                f"tokens is {surprise:.1f} nats, and {expected:.1f} ± {spread:.1f} are expected. "
                + (
                    "It takes likelier tokens than asked for, as a server does that is greedy or cuts the vocabulary; "
                    "set do_sample: true and no top_k in the folder's generation_config.json."
                    if greedy
                    else "It takes less likely tokens than asked for; see whether it takes temperature and top_p."
                )
            )
        return f"samples surprise by {surprise:.1f} nats where {expected:.1f} ± {spread:.1f} are expected"

    def _token(self, token: int) -> str:
        return repr(self.tokeniser.tokenizer.convert_ids_to_tokens(token))


def surprises(logits: torch.Tensor, ids: Ids, request: AnswerRequest) -> tuple[float, float, float]:
    """Return Σ −log q(token) of sampled tokens, its expectation and its variance, in nats.

    q is softmax(logits / temperature), cut to the nucleus; a token outside of it has the surprise that its probability
    would give.

    Args:
        logits: float32 [tokens, V].
        ids: the tokens.
        request: with temperature, top_p and the stop tokens, which count as one where a text does not say which it was.
    """
    p = torch.softmax(logits.double() / request.temperature, -1)
    kept = p
    if request.top_p < 1:
        descending, order = p.sort(dim=-1, descending=True, stable=True)
        inside = descending.cumsum(-1) - descending < request.top_p
        kept = p * torch.zeros_like(p).scatter_(-1, order, inside.double())
    if request.stop_ids:
        p, kept = (_as_one(of, list(request.stop_ids)) for of in (p, kept))
        ids = [request.stop_ids[0] if i in request.stop_ids else i for i in ids]
    mass = kept.sum(-1, keepdim=True)
    q = kept / mass
    information = torch.where(q > 0, -q.clamp(min=1e-300).log(), 0)
    entropy = (q * information).sum(-1)
    spread = (q * information**2).sum(-1) - entropy**2
    chosen = p.gather(-1, torch.tensor(ids)[:, None])[:, 0] / mass[:, 0]
    return float(-chosen.clamp(min=1e-30).log().sum()), float(entropy.sum()), float(spread.clamp(min=0).sum())


def _as_one(probabilities: torch.Tensor, stops: list[int]) -> torch.Tensor:
    """Return a copy in which the first of the stop tokens has the probability of all of them."""
    merged = probabilities.clone()
    merged[:, stops] = 0
    merged[:, stops[0]] = probabilities[:, stops].sum(-1)
    return merged
