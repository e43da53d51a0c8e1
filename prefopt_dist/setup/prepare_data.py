"""Tokenise a run's data sets once, map them on all ranks, and check them against models and loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prefopt_dist.batching.order import Order
from prefopt_dist.batching.weights import refuse_set_without_weight, refuse_steps_without_weight
from prefopt_dist.checkpoint.run_folder import SHOWN
from prefopt_dist.config import Config, DataSource
from prefopt_dist.config.losses import KTOLoss, ld_alpha_of
from prefopt_dist.config.ranked_losses import RankedLoss
from prefopt_dist.data import DamagedRows, TokenisedRows, open_rows, prepare_rows
from prefopt_dist.data.derived import PromptTooFrequent, build_unpaired_rows, without_rows
from prefopt_dist.data.options import TextOptions
from prefopt_dist.data.prefixes import build_prefixed_rows
from prefopt_dist.data.quality.findings import DataFinding, row_findings, set_findings
from prefopt_dist.data.quality.policy import refuse_stops, rows_left, rows_to_drop
from prefopt_dist.data.quality.show import row_text, rows_for_report, show_rows
from prefopt_dist.data.template import read_template
from prefopt_dist.data.tokenise import Tokeniser
from prefopt_dist.data.workers import ALONE, Share
from prefopt_dist.distributed import ranks
from prefopt_dist.distributed.long_work import run_on_node_leaders
from prefopt_dist.errors import AgreedUserError, UserError
from prefopt_dist.files import write_json
from prefopt_dist.model.rotary import length_dependent_types
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.monitoring.console import row_reporter, say
from prefopt_dist.objectives import Objective
from prefopt_dist.setup import checks
from prefopt_dist.setup.checks import eval_sets
from prefopt_dist.setup.prepare_models import Models
from prefopt_dist.setup.template_notices import template_notices

TRAIN = "data.train"
REPORTED_ROWS = 2
"""Number of rows of data.train that the report shows; the start of a training shows the first of them."""


def load_train(config: Config, models: Models, objective: Objective) -> TokenisedRows:
    """Tokenise the training set on rank 0, map it on all ranks and check it (all ranks call it)."""
    tokenizer = models.tokenizer
    for notice in ranks.run_on_rank_zero(
        lambda: template_notices(config, tokenizer, tokeniser_of(config, tokenizer).template)
    ):
        say(notice)
    say(f"data: reading {', '.join(s.path for s in config.data.train)}")
    make = partial(tokenised_train_folder, config, models.tokenizer, models.policy.config.vocab_size)
    return _load_set(config, models, objective, make, TRAIN)


def load_evals(config: Config, models: Models, objective: Objective) -> dict[str, TokenisedRows]:
    """Tokenise the evaluation sets on rank 0, map and check them; return them by name (all ranks call it)."""
    evals = {}
    for name, (key, sources) in zip(config.data.eval or {}, eval_sets(config).items(), strict=True):
        make = partial(tokenised_folder, config, models.tokenizer, models.policy.config.vocab_size, sources, key)
        evals[name] = _load_set(config, models, objective, make, key)
        refuse_set_without_weight(evals[name], key)
    if not evals:
        say("data.eval is not set, so nothing is evaluated")
    return evals


def plan_steps(config: Config, rows: TokenisedRows) -> tuple[Order, int]:
    """Return the order of the training rows and the number of steps.

    Raises:
        AgreedUserError: all rows of a step have the weight 0.
    """
    order = Order.of_run(rows.source, rows.weights, config.run.seed, config.train.global_batch_pairs)
    steps = order.total_steps(config.train.epochs, config.train.max_steps)
    refuse_steps_without_weight(rows, order, steps)
    return order, steps


def _load_set(
    config: Config, models: Models, objective: Objective, make: Callable[..., Path], key: str
) -> TokenisedRows:
    """Make a data set on rank 0, map it on all ranks, check it and return it as the loss reads it (all ranks call it).

    Args:
        config: the configuration.
        models: of the run.
        objective: of the training.
        make: tokenises the share of a node in the data set and returns its folder.
        key: the data set's dotted key; of the training set a row is shown.
    """
    rows = _open(make)
    say(f"{key}: {rows.report.text()}")
    if key == TRAIN:
        _show_first_rows(config, models, rows)
    _check_beside_models(models, rows, objective, key)
    check_rows(rows, objective, key)
    for_loss = rows_for_loss(config, rows, key)
    ranks.run_on_rank_zero(
        lambda: checks.check_lengths(config, for_loss, objective, key, trained=key == TRAIN, path=models.path)
    )
    return for_loss


def _show_first_rows(config: Config, models: Models, rows: TokenisedRows) -> None:
    """Print the first row of data.train as the model sees it, and write the first ones for the report (all ranks)."""
    shown = show_rows(TRAIN, rows, models.tokenizer, REPORTED_ROWS)
    say(row_text(shown[0], rows.kind, models.tokenizer))
    body = rows_for_report(shown, rows.kind, models.tokenizer)

    def write() -> None:
        if config.run_dir.is_dir():  # a stage has opened it
            write_json(config.run_dir / SHOWN, body)

    ranks.run_on_rank_zero(write)


def _check_beside_models(models: Models, rows: TokenisedRows, objective: Objective, key: str) -> None:
    """Raise UserError for tokens that the reference lacks, and report rows beyond a model's positions.

    All ranks call it.
    """
    if objective.needs_reference and models.reference.path != models.policy.path:
        ranks.run_on_rank_zero(partial(checks.check_reference_vocabulary, models.reference, rows, key))
    lengths = rows.lengths()
    longest = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    for model in {models.policy.path: models.policy, models.reference.path: models.reference}.values():
        positions = getattr(model.config, "max_position_embeddings", None)  # not every model family has it
        if "dynamic" in length_dependent_types(model.config):  # it is made for positions beyond
            continue
        beyond = np.flatnonzero(longest > positions) if positions is not None else ()
        if len(beyond):
            first = ", ".join(rows.origin(int(i)) for i in beyond[:3])
            say(
                f"{key}: {len(beyond)} rows are longer than the {positions} positions of {model.key} "
                f"(max_position_embeddings), the first: {first}; lower data.max_length to {positions}"
            )


def data_facts(train: TokenisedRows, evals: dict[str, TokenisedRows]) -> dict[str, Any]:
    """Return the section of run.json about the data, with evaluation sets under their names if they have names."""
    reports = {name: rows.report.as_run_json() for name, rows in evals.items()}
    return {"train": train.report.as_run_json(), "eval": reports.get("", reports or None)}


def _open(make: Callable[..., Path]) -> TokenisedRows:
    """Call `make` on the first rank of each node and open the rows in the folder (all ranks call it)."""
    folder = run_on_node_leaders(lambda node: make(share=Share(node.number, node.nodes, node.look)))

    def open_here() -> TokenisedRows:
        try:
            return open_rows(folder, checksums=ranks.rank() == 0)
        except (DamagedRows, OSError) as e:
            raise UserError(
                f"run.cache: {folder} cannot be read here ({e}). All nodes must see the same run.cache."
            ) from e

    return ranks.run_on_all_ranks(open_here)


def check_rows(rows: TokenisedRows, objective: Objective, key: str) -> None:
    """Raise an error for data that the loss cannot use; key: the data set's dotted key."""
    if rows.responses < min(objective.responses, 2):
        raise AgreedUserError(
            f"{key}: the rows are of the form {rows.kind!r}, with one response each, but this loss compares two. "
            f"Give pairs, or set loss.name={'kto' if rows.kind == 'rated' else 'sft'}."
        )


def rows_for_loss(config: Config, rows: TokenisedRows, key: str) -> TokenisedRows:
    """Return the rows as the loss reads them.

    For KTO these are rated rows with mismatched responses, for LD-DPO pairs with the beginnings of their responses.

    Raises:
        AgreedUserError: the loss cannot use the rows.
    """
    if not isinstance(config.loss, KTOLoss):
        return rows if ld_alpha_of(config.loss) is None else build_prefixed_rows(rows)
    if rows.kind == "demonstration" or (rows.kind == "pair" and not config.loss.split_pairs):
        raise AgreedUserError(
            f"{key}: the rows are of the form {rows.kind!r}, but the loss kto reads rows with prompt, completion and "
            "label. Give such rows, or pairs and loss.split_pairs=true."
        )
    compared = config.loss.reference_point == "mean"
    if compared and rows.n * rows.responses < 2:
        raise AgreedUserError(
            f"{key}: got {rows.n} row, but the loss kto needs at least two, since it compares a row with another one. "
            "Give more rows."
        )
    try:
        return build_unpaired_rows(rows, config.data.max_length, mismatched=compared)
    except PromptTooFrequent as found:
        raise AgreedUserError(
            f"{key}: {found} rows answer the same prompt, but the loss kto compares each row with a response to "
            "another prompt, so no prompt may have more than half of the rows. Give rows of more prompts."
        ) from None


def text_options(config: Config) -> TextOptions:
    """Return the settings by which the texts of rows and prompts become tokens.

    Raises:
        UserError: data.chat_template cannot be read, or data.pairs_from pairs rows of which the loss takes all answers.
    """
    data = config.data
    ranked = isinstance(config.loss, RankedLoss)
    if ranked and data.pairs_from is not None and data.pairs_from.pairing != "best_worst":
        raise UserError(
            f"data.pairs_from.pairing: got {data.pairs_from.pairing}, but the loss {config.loss.name} takes all "
            "answers of a row, so none is drawn; remove it, or take a loss on pairs"
        )
    return TextOptions(
        template_date=data.template_date,
        learn=data.learn,
        system=data.system,
        thinking=data.thinking,
        chat_template=None if data.chat_template is None else _template_file(data.chat_template),
        template_kwargs=tuple((data.template_kwargs or {}).items()),
        columns=tuple((data.columns or {}).items()),
        pairs_from=data.pairs_from,
        weight=data.weight,
        margin=data.margin,
        ranked=ranked,
    )


def _template_file(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.chat_template: {path} cannot be read ({error}); give a UTF-8 file with a chat template"
        ) from error


def tokeniser_of(config: Config, tokenizer: Any) -> Tokeniser:
    """Return the tokeniser of the configuration, which is the same for training and for sampling."""
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
    *,
    share: Share = ALONE,
) -> Path:
    """Tokenise the usable rows of some sources into the cache, and return their folder.

    On another node than the first the folder may not be complete yet.

    Args:
        config: the configuration.
        tokenizer: of model.tokenizer.
        vocabulary: number of tokens of the policy.
        sources: the data sources.
        key: their dotted key.
        on_bad_row: `stop` or `drop`; None for the configuration's value.
        share: the share of this node, where several nodes do it together.
    """
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
        share=share,
    )


def tokenised_train_folder(config: Config, tokenizer: Any, vocabulary: int, *, share: Share = ALONE) -> Path:
    """Tokenise data.train, drop rows by the policies of the section inspect, and return the folder of the others.

    On another node than the first it does the node's share of the tokenising alone, and returns another folder.

    Raises:
        UserError: there is a finding whose policy is stop.
    """
    folder = tokenised_folder(config, tokenizer, vocabulary, config.data.train, TRAIN, share=share)
    policies = config.inspect.policies
    if set(policies.values()) == {"keep"} or share.node > 0:
        return folder
    rows = open_rows(folder, checksums=False)  # `tokenised_folder` has just checked them
    evals = {}
    if {policies["eval_pairs"], policies["eval_prompts"]} != {"keep"}:
        for key, sources in eval_sets(config).items():
            evals[key] = open_rows(tokenised_folder(config, tokenizer, vocabulary, sources, key), checksums=False)
    heartbeat.beat("inspecting the data")
    found = all_findings(config, rows, evals, policies)
    refuse_stops(found, policies, TRAIN)
    return without_rows(folder, rows, rows_to_drop(found, policies), key=TRAIN, say=say)


def all_findings(
    config: Config, rows: TokenisedRows, evals: Mapping[str, TokenisedRows], policies: Mapping[str, str] | None
) -> list[DataFinding]:
    """Return all findings of one data set; those about the whole set are of the rows that the policies do not drop.

    Args:
        config: the configuration.
        rows: of the data set.
        evals: the evaluation sets that it may overlap with, by dotted key.
        policies: by the keys of the section inspect; None for an evaluation set, from which no row is dropped.
    """
    weights = (1.0, 1.0)
    if isinstance(config.loss, KTOLoss):
        weights = (config.loss.desirable_weight, config.loss.undesirable_weight)
    found = list(row_findings(rows, evals))
    return [*found, *set_findings(rows, weights, rows_left(rows.n, found, policies))]


def _tokenising(key: str) -> Callable[[int, int | None], None]:
    """Return a function that reports progress in rows to the terminal and to the watchdog."""
    tell = row_reporter(f"{key}: tokenising")

    def progress(rows: int, total: int | None) -> None:
        heartbeat.beat(f"tokenising {key}, {rows} rows")
        tell(rows, total)

    return progress
