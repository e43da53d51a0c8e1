"""Write requests to an OpenAI-compatible server and read its replies, as pure functions.

Servers differ in what they take beyond the common protocol, and some accept a field and ignore it. So there are three
dialects, from the most exact to the plainest; which one a server understands is found by asking (`server_check.py`).
Each answer is one request with a seed of its own; `n` is never used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prefopt_dist.errors import shorten
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.sampling import Ids, Response, Sampling, TextResponse, uniforms

Dialect = Literal["ids", "generation_config", "text"]
"""`ids`: token ids in and out (vLLM's fields); `generation_config`: text, with all settings of the sampling as a JSON
string (`transformers serve`); `text`: text, with the common fields alone."""
DIALECTS: tuple[Dialect, ...] = ("ids", "generation_config", "text")


LEAST_TEMPERATURE = 0.01
"""A temperature below this is asked as 0, the most likely tokens: vLLM would raise it to this one."""


class ServerFault(Exception):
    """A request failed in a way that may pass: the server is busy, restarts, or was cut off."""


class ServerLost(Exception):
    """A server that must not be asked again: it hangs, refuses what is needed, or its replies make no sense."""


class ServerRefuses(ServerLost):
    """A server refuses one request and may take others, as where a prompt is longer than its context."""


@dataclass(frozen=True)
class AnswerRequest:
    """One answer that is asked for."""

    prompt: Prompt
    text: str | None
    """The prompt as text that a tokenizer splits into its ids; None where none does so"""
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    stop_ids: tuple[int, ...]
    logprobs: bool = False
    """Whether the log-prob of each token is asked for"""


def request_for(prompt: Prompt, text: str | None, number: int, sampling: Sampling) -> AnswerRequest:
    """Return the request for one answer to a prompt; its seed depends on seed, prompt and number alone."""
    seed = int(uniforms(sampling.seed, prompt.key, number, 1)[0] * 2**31)
    temperature = sampling.temperature if sampling.temperature >= LEAST_TEMPERATURE else 0.0
    return AnswerRequest(prompt, text, temperature, sampling.top_p, sampling.max_new_tokens, seed, sampling.stop_ids)


@dataclass(frozen=True)
class Reply:
    """A server's answer to one request."""

    response: Response
    tokens: int | None
    """Number of sampled tokens, the stop token included; None where the server does not say"""
    logprobs: list[float] | None
    """Log-prob of each token, in nats; None where it was not asked for or not given"""


@dataclass(frozen=True)
class Known:
    """A request and the answer that the check found to be this model's, to be asked again after a restart."""

    request: AnswerRequest
    """At temperature 0"""
    reply: Reply
    tolerance: float
    """Largest difference of a token's log-prob, in nats"""

    def is_met_by(self, other: Reply) -> bool:
        """Return whether another reply may be of the same model."""
        mine = self.reply.logprobs
        if mine is None or other.logprobs is None or isinstance(self.reply.response, TextResponse):
            return self.reply.response == other.response
        assert not isinstance(other.response, TextResponse)
        for a, b, p, q in zip(self.reply.response, other.response, mine, other.logprobs, strict=False):
            if not abs(p - q) <= self.tolerance:
                return False
            if a != b:  # two tokens of about the same probability, after which nothing can be compared
                return True
        return True


def body_of(request: AnswerRequest, dialect: Dialect, model: str) -> dict[str, Any]:
    """Return the JSON body of POST /v1/completions."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": request.prompt.ids if dialect == "ids" else request.text,
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
    }
    if dialect == "ids":
        # Servers take top_k and penalties from the model's generation_config.json unless the request has them.
        body |= {
            "return_token_ids": True,
            "stop_token_ids": list(request.stop_ids),
            "ignore_eos": True,  # the stop tokens include eos
            "skip_special_tokens": False,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        if request.logprobs:
            body["logprobs"] = 1
    elif dialect == "generation_config":
        sampled = request.temperature > 0
        settings: dict[str, Any] = {
            "do_sample": sampled,
            "eos_token_id": list(request.stop_ids),
            "pad_token_id": request.stop_ids[0],
            "repetition_penalty": 1.0,
        }
        # top_k is 50 where it is not given.
        settings |= {"top_k": 0, "temperature": request.temperature, "top_p": request.top_p} if sampled else {}
        body["generation_config"] = json.dumps(settings)
    return body


def read_reply(content: Any, request: AnswerRequest, dialect: Dialect, vocabulary: int) -> Reply:
    """Return what a server's JSON says.

    Args:
        content: of a reply with status 200.
        request: that was sent.
        dialect: in which it was sent.
        vocabulary: number of token ids of the model.

    Raises:
        ServerFault: the server gave the answer up.
        ServerLost: the reply makes no sense.
    """
    choices = content.get("choices") if isinstance(content, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ServerLost(f"its reply has no choices: {_short(content)}")
    choice = choices[0]
    reason = choice.get("finish_reason")
    if reason in (None, "abort", "error"):
        raise ServerFault(f"it gave an answer up (finish_reason {reason!r})")
    if reason not in ("stop", "length"):
        raise ServerLost(f"its reply has finish_reason {reason!r}, must be 'stop' or 'length'")
    usage = content.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    _check_prompt(choice.get("prompt_token_ids"), usage.get("prompt_tokens"), request.prompt)
    if dialect == "ids":
        ids = _read_ids(choice.get("token_ids"), reason == "stop", request, vocabulary)
        return Reply(ids, len(ids), _read_logprobs(choice.get("logprobs"), len(ids)) if request.logprobs else None)
    if not isinstance(choice.get("text"), str):
        raise ServerLost(f"its reply has no text: {_short(choice)}")
    tokens = usage.get("completion_tokens")
    return Reply(TextResponse(choice["text"], reason == "stop"), tokens if isinstance(tokens, int) else None, None)


def _check_prompt(ids: Any, count: Any, prompt: Prompt) -> None:
    """Raise ServerLost where the server says that it read another prompt."""
    if isinstance(ids, list) and ids != prompt.ids:
        raise ServerLost(f"it read the prompt at {prompt.origin} as other token ids than were sent")
    if isinstance(count, int) and count != len(prompt.ids):
        raise ServerLost(
            f"it read the prompt at {prompt.origin} as {count} tokens, and it has {len(prompt.ids)}; its tokenizer "
            "splits the text otherwise or adds tokens"
        )


def _read_ids(ids: Any, ended: bool, request: AnswerRequest, vocabulary: int) -> Ids:
    if not isinstance(ids, list) or not ids:
        raise ServerLost(f"its reply has no token_ids: {_short(ids)}")
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocabulary for i in ids):
        raise ServerLost(f"its token ids are not all in [0, {vocabulary}): {_short(ids)}")
    if len(ids) > request.max_tokens:
        raise ServerLost(f"it gave {len(ids)} tokens where at most {request.max_tokens} were asked for")
    if any(i in request.stop_ids for i in ids[:-1]) or ended != (ids[-1] in request.stop_ids):
        raise ServerLost(
            f"its answer has finish_reason {'stop' if ended else 'length'!r} and the token ids {_short(ids)}, which "
            f"must end with one of the stop tokens {list(request.stop_ids)[:8]} if and only if it is 'stop'"
        )
    if not ended and len(ids) < request.max_tokens:
        raise ServerLost(
            f"it cut an answer to the prompt at {request.prompt.origin} after {len(ids)} of {request.max_tokens} "
            "tokens; start it with a longer context (data.max_length)"
        )
    return list(ids)


def _read_logprobs(content: Any, tokens: int) -> list[float] | None:
    values = content.get("token_logprobs") if isinstance(content, dict) else None
    if not isinstance(values, list) or len(values) != tokens or not all(isinstance(v, int | float) for v in values):
        return None
    return [float(v) for v in values]


def _short(content: Any) -> str:
    return shorten(json.dumps(content, default=str, ensure_ascii=False))


def text_of(ids: Sequence[int], tokenizer: Any) -> str | None:
    """Return text that the tokenizer, as a server calls it, splits into the ids; None where there is none."""
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    bos = tokenizer.bos_token
    for candidate in (text, text.removeprefix(bos) if bos else text):  # many tokenizers add the first token themselves
        if tokenizer(candidate, verbose=False)["input_ids"] == list(ids):
            found: str = candidate
            return found
    return None
