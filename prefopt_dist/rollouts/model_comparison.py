"""Compare a server's answers with the model that it should hold, loaded here: greedy tokens, log-probs and samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from prefopt_dist.data.tokenise import Tokeniser
from prefopt_dist.errors import UserError
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.sampling import Ids, Sampling, TextResponse
from prefopt_dist.rollouts.server_pool import Server
from prefopt_dist.rollouts.server_protocol import AnswerRequest, Reply
from prefopt_dist.rollouts.store import ids_of_text

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
class ModelComparison:
    """The model that the servers should hold, with what its answers are compared by."""

    own: OwnModel
    sampling: Sampling
    tokeniser: Tokeniser
    tolerance: Tolerance
    names: Sequence[str]
    """Names under which a server may know the model, besides those that it lists"""

    def _ids(self, reply: Reply) -> Ids | None:
        """Return the answer's token ids; None where its text is split otherwise than it was sampled."""
        if not isinstance(reply.response, TextResponse):
            return reply.response
        text = reply.response
        ids = ids_of_text(text.text, text.ended, self.sampling.stop_ids, self.tokeniser)
        return ids if reply.tokens in (None, len(ids)) else None

    def compare_greedy(self, server: Server, requests: Sequence[AnswerRequest], replies: Sequence[Reply]) -> str:
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

    def compare_samples(self, server: Server, requests: Sequence[AnswerRequest], replies: Sequence[Reply]) -> str:
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
