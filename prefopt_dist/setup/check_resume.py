"""The check that a resumed run finds the weights and the data with which it began."""

from __future__ import annotations

from typing import Any

from prefopt_dist.checkpoint.manifest import Manifest
from prefopt_dist.config import Config
from prefopt_dist.errors import AgreedUserError

DATA = (
    "the data files, the tokenizer, (for inspect.eval_…=drop) data.eval, or this version of prefopt_dist, which may "
    "read such rows otherwise (docs/data.md),"
)
"""All that decides the tokens besides the configuration"""


def check_resume(config: Config, found: Manifest | None, facts: dict[str, Any]) -> None:
    """Raise AgreedUserError for a checkpoint of other weights or data, or where none may be resumed (all ranks).

    Args:
        config: the configuration.
        found: the newest sound checkpoint; None where there is none.
        facts: what a resume must find unchanged.
    """
    if found is None:
        return
    if config.checkpoint.resume == "never":
        raise AgreedUserError(
            f"checkpoint.resume: never, but {config.run_dir} has a checkpoint of step {found.step}. "
            "Choose another run.dir, or set checkpoint.resume=auto."
        )
    for name, key, what in (
        ("base_key", "model.name_or_path", "the weights or the configuration of the base model's folder"),
        ("start_key", "lora.from", "the weights or the settings of the adapter"),
        ("reference_key", "reference", "the weights or the configuration of the model folder"),
        ("data_digest", "data.train", DATA),
    ):
        if name in facts and found.facts[name] != facts[name]:
            raise AgreedUserError(
                f"{key}: this run began with {name} {found.facts[name]}, and {what} now give {facts[name]}. "
                "Put them back as they were, or start a new run."
            )
