"""The stages' door: python -m prefopt_dist STAGE RUN.yaml [section.key=value ...]."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from prefopt_dist import files
from prefopt_dist.config import Config, load_config, mask_secrets, to_yaml
from prefopt_dist.errors import AgreedUserError, UserError
from prefopt_dist.monitoring.console import rank_fault

STAGES = {
    "inspect": "read and tokenise the data, report what is wrong with it and how long it is",
    "plan": "what the job needs on a machine: memory, steps, time, disk; refuse what cannot fit",
    "reference": "the first pass alone: score the data with the reference into the store",
    "train": "the whole job: first pass where rows are missing, training, export; resumes by itself",
    "evaluate": "a model or checkpoint against the reference on data.eval",
    "generate": "prompts, n responses each, a reward: pairs to train on",
    "rounds": "generate and train, several times over, each round from the model of the one before",
    "report": "a page with the curves and the diagnosis of a run, from its folder alone",
    "export": "a checkpoint to a Hugging Face folder, verified by loading it back",
}
ALONE = ("inspect", "plan", "report")
"""Stages of one process without a process group, which need no weights and hold no run folder."""
USER_MISTAKE = 2


def main(arguments: Sequence[str]) -> int:
    """The process's exit status: 0 done or stopped on request, 2 the user's mistake; a crash raises."""
    parser = argparse.ArgumentParser(
        prog="prefopt_dist",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="stages:\n" + "\n".join(f"  {name:10} {what}" for name, what in STAGES.items()),
    )
    parser.add_argument("stage", choices=STAGES, metavar="STAGE")
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--print-config", action="store_true", help="show the resolved configuration and end")
    parser.add_argument(
        "--check", action="store_true", help="check everything that needs no ranks, print the run folder and end"
    )
    asked = parser.parse_intermixed_args(arguments)
    try:
        config = load_config(asked.run, asked.overrides)
        if asked.print_config:
            print(to_yaml(config), end="")
        elif asked.check:
            _check(config, asked.stage)
        else:
            return _run_on_disks(config, asked.stage)
    except UserError as e:
        if os.environ.get("RANK", "0") == "0":
            message = f"error: {mask_secrets(str(e))}"
            print(message, file=sys.stderr, flush=True)
            _leave_status(USER_MISTAKE, message)
        elif not isinstance(e, AgreedUserError):  # nobody else knows of it
            rank_fault(f"error: {mask_secrets(str(e))}")
        return USER_MISTAKE
    return 0


def _run_on_disks(config: Config, stage: str) -> int:
    """Runs the stage; a full disk is the user's to mend, and starting again by itself would not help."""
    try:
        _run(config, stage)
    except UserError:
        raise
    except Exception as e:
        told = _full_disk(e, config)
        if told is None:
            raise
        rank_fault(told)
        _leave_status(USER_MISTAKE, told)  # whichever rank met it
        return USER_MISTAKE
    return 0


def _full_disk(fault: Exception, config: Config) -> str | None:
    folders = [
        ("run.dir", config.run_dir),
        ("run.cache", config.cache_dir),
        ("reference.store", config.reference_store),
        ("export.dir", config.export_dir),
    ]
    text = files.explain_disk_error(fault, folders)
    return None if text is None else f"error: {mask_secrets(text)}"


def _check(config: Config, stage: str) -> None:
    if stage not in ALONE:
        from prefopt_dist.setup import prepare_models, prepare_rollouts

        prepare_models.check(config, prepare_rollouts.sources_of(config, stage))
        prepare_rollouts.check_for(config, stage)
    print(config.run_dir)


def _run(config: Config, stage: str) -> None:
    module = importlib.import_module(f"prefopt_dist.commands.{stage}")
    if stage in ALONE:
        module.run(config)
        return
    from prefopt_dist.distributed import ranks

    ranks.start()
    try:
        module.run(ranks.run_on_rank_zero(config.with_cache))
    except ranks.OtherRankFailed as e:
        raise SystemExit(1) from e
    # Not after a crash: with NCCL it would wait for collectives that never come, and hide the traceback.
    ranks.end()


def _leave(status: int) -> NoReturn:
    """Not by the interpreter's own end where there was a process group: see ranks.exit_now."""
    if "prefopt_dist.distributed.ranks" in sys.modules:
        sys.modules["prefopt_dist.distributed.ranks"].leave(status)
    sys.exit(status)


def _leave_status(status: int, message: str) -> None:
    """For the launcher: torchrun turns every status into 1, and its own block of text buries the message."""
    file = os.environ.get("PREFOPT_STATUS_FILE")
    if file:
        # An argument that is no UTF-8 has lone surrogates, and so has the message that shows it.
        Path(file).write_text(f"{status}\n{message}\n", encoding="utf-8", errors="backslashreplace")


def run() -> NoReturn:
    """Run the stage that the command line names and end the process with its status."""
    given = sys.argv[1:]
    sys.argv[1:] = [mask_secrets(argument) for argument in given]  # W&B records the command line
    _leave(main(given))
