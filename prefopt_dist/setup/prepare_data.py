"""Tokenise a run's data sets once, map them on all ranks, and check them beside models and loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prefopt_dist.config import Config, DataSource
from prefopt_dist.config.losses import KTOLoss
from prefopt_dist.data import DamagedRows, TokenisedRows, open_rows, prepare_rows
from prefopt_dist.data.derived import PromptTooFrequent, build_unpaired_rows, without_rows
from prefopt_dist.data.options import TextOptions
from prefopt_dist.data.quality.findings import DataFinding, row_findings, set_findings
from prefopt_dist.data.quality.policy import refuse_stops, rows_left, rows_to_drop
from prefopt_dist.data.quality.show import row_text, show_rows
from prefopt_dist.data.template import read_template, template_name
from prefopt_dist.data.tokenise import Tokeniser
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import AgreedUserError, UserError
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.monitoring.console import row_reporter, say
from prefopt_dist.objectives import Objective
from prefopt_dist.setup import checks
from prefopt_dist.setup.checks import eval_sets
from prefopt_dist.setup.prepare_models import Models


def load_train(config: Config, models: Models, objective: Objective) -> TokenisedRows:
    """All ranks: the training set, tokenised by rank 0, mapped by all."""
    if template_name(models.tokenizer, config.data.template, config.data.chat_template) == "plain":
        say(
            "data: the tokenizer has no chat template, so turns get the plain one of this package "
            "('### user:' and '### assistant:' as headlines); the export carries it"
        )
    say(f"data: reading {', '.join(s.path for s in config.data.train)}")
    train = _open(lambda: tokenised_train_folder(config, models.tokenizer, models.policy.config.vocab_size))
    say(f"data.train: {train.report.text()}")
    for shown in show_rows("data.train", train, models.tokenizer, 1):
        say(row_text(shown, train.kind, models.tokenizer))
    _check_beside_models(models, train, objective, "data.train")
    check_rows(train, objective, "data.train")
    train = rows_for_loss(config, train, "data.train")
    ranks.run_on_rank_zero(lambda: checks.check_lengths(config, train, objective, "data.train", trained=True))
    return train


def load_evals(config: Config, models: Models, objective: Objective) -> dict[str, TokenisedRows]:
    """All ranks: the evaluation sets by name; none where the configuration has none."""
    evals = {}
    for name, (key, sources) in zip(config.data.eval or {}, eval_sets(config).items(), strict=True):
        evals[name] = _open(
            partial(tokenised_folder, config, models.tokenizer, models.policy.config.vocab_size, sources, key)
        )
        say(f"{key}: {evals[name].report.text()}")
        _check_beside_models(models, evals[name], objective, key)
        check_rows(evals[name], objective, key)
        evals[name] = rows_for_loss(config, evals[name], key)
        ranks.run_on_rank_zero(partial(checks.check_lengths, config, evals[name], objective, key, trained=False))
    if not evals:
        say("data.eval is not set: nothing is evaluated")
    return evals


def _check_beside_models(models: Models, rows: TokenisedRows, objective: Objective, key: str) -> None:
    """All ranks: refuses tokens that the reference lacks; names the rows that are longer than a model was made for."""
    if objective.needs_reference and models.reference is not models.policy:
        ranks.run_on_rank_zero(partial(checks.check_reference_vocabulary, models.reference, rows, key))
    lengths = rows.lengths()
    longest = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    for model in {models.policy.path: models.policy, models.reference.path: models.reference}.values():
        positions = getattr(model.config, "max_position_embeddings", None)  # not every family has such a number
        beyond = np.flatnonzero(longest > positions) if positions is not None else ()
        if len(beyond):
            first = ", ".join(rows.origin(int(i)) for i in beyond[:3])
            say(
                f"{key}: {len(beyond)} rows are longer than the {positions} positions that {model.key} was made for "
                f"(max_position_embeddings), the first: {first}; lower data.max_length to that"
            )


def data_facts(train: TokenisedRows, evals: dict[str, TokenisedRows]) -> dict[str, Any]:
    """What run.json says of the data; an unnamed evaluation set stands as it is, named ones by name."""
    reports = {name: rows.report.as_run_json() for name, rows in evals.items()}
    return {"train": train.report.as_run_json(), "eval": reports.get("", reports or None)}


def _open(make: Callable[[], Path]) -> TokenisedRows:
    """All ranks: the rows in the folder that rank 0 makes."""
    folder = ranks.run_on_rank_zero(make)

    def open_here() -> TokenisedRows:
        try:
            return open_rows(folder, checksums=ranks.rank() == 0)
        except (DamagedRows, OSError) as e:
            raise UserError(
                f"run.cache: {folder} cannot be read here ({e}). All nodes must see the same run.cache."
            ) from e

    return ranks.run_on_all_ranks(open_here)


def check_rows(rows: TokenisedRows, objective: Objective, key: str) -> None:
    """Refuses data that the loss cannot use."""
    if rows.responses < objective.responses:
        raise AgreedUserError(
            f"{key}: the rows are of the form {rows.kind!r}, with one response each; this loss compares two. "
            f"Give pairs, or set loss.name={'kto' if rows.kind == 'rated' else 'sft'}."
        )


def rows_for_loss(config: Config, rows: TokenisedRows, key: str) -> TokenisedRows:
    """KTO's rated rows with their mismatched partners; for every other loss the rows as they are."""
    if not isinstance(config.loss, KTOLoss):
        return rows
    if rows.kind == "demonstration" or (rows.kind == "pair" and not config.loss.split_pairs):
        raise AgreedUserError(
            f"{key}: the rows are of the form {rows.kind!r}; the loss kto takes rows of prompt, completion and label. "
            "Give such rows, or pairs and loss.split_pairs=true."
        )
    if rows.n * rows.responses < 2:
        raise AgreedUserError(f"{key}: {rows.n} row; the loss kto needs two, since a row is compared with another one.")
    try:
        return build_unpaired_rows(rows, config.data.max_length)
    except PromptTooFrequent as found:
        raise AgreedUserError(
            f"{key}: {found} rows answer the same prompt; the loss kto measures each row by a response to another "
            "prompt, so no prompt may have more than half of the rows. Give rows of more prompts."
        ) from None


TRAIN = "data.train"


def text_options(config: Config) -> TextOptions:
    """How texts become tokens, for whatever reads rows or prompts."""
    data = config.data
    return TextOptions(
        template_date=data.template_date,
        learn=data.learn,
        system=data.system,
        thinking=data.thinking,
        chat_template=None if data.chat_template is None else _template_file(data.chat_template),
        template_kwargs=tuple((data.template_kwargs or {}).items()),
        columns=tuple((data.columns or {}).items()),
        pairs_from=data.pairs_from,
    )


def _template_file(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template: {path} cannot be read ({error}); name a file with a template") from error


def tokeniser_of(config: Config, tokenizer: Any) -> Tokeniser:
    """What prompts go through that are to be answered: the same as what is trained on."""
    data = config.data
    options = text_options(config)
    template = read_template(tokenizer, data.template, options)
    return Tokeniser(template, data.max_length, data.max_prompt_length, options)


def tokenised_folder(
    config: Config,
    tokenizer: Any,
    vocabulary: int,
    sources: Sequence[DataSource],
    key: str,
    on_bad_row: str | None = None,
) -> Path:
    """The folder of these sources' tokenised rows, all that can be used; on_bad_row: instead of the configuration's."""
    data = config.data
    heartbeat.beat(f"reading {key}")
    return prepare_rows(
        sources,
        tokenizer=tokenizer,
        form=data.format,
        template=data.template,
        max_length=data.max_length,
        max_prompt_length=data.max_prompt_length,
        on_bad_row=on_bad_row or data.on_bad_row,
        cache_dir=config.cache_dir,
        vocab_size=vocabulary,
        key=key,
        options=text_options(config),
        say=say,
        progress=_tokenising(key),
    )


def tokenised_train_folder(config: Config, tokenizer: Any, vocabulary: int) -> Path:
    """The folder of the rows that are trained on: what the policies of the section inspect leave of data.train.

    Raises UserError where one of them is stop and there is such a finding.
    """
    folder = tokenised_folder(config, tokenizer, vocabulary, config.data.train, TRAIN)
    policies = config.inspect.policies
    if set(policies.values()) == {"keep"}:
        return folder
    rows = open_rows(folder, checksums=False)  # seen to a moment ago
    evals = {}
    if {policies["eval_pairs"], policies["eval_prompts"]} != {"keep"}:
        for key, sources in eval_sets(config).items():
            evals[key] = open_rows(tokenised_folder(config, tokenizer, vocabulary, sources, key), checksums=False)
    heartbeat.beat("looking for what the section inspect names")
    found = all_findings(config, rows, evals, policies)
    refuse_stops(found, policies, TRAIN)
    return without_rows(folder, rows, rows_to_drop(found, policies), key=TRAIN, say=say)


def all_findings(
    config: Config, rows: TokenisedRows, evals: Mapping[str, TokenisedRows], policies: Mapping[str, str] | None
) -> list[DataFinding]:
    """All findings of one data set; what is said of it as a whole is of the rows that the policies leave.

    evals: the sets that it may overlap with; policies: None for an evaluation set, which is left as it is.
    """
    weights = (1.0, 1.0)
    if isinstance(config.loss, KTOLoss):
        weights = (config.loss.desirable_weight, config.loss.undesirable_weight)
    found = list(row_findings(rows, evals))
    return [*found, *set_findings(rows, weights, rows_left(rows.n, found, policies))]


def _tokenising(key: str) -> Callable[[int, int | None], None]:
    """Tells a person and the watchdog how far it is."""
    tell = row_reporter(f"{key}: tokenising")

    def progress(rows: int, total: int | None) -> None:
        heartbeat.beat(f"tokenising {key}, {rows} rows")
        tell(rows, total)

    return progress
