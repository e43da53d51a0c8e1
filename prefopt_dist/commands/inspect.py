"""`inspect`: read and tokenise the data, report what is wrong with it and how long it is; needs no model weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from prefopt_dist.config import Config
from prefopt_dist.data import TokenisedRows, open_rows
from prefopt_dist.data.equal_rows import group_equal, prompt_keys
from prefopt_dist.data.prepare import stop_error
from prefopt_dist.data.quality.lengths import draw_lengths, matplotlib_figure
from prefopt_dist.data.quality.policy import refuse_stops
from prefopt_dist.data.quality.report import SetReport
from prefopt_dist.data.quality.show import ShownRow, row_text, show_rows
from prefopt_dist.errors import UserError
from prefopt_dist.files import write_json
from prefopt_dist.model.folder import read_language_config, resolve
from prefopt_dist.model.load import load_tokenizer
from prefopt_dist.monitoring.console import say, show
from prefopt_dist.objectives.factory import make_objective
from prefopt_dist.setup.checks import eval_sets
from prefopt_dist.setup.prepare_data import (
    TRAIN,
    all_findings,
    check_rows,
    rows_for_loss,
    tokenised_folder,
    tokeniser_of,
)
from prefopt_dist.setup.template_notices import template_notices


def run(config: Config) -> None:
    """Inspect the data in one process, without a process group."""
    if config.inspect.picture is not None:
        matplotlib_figure()
    tokenizer = load_tokenizer(resolve(config.tokenizer, "model.tokenizer", weights=False), "model.tokenizer")
    for notice in template_notices(config, tokenizer, tokeniser_of(config, tokenizer).template):
        say(notice)
    sets = _read(config, tokenizer)
    evals = {key: rows for key, rows in sets.items() if key != TRAIN}
    found = {
        key: all_findings(config, rows, evals, config.inspect.policies)
        if key == TRAIN
        else all_findings(config, rows, {}, None)
        for key, rows in sets.items()
    }
    reports = {
        key: SetReport.of(
            key,
            rows,
            found[key],
            config.inspect.policies if key == TRAIN else None,
            config.data.on_bad_row,
            len(group_equal(prompt_keys(rows)).first),
        )
        for key, rows in sets.items()
    }
    for report in reports.values():
        show(report.text())
    for refusal in _refused_by_loss(config, sets):
        show(refusal)
    shown = {key: show_rows(key, rows, tokenizer, config.inspect.show) for key, rows in sets.items()}
    for key, some in shown.items():
        for one in some:
            show(row_text(one, sets[key].kind, tokenizer))
    _write(config, reports, [one for some in shown.values() for one in some])
    for rows in sets.values():
        if config.data.on_bad_row == "stop" and rows.report.first_fault is not None:
            raise stop_error(rows.report.first_fault)
    refuse_stops(found[TRAIN], config.inspect.policies, TRAIN)


def _refused_by_loss(config: Config, sets: Mapping[str, TokenisedRows]) -> list[str]:
    """Return a line for each data set that the loss cannot use: a training would find it after its start."""
    objective = make_objective(config.loss, torch.float32)
    refused = []
    for key, rows in sets.items():
        try:
            check_rows(rows, objective, key)
            rows_for_loss(config, rows, key)
        except UserError as error:
            refused.append(f"loss.name={config.loss.name}: `train` refuses these rows: {error}")
    return refused


def _read(config: Config, tokenizer: Any) -> dict[str, TokenisedRows]:
    """Return the data sets by dotted key, without unusable rows: stopping at the first one would hide the others."""
    model_key = "model.name_or_path"
    vocabulary = read_language_config(
        resolve(config.model.name_or_path, model_key, weights=False), model_key
    ).vocab_size
    sets = {TRAIN: config.data.train, **eval_sets(config)}
    folders = {
        key: tokenised_folder(config, tokenizer, vocabulary, sources, key, "drop") for key, sources in sets.items()
    }
    return {key: open_rows(folder, checksums=False) for key, folder in folders.items()}


def _write(config: Config, reports: Mapping[str, SetReport], shown: Sequence[ShownRow]) -> None:
    if config.inspect.file is not None:
        file = Path(config.inspect.file)
        try:
            body: dict[str, Any] = {key: report.as_json() for key, report in reports.items()}
            write_json(file, body | ({"shown": [one.as_json() for one in shown]} if config.inspect.show else {}))
        except OSError as e:
            raise UserError(
                f"inspect.file: {file} cannot be written ({e.strerror}). Choose a folder that exists."
            ) from e
        say(f"written: {file}")
    if config.inspect.picture is not None:
        lengths = {key: report.lengths for key, report in reports.items()}
        draw_lengths(Path(config.inspect.picture), lengths, config.data.max_length)
        say(f"drawn: {config.inspect.picture}")
