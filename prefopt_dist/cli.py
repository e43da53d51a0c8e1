"""The command line: python -m prefopt_dist STAGE RUN.yaml [section.key=value ...]."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from prefopt_dist import files, shipped
from prefopt_dist.config import Config, load_config, mask_secrets, to_yaml
from prefopt_dist.errors import AgreedUserError, UserError
from prefopt_dist.monitoring.console import print_rank_fault

STAGES = {
    "inspect": "read and tokenise the data, report its faults and lengths",
    "plan": "report the memory, steps, time and disk that the job needs; refuse a job that cannot fit",
    "reference": "run the first pass alone: score the data with the reference into the store",
    "train": "run the whole job: first pass where rows are missing, training, export; resume automatically",
    "evaluate": "compare a model or checkpoint with the reference on data.eval",
    "generate": "sample n responses to each prompt, score them with a reward and write pairs to train on",
    "rounds": "generate and train several times, each round from the model of the previous one",
    "report": "write a page with the curves and findings of a run, from its folder alone",
    "export": "write a checkpoint as a Hugging Face folder and verify it by loading it back",
}
SCRIPTS = {
    "launch": "run a stage on all GPUs of this machine, or on N CPU ranks: prefopt launch [-n N] STAGE RUN.yaml ...",
    "submit": "submit a run to Slurm: prefopt submit RUN.yaml ... (prefopt submit --help)",
}
SINGLE_PROCESS_STAGES = ("inspect", "plan", "report")
"""Stages that run in one process without a process group, load no weights and lock no run folder."""
USER_MISTAKE = 2
"""Exit status for a mistake that the user can correct."""


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit status: 0 done or stopped on request, 2 the user's mistake.

    A crash raises its exception.
    """
    parser = argparse.ArgumentParser(
        prog="prefopt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="stages:\n" + "\n".join(f"  {name:10} {purpose}" for name, purpose in (STAGES | SCRIPTS).items()),
    )
    parser.add_argument("stage", choices=STAGES, metavar="STAGE")
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument(
        "--check",
        action="store_true",
        help="check all that needs no process group, print the run folder and exit",
    )
    # The stage rounds starts this itself: a process that makes the pairs of one round (rounds.ahead).
    parser.add_argument("--answer-round", type=int, help=argparse.SUPPRESS)
    given = parser.parse_intermixed_args(arguments)
    try:
        config = load_config(given.run, given.overrides)
        if given.print_config:
            print(to_yaml(config), end="")
        elif given.check:
            _check(config, given.stage)
        else:
            return _run_reporting_resources(config, given.stage, given.answer_round)
    except UserError as e:
        if os.environ.get("RANK", "0") == "0":
            message = f"error: {mask_secrets(str(e))}"
            print(message, file=sys.stderr, flush=True)
            files.write_status(USER_MISTAKE, message)
        elif not isinstance(e, AgreedUserError):  # the other ranks do not know of it
            print_rank_fault(f"error: {mask_secrets(str(e))}")
        return USER_MISTAKE
    return 0


def _run_reporting_resources(config: Config, stage: str, answer_round: int | None) -> int:
    """Run the stage and return the exit status; a full disk and memory that runs out are the user's mistake (status 2).

    Only the user can free space or choose other settings, and a launcher that starts a crashed job again would not
    help.
    """
    try:
        _run(config, stage, answer_round)
    except UserError:
        raise
    except Exception as e:
        if _ran_out_of_memory(e):
            return USER_MISTAKE
        message = _describe_full_disk(e, config)
        if message is None:
            raise
        print_rank_fault(message)
        files.write_status(USER_MISTAKE, message)  # by any rank: the others do not know of it
        return USER_MISTAKE
    return 0


def _ran_out_of_memory(fault: Exception) -> bool:
    """Return whether memory ran out; then it is reported, and all ranks are asked to end."""
    if "prefopt_dist.distributed.ranks" not in sys.modules:
        return False
    from prefopt_dist.distributed import job_end, out_of_memory

    if not out_of_memory.reported() and not out_of_memory.is_out_of_memory(fault):
        return False
    out_of_memory.report(fault)
    job_end.give_notice()
    return True


def _describe_full_disk(fault: Exception, config: Config) -> str | None:
    folders = [
        ("run.dir", config.run_dir),
        ("run.cache", config.cache_dir),
        ("reference.store", config.reference_store),
        ("export.dir", config.export_dir),
    ]
    text = files.explain_disk_error(fault, folders)
    return None if text is None else f"error: {mask_secrets(text)}"


def _check(config: Config, stage: str) -> None:
    if stage not in SINGLE_PROCESS_STAGES:
        from prefopt_dist.distributed import numerics
        from prefopt_dist.setup import choose_fusion, prepare_models, prepare_rollouts

        if config.train.deterministic:
            numerics.check_deterministic_environment()
        models = prepare_models.check(config, prepare_rollouts.sources_of(config, stage))
        if stage in ("train", "rounds"):
            choose_fusion.refuse_impossible(config, models)
        prepare_rollouts.check_for(config, stage)
    print(config.run_dir)


def _run(config: Config, stage: str, answer_round: int | None) -> None:
    module = importlib.import_module(f"prefopt_dist.commands.{stage}")
    if stage in SINGLE_PROCESS_STAGES:
        module.run(config)
        return
    from prefopt_dist.distributed import job_end, ranks
    from prefopt_dist.setup import memory_advice

    ranks.start(deterministic=config.train.deterministic, run_dir=config.run_dir)
    memory_advice.use(config, stage)
    try:
        config = ranks.run_on_rank_zero(config.with_cache)
        if answer_round is None:
            module.run(config)
        else:
            module.answer_round(config, answer_round)
    except ranks.OtherRankFailed as e:
        raise SystemExit(job_end.asked_status() or 1) from e
    # Not after a crash: with NCCL it would wait for collectives that never come, which would hide the traceback.
    ranks.end()


def _exit(status: int) -> NoReturn:
    """Exit with the status; after a process group by `ranks.exit_now`, which says why."""
    if "prefopt_dist.distributed.ranks" in sys.modules:
        sys.modules["prefopt_dist.distributed.ranks"].exit_now(status)
    sys.exit(status)


def run() -> NoReturn:
    """Run the stage or script that the command line names and exit with its status."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in shipped.SCRIPTS:
        shipped.run_script(arguments[0], arguments[1:])
    sys.argv[1:] = [mask_secrets(argument) for argument in arguments]  # W&B records the command line
    _exit(main(arguments))
