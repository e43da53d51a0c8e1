"""The sections generate and rounds: answers, who gives them, what scores them, and pairs of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from prefopt_dist.config.bounds import Bound, Count, NotNegative, Positive, Text
from prefopt_dist.config.data import DataSource
from prefopt_dist.errors import UserError


@dataclass(frozen=True)
class Judge:
    """A model behind a server that is asked which of two answers is better, in both orders."""

    server: Text
    """Address of an OpenAI-compatible server, such as `http://node1:8000`; it is asked at `/v1/chat/completions`."""
    prompt: Text
    """File with the text of the question, with `{prompt}`, `{first}` and `{second}` in it; it must tell the judge to
    end with a line `first`, `second` or `tie`."""
    model: Text
    """Name of the model at the server."""
    max_tokens: Count = 512
    """Largest number of tokens of the judge's reply."""
    key_variable: Text | None = None
    """Name of the environment variable with the secret that the server asks for; null: it asks for none."""


@dataclass(frozen=True)
class RewardServer:
    """A reward model behind a server, which is asked at `/classify` or `/pooling` (vLLM's)."""

    url: Text
    """Address of the server, such as `http://node1:8001`."""
    model: Text
    """Name of the model at the server."""
    folder: Text
    """Folder or hub name of the reward model. Its chat template writes what is scored. Where it holds weights, the
    server must give two known answers their rewards; a tokenizer alone is enough otherwise."""
    key_variable: Text | None = None
    """Name of the environment variable with the secret that the server asks for; null: it asks for none."""


@dataclass(frozen=True)
class RewardSource:
    """One reward of the weighted mean: a function, a model, a server or a judge."""

    function: Text | None = None
    """A Python function as `module:name`, which is called as `score(prompt, response, row)` and returns a number."""
    model: Text | None = None
    """A sequence-classification model with one output and a chat template: a Hugging Face folder or a hub name."""
    server: RewardServer | None = None
    """A reward model behind a server."""
    judge: Judge | None = None
    """A model that compares each two answers to a prompt; an answer's reward is the share of the others that it beats,
    ties counted half. For the stage `generate` alone."""
    weight: Positive = 1.0
    """Weight in the mean."""

    def __post_init__(self) -> None:
        if sum(part is not None for part in (self.function, self.model, self.server, self.judge)) != 1:
            judge = None if self.judge is None else self.judge.server
            server = None if self.server is None else self.server.url
            raise UserError(
                f"generate.rewards: an entry has function {self.function!r}, model {self.model!r}, server {server!r} "
                f"and judge {judge!r}, must have just one of them; write {{function: my_module:score}}, "
                "{model: FOLDER}, {server: {url: URL, model: NAME, folder: FOLDER}} or "
                "{judge: {server: URL, prompt: FILE, model: NAME}}"
            )


@dataclass(frozen=True)
class Launch:
    """A server that the job starts itself with the folder of the model, and ends with its answers."""

    command: Text
    """The command, run without a shell on the machine of rank 0; `{model}` in it becomes the model's folder, and
    `{port}` the port on which it must listen."""
    start_seconds: Positive = 600.0
    """Longest time until the server is healthy."""


@dataclass(frozen=True)
class Generate:
    """The stage `generate`: n responses to each prompt, their scores, and pairs of them (docs/rollouts.md)."""

    rewards: tuple[RewardSource, ...] = ()
    """Rewards; the score of a response is their weighted mean."""
    prompts: tuple[DataSource, ...] | None = None
    """Rows of any form, or with a prompt alone, of which only the prompts are used; null: those of `data.train`."""
    n: Annotated[int, Bound("at least 2, since a pair needs two responses", lambda v: v >= 2)] = 8
    """Number of responses to each prompt."""
    temperature: Positive = 0.9
    """Sampling temperature: the logits are divided by it."""
    top_p: Annotated[float, Bound("in (0, 1]", lambda v: 0 < v <= 1)] = 1.0
    """Nucleus sampling: tokens are drawn from the smallest set of most likely tokens with at least this probability."""
    max_new_tokens: Count = 256
    """Largest number of tokens of a response, including its end token; responses that do not end within it are left
    out."""
    batch_tokens: Count = 32768
    """Tokens of prompts and responses that a rank samples at once. It changes memory and speed, and the
    result within rounding alone."""
    pairing: Literal["best_worst", "best_random", "margin", "ranked"] = "best_worst"
    """Which two responses to a prompt make a pair: the best and the worst, the best and a random one with a lower
    score, or (`margin`) every two whose scores differ by at least `min_margin`. With `ranked` all responses make one
    row with their scores, for the losses `plackett_luce` and `all_pairs`."""
    min_margin: NotNegative = 0.0
    """Smallest difference of the rewards of a pair, or of the best and the worst response of a ranked row; equal ones
    are always left out."""
    on_bad_reward: Literal["stop", "drop"] = "stop"
    """A reward that raises an exception or is not a finite number ends the job (`stop`), or its response is left out
    (`drop`)."""
    engine: Literal["transformers", "server"] = "transformers"
    """What samples: a copy of the model on each rank (`transformers`), or servers that are asked over HTTP
    (`server`)."""
    servers: tuple[Text, ...] = ()
    """Addresses of OpenAI-compatible servers that hold the model, such as `http://node1:8000`."""
    launch: Launch | None = None
    """The server that the job starts itself, instead of `servers`; null: none."""
    key_variable: Text | None = None
    """Name of the environment variable with the secret that the servers ask for; null: they ask for none."""
    requests_in_flight: Count = 64
    """Largest number of requests to each server at once, over all ranks."""
    request_seconds: Positive = 600.0
    """Longest time of one request; a server that does not answer within it is left out."""
    pairs: Text | None = None
    """File for the pairs; null: `pairs.jsonl` in the run folder."""


@dataclass(frozen=True)
class Rounds:
    """The stage `rounds`, which repeats `generate`, the first pass and `train` (docs/rollouts.md)."""

    count: Count = 3
    """Number of rounds."""
    reference: Literal["start", "first"] = "start"
    """Reference of each round: the model that the round starts from (`start`), or the very first model, or
    `reference.name_or_path` if it is set (`first`)."""
    prompts_per_round: Count | None = None
    """Number of prompts of a round, for small steps: each round takes the next ones of a shuffled order, which begins
    again after the last one; null: each round takes all prompts."""
    ahead: Annotated[int, Bound("0 or 1", lambda v: v in (0, 1))] = 0
    """0: a round's prompts are answered by the model that the round starts from, before it trains. 1: they are answered
    while the round before trains, by the model that this one starts from (off-policy by one round); only with
    `generate.engine: server` on GPUs."""
