"""Check the section generate's servers, and open the engine that asks them (all ranks call what opens)."""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Callable, Sequence

from prefopt_dist.config import Config, secret_option
from prefopt_dist.data.tokenise import Tokeniser
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import StopRequested, UserError
from prefopt_dist.model.folder import ModelFolder
from prefopt_dist.monitoring.console import say
from prefopt_dist.rollouts.launched_server import LaunchedServer
from prefopt_dist.rollouts.model_comparison import HALF, TOLERANCES, ModelComparison
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.sampling import Sampling
from prefopt_dist.rollouts.server_check import Checker
from prefopt_dist.rollouts.server_engine import Found, ServerEngine, ServerSettings, check_servers
from prefopt_dist.rollouts.server_pool import ServerPool
from prefopt_dist.rollouts.transformers_engine import TransformersEngine
from prefopt_dist.setup.addresses import refuse_address, secret_of
from prefopt_dist.setup.answer_engines import checking_engine
from prefopt_dist.setup.prepare_models import Models
from prefopt_dist.setup.prepare_reference import HashedWeights

MERGE = "merge the adapter into its base model by peft, and give that as model.name_or_path without lora.from"
"""Remedy where a run goes on from an adapter."""


def check(config: Config) -> None:
    """Check what the servers need, without asking them (one process calls it).

    Raises:
        UserError: a key of the servers is missing, wrong or without a meaning.
    """
    generate = config.generate
    if generate.engine != "server":
        given = {
            "servers": ", ".join(generate.servers),
            "launch": "" if generate.launch is None else generate.launch.command,
            "key_variable": generate.key_variable,
        }
        for name, value in given.items():
            if value:
                raise UserError(
                    f"generate.{name}: got {value!r}, must not be given with generate.engine=transformers, which asks "
                    "no server; leave it out, or set generate.engine=server"
                )
        return
    if generate.launch is not None:
        if generate.servers:
            raise UserError(
                f"generate.launch: got {generate.launch.command!r} beside generate.servers, must be given without; "
                "leave one of them out"
            )
        for word in ("{model}", "{port}"):
            if word not in generate.launch.command:
                raise UserError(
                    f"generate.launch.command: got {generate.launch.command!r}, must have the word {word}; write it "
                    "like: /opt/vllm/bin/vllm serve {model} --port {port}"
                )
        _refuse_command(generate.launch.command)
    elif not generate.servers:
        raise UserError(
            "generate.servers: not set, must name servers with generate.engine=server; give their addresses, such as "
            "[http://node1:8000], or set generate.launch.command or generate.engine=transformers"
        )
    for i, url in enumerate(generate.servers):
        refuse_address(url, f"generate.servers[{i}]")
    secret_of(generate.key_variable, "generate.key_variable")
    if config.lora is not None and config.lora.from_ is not None:
        raise UserError(
            f"generate.engine: got server, must be transformers with lora.from ({config.lora.from_!r}), since a server "
            f"holds whole models; change it, or {MERGE}"
        )
    if config.lora is not None and config.lora.base != "full":
        raise UserError(
            f"generate.engine: got server, must be transformers with lora.base={config.lora.base}, since a server "
            "would sample from the base as it is stored; change one of them"
        )


def _refuse_command(command: str) -> None:
    """Raise UserError for a command that cannot be split into words, or that has a secret in it."""
    try:
        words = shlex.split(command)
    except ValueError as e:
        raise UserError(
            f"generate.launch.command: got {command!r}, must be words as a shell splits them ({e}); close the quotation"
        ) from e
    if name := secret_option(words):
        raise UserError(
            f"generate.launch.command: has a secret after {name}, must have none, since a configuration is saved and "
            "any user sees a command; put the secret into an environment variable that the server reads (vLLM: "
            "VLLM_API_KEY), and name it in generate.key_variable too"
        )


def open_servers(
    config: Config,
    models: Models,
    model: ModelFolder,
    hashed: HashedWeights,
    tokeniser: Tokeniser,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    what: str,
    stop_asked: Callable[[], bool],
) -> ServerEngine:
    """Check that the servers hold this model, and return the engine that asks them (all ranks call it).

    A server that the job starts itself is started first, and ends when the engine is closed.

    The model is loaded for the check: on rank 0 alone where it fits there, else sharded over all ranks.

    Args:
        config: the configuration.
        models: of the run.
        model: the folder of the model that answers.
        hashed: its weights.
        tokeniser: of the prompts.
        prompts: of which the check asks some.
        sampling: as the answers will be sampled.
        what: name of the model, for a log file.
        stop_asked: whether this rank was asked to stop.

    Raises:
        StopRequested: a stop was requested before the job's own server was healthy.
    """
    generate, vocabulary = config.generate, model.config.get_text_config().vocab_size
    launched = ranks.run_on_all_ranks(lambda: _launch(config, model, what, stop_asked) if ranks.rank() == 0 else None)
    if generate.launch is not None and ranks.run_on_rank_zero(lambda: launched is None):
        raise StopRequested
    try:
        settings = ServerSettings(
            urls=ranks.run_on_rank_zero(lambda: generate.servers if launched is None else (launched.url,)),
            # On each rank: another machine may lack the variable.
            key=ranks.run_on_all_ranks(lambda: secret_of(generate.key_variable, "generate.key_variable")),
            in_flight=max(1, generate.requests_in_flight // ranks.world_size()),
            request_seconds=generate.request_seconds,
            vocabulary=vocabulary,
            direct=generate.launch is not None,
        )

        def checker(pool: ServerPool, own: TransformersEngine) -> Checker:
            comparison = ModelComparison(
                own=own,
                sampling=sampling,
                tokeniser=tokeniser,
                tolerance=TOLERANCES.get(models.dtype, HALF),
                names=(str(model.path.resolve()), str(model.path)),
            )
            return Checker(pool, comparison, prompts, vocabulary)

        found = _check_servers(settings, checker, checking_engine(config, models, model, hashed))
    except BaseException:
        if launched is not None:
            launched.close()
        raise
    return ServerEngine(settings, found, tokeniser.tokenizer, None if launched is None else launched.close)


def _launch(config: Config, model: ModelFolder, what: str, stop_asked: Callable[[], bool]) -> LaunchedServer | None:
    """Start the server of generate.launch; None without the section, or after a request to stop (rank 0)."""
    launch = config.generate.launch
    if launch is None:
        return None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    one_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == ranks.world_size()
    say(f"generate.launch: starting a server of {model.path} on port {port}")
    try:
        return LaunchedServer(
            launch.command,
            model=model.path.resolve(),
            port=port,
            host="127.0.0.1" if one_node else socket.gethostname(),
            log=config.run_dir / f"server-{what}.log",
            start_seconds=launch.start_seconds,
            stop_asked=stop_asked,
        )
    except StopRequested:
        return None


def _check_servers(
    settings: ServerSettings,
    checker: Callable[[ServerPool, TransformersEngine], Checker],
    own: TransformersEngine | None,
) -> list[Found]:
    """Check the servers on rank 0, beside a model that is released then; return what was found (all ranks call it)."""
    found: list[Found] = []
    messages: list[str] = []
    error: Exception | None = None
    if own is not None and ranks.rank() == 0:
        model = own
        try:
            found, messages = check_servers(settings, lambda pool: checker(pool, model))
        except Exception as e:  # raised below, when the other ranks have left the passes
            error = e
    if own is not None:
        own.meet()
        own.close()

    def agreed() -> list[Found]:
        if error is not None:
            raise error
        return found

    found = ranks.run_on_rank_zero(agreed)
    for message in messages:
        say(message)
    return found
