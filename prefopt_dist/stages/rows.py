"""The tokenised rows that every stage reads: made where they are not there, training rows after the findings' policies.

Nothing here needs ranks: one process reads, and all map what it made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt_dist.config import Config, DataSource
from prefopt_dist.config.losses import KTOLoss
from prefopt_dist.data import TokenisedRows, open_rows, prepare_rows
from prefopt_dist.data.options import PairsFrom, TextOptions
from prefopt_dist.data.subset import without
from prefopt_dist.data.template import read_template
from prefopt_dist.data.tokenise import Tokeniser
from prefopt_dist.errors import UserError
from prefopt_dist.inspection.findings import Finding, row_findings, set_findings
from prefopt_dist.inspection.policy import refuse_stops, rows_left, rows_to_drop
from prefopt_dist.tracking import heartbeat
from prefopt_dist.tracking.console import say
from prefopt_dist.tracking.progress import rows_read

TRAIN = "data.train"


def eval_sets(config: Config) -> dict[str, Sequence[DataSource]]:
    """The sources of each evaluation set by its dotted key."""
    return {f"data.eval.{name}".rstrip("."): sources for name, sources in (config.data.eval or {}).items()}


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
        pairs_from=None if data.pairs_from is None else PairsFrom(**vars(data.pairs_from)),
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


def prepared(
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


def prepared_train(config: Config, tokenizer: Any, vocabulary: int) -> Path:
    """The folder of the rows that are trained on: what the policies of the section inspect leave of data.train.

    Raises UserError where one of them is stop and there is such a finding.
    """
    folder = prepared(config, tokenizer, vocabulary, config.data.train, TRAIN)
    policies = config.inspect.policies
    if set(policies.values()) == {"keep"}:
        return folder
    rows = open_rows(folder, checksums=False)  # seen to a moment ago
    evals = {}
    if {policies["eval_pairs"], policies["eval_prompts"]} != {"keep"}:
        for key, sources in eval_sets(config).items():
            evals[key] = open_rows(prepared(config, tokenizer, vocabulary, sources, key), checksums=False)
    heartbeat.beat("looking for what the section inspect names")
    found = find(config, rows, evals, policies)
    refuse_stops(found, policies, TRAIN)
    return without(folder, rows, rows_to_drop(found, policies), key=TRAIN, say=say)


def find(
    config: Config, rows: TokenisedRows, evals: Mapping[str, TokenisedRows], policies: Mapping[str, str] | None
) -> list[Finding]:
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
    tell = rows_read(f"{key}: tokenising")

    def progress(rows: int, total: int | None) -> None:
        heartbeat.beat(f"tokenising {key}, {rows} rows")
        tell(rows, total)

    return progress
