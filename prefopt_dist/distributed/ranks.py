"""The process group, decisions that are taken once, and folders that all nodes must share."""

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

from prefopt_dist.errors import AgreedUserError, UserError
from prefopt_dist.monitoring import heartbeat

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""Long enough for what one rank does alone (tokenising, exporting) while the others wait for its word."""


class OtherRankFailed(RuntimeError):
    """Another rank has said what is wrong; this one only ends."""


def start() -> None:
    """Joins the process group of torchrun, or makes one of a single process where there is no torchrun.

    Raises UserError where the launcher has found GPUs that torch cannot use.
    """
    _refuse_unusable_gpus()
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
    logging.disable_progress_bar()  # bars of every rank, across each other

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo", timeout=COLLECTIVE_TIMEOUT, verbose=False
    )


def _refuse_unusable_gpus() -> None:
    """Or a job that holds GPUs would compute on the CPU."""
    if not os.environ.get("PREFOPT_WANT_GPUS") or torch.cuda.is_available():
        return
    why = "it is built without CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda}, see the driver"
    raise UserError(
        f"{socket.gethostname()}: this job is to compute on GPUs, and torch {torch.__version__} finds none ({why}). "
        "Install a torch that can use them, or hide them with CUDA_VISIBLE_DEVICES= (empty) to compute on the CPU."
    )


def end() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_now(status: int) -> NoReturn:
    """Ends this process now, with its work done and told.

    The interpreter's own end destroys C++ threads of torch in no order: about one process in ten that held a
    gloo group then aborted ("terminate called without an active exception"), and a finished job looked crashed.
    """
    atexit._run_exitfuncs()  # logging, W&B
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def rank() -> int:
    """This process's rank."""
    return dist.get_rank()


def world_size() -> int:
    """The number of ranks."""
    return dist.get_world_size()


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def all_gather(value: T) -> list[T]:
    """Every rank's picklable value, by rank, on every rank. Also a barrier."""
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def run_on_rank_zero(what: Callable[[], T]) -> T:
    """Runs `what`, which holds no collective, on rank 0 alone and gives its result to every rank.

    If it raises, every rank ends.
    """
    box: list[Any] = [None, None]
    error: Exception | None = None
    if rank() == 0:
        try:
            with heartbeat.alone():
                box = [what(), None]
        except Exception as e:  # told to the others below, then raised again here
            error = e
            box = [None, _told(e)]
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        _raise(box[1], error)
    result: T = box[0]
    return result


def run_on_all_ranks(what: Callable[[], T]) -> T:
    """Runs `what`, which holds no collective, on every rank; if it raises on one, every rank ends."""
    result: Any = None
    error: Exception | None = None
    try:
        with heartbeat.alone():
            result = what()
    except Exception as e:  # told to the others below, then raised again here
        error = e
    for r, told in enumerate(all_gather(None if error is None else _told(error))):
        if told is not None:
            of_the_user, text = told
            # What all ranks found alike needs no rank in front.
            _raise((of_the_user, text if r == 0 else f"rank {r}: {text}"), error)
    answer: T = result
    return answer


def _told(error: Exception) -> tuple[bool, str]:
    """What the other ranks hear of an error: whether it is the user's, and its text."""
    of_the_user = isinstance(error, UserError)
    return of_the_user, str(error) if of_the_user else f"{type(error).__name__}: {error}"


def _raise(told: tuple[bool, str], own: Exception | None) -> NoReturn:
    """Every rank raises: a crash of its own as it was, everything else as it was told."""
    of_the_user, text = told
    if of_the_user:
        raise AgreedUserError(text) from own
    if own is not None:
        raise own
    raise OtherRankFailed(text)


def require_shared_folder(folder: Path, key: str, *, remedy: str) -> None:
    """All ranks: refuses a folder of which some node has another one of the same name. It must exist on rank 0."""

    def leave() -> Path:
        mark = folder / f".seen-{secrets.token_hex(4)}"
        try:
            mark.touch()
        except OSError as e:
            raise UserError(f"{key}: {folder} cannot be written ({e.strerror}). {remedy}") from e
        return mark

    mark = run_on_rank_zero(leave)
    try:

        def look() -> None:
            if not os.path.exists(mark):
                raise UserError(
                    f"{key}: {folder} on {socket.gethostname()} is not the folder that the first node has: "
                    f"it must be on a disk that all nodes share. {remedy}"
                )

        run_on_all_ranks(look)
    finally:
        if rank() == 0:
            mark.unlink(missing_ok=True)
