"""Preference data: accepted forms, chat templates, tokenisation and the tokenised rows on disk."""

from prefopt_dist.data.column_files import DamagedRows, open_rows
from prefopt_dist.data.dataset import TokenisedRows, sequence_digest
from prefopt_dist.data.prepare import prepare_rows
from prefopt_dist.data.row_counts import DataReport
from prefopt_dist.data.template import PLAIN_TEMPLATE

__all__ = [
    "PLAIN_TEMPLATE",
    "DamagedRows",
    "DataReport",
    "TokenisedRows",
    "open_rows",
    "prepare_rows",
    "sequence_digest",
]
