"""The process group, decisions that are made once for all ranks, and folders that all nodes must share."""

from __future__ import annotations

import atexit
import os
import secrets
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from prefopt_dist.distributed import driver, flight_recorder, job_end, numerics
from prefopt_dist.errors import AgreedUserError, UserError
from prefopt_dist.monitoring import heartbeat

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""Long enough for the work of one rank alone (tokenising, exporting) while the others wait in a collective."""


class OtherRankFailed(RuntimeError):
    """The failure of another rank, which has reported it; this rank only ends."""


def start(*, deterministic: bool = False, run_dir: Path | None = None) -> None:
    """Join the process group of torchrun; without torchrun make a group of one process.

    Args:
        deterministic: `train.deterministic` of the configuration.
        run_dir: folder of the run, where NCCL's time-outs leave a trace; None without a run.

    Raises:
        UserError: the launcher has found GPUs that torch cannot use, or the environment contradicts `deterministic`.
    """
    _refuse_unusable_gpus()
    numerics.flush_denormals()
    numerics.use_full_float32()
    if deterministic:
        numerics.use_deterministic_algorithms()
    if run_dir is not None:
        flight_recorder.set_environment(run_dir)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    import deepspeed
    from transformers.utils import logging

    from prefopt_dist.distributed import zero3

    zero3.prepare_deepspeed()
    logging.disable_progress_bar()  # the bars of all ranks would overwrite each other

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo", timeout=COLLECTIVE_TIMEOUT, verbose=False
    )
    job_end.watch()


def _refuse_unusable_gpus() -> None:
    """Raise UserError where torch cannot use the job's GPUs; else the job would hold them and compute on the CPU."""
    if not os.environ.get("PREFOPT_WANT_GPUS") or torch.cuda.is_available():
        return
    raise UserError(
        f"{socket.gethostname()}: this job must compute on GPUs, but torch {torch.__version__} finds none here: "
        f"{driver.why_no_gpu()} Or hide them with CUDA_VISIBLE_DEVICES= (empty) to compute on the CPU."
    )


def end() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        job_end.unwatch()
        dist.destroy_process_group()


def exit_now(status: int) -> NoReturn:
    """End this process at once, after its work is done and reported.

    The interpreter's own end destroys torch's C++ threads in any order. About one in ten processes with a gloo group
    aborted then ("terminate called without an active exception"), and a finished job looked like a crashed one.
    """
    atexit._run_exitfuncs()  # logging, W&B
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def rank() -> int:
    """Return this process's rank."""
    return dist.get_rank()


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size()


def device() -> torch.device:
    """Return the device on which this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def all_gather(value: T) -> list[T]:
    """Return the picklable values of all ranks, in the order of the ranks (all ranks call it); it is also a barrier."""
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def run_on_rank_zero(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 alone and return its result on every rank (all ranks call it).

    If it raises, every rank raises: AgreedUserError for a UserError, else rank 0 the exception itself and the other
    ranks OtherRankFailed.

    Args:
        function: it must not contain a collective; its result must be picklable.
    """
    box: list[Any] = [None, None]
    error: Exception | None = None
    if rank() == 0:
        try:
            with heartbeat.alone():
                box = [function(), None]
        except Exception as e:  # sent to the other ranks below, then raised again here
            error = e
            box = [None, _report(e)]
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        _raise(box[1], error)
    result: T = box[0]
    return result


def run_on_all_ranks(function: Callable[[], T]) -> T:
    """Call `function` on every rank and return this rank's result (all ranks call it).

    If it raises on one rank, every rank raises, as in `run_on_rank_zero`.

    Args:
        function: it must not contain a collective.
    """
    result: Any = None
    error: Exception | None = None
    try:
        with heartbeat.alone():
            result = function()
    except Exception as e:  # sent to the other ranks below, then raised again here
        error = e
    for r, report in enumerate(all_gather(None if error is None else _report(error))):
        if report is not None:
            is_user_error, text = report
            # Rank 0's fault is usually one of all ranks, so its rank is not named.
            _raise((is_user_error, text if r == 0 else f"rank {r}: {text}"), error)
    answer: T = result
    return answer


def _report(error: Exception) -> tuple[bool, str]:
    """Return what the other ranks get to know of an error: whether it is a UserError, and its text."""
    is_user_error = isinstance(error, UserError)
    return is_user_error, str(error) if is_user_error else f"{type(error).__name__}: {error}"


def _raise(report: tuple[bool, str], own: Exception | None) -> NoReturn:
    """Raise a reported error: a UserError on every rank alike, else this rank's own exception or OtherRankFailed."""
    is_user_error, text = report
    if is_user_error:
        raise AgreedUserError(text) from own
    if own is not None:
        raise own
    raise OtherRankFailed(text)


def require_shared_folder(folder: Path, key: str, *, remedy: str) -> None:
    """Raise UserError where a node has a different folder of the same name (all ranks call it).

    Args:
        folder: the folder, which must exist on rank 0.
        key: the configuration key that names it, for the message.
        remedy: last sentence of the message.
    """

    def make_marker() -> Path:
        marker = folder / f".seen-{secrets.token_hex(4)}"
        try:
            marker.touch()
        except OSError as e:
            raise UserError(f"{key}: {folder} cannot be written ({e.strerror}). {remedy}") from e
        return marker

    marker = run_on_rank_zero(make_marker)
    try:

        def require_marker() -> None:
            if not os.path.exists(marker):
                raise UserError(
                    f"{key}: {folder} on {socket.gethostname()} is not the folder of the first node; "
                    f"it must be on a disk that all nodes share. {remedy}"
                )

        run_on_all_ranks(require_marker)
    finally:
        if rank() == 0:
            marker.unlink(missing_ok=True)
