"""Decoder layers compiled one by one: one graph for all layers of a kind, for any length of the packed row.

Only the training's forward pass with gradients is compiled: what is computed without gradients (the first pass,
evaluation, answers) calls the layers as they are, and so does a row of one token.

- A layer is compiled as a whole and called from its module's `forward`, so ZeRO-3's hooks stay outside of the graph:
  they gather the whole layer (`zero3.gather_whole`), and under activation checkpointing they come before the layer is
  computed again.
- The compiler gets the row's length as an unknown number, with the same guess of its size (`GUESSED_TOKENS`) in every
  run. The code that it writes depends on the guess, so a resumed run computes the same bits, with a filled or an empty
  cache. Of a known length it would ask whether it exceeds some bounds, by which rows would need code of their own.
- A graph that breaks, or one more kind of layer than `MOST_KINDS`, is an error and no silent fallback.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import struct
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from prefopt_dist.distributed import zero3
from prefopt_dist.model.parts import decoder_layers

GUESSED_TOKENS = 4096
"""The length of a row for which the compiler chooses loops and the number of threads; any length is computed."""
MOST_KINDS = 32
"""Graphs of a model at most."""
BACKEND = "inductor"
"""Name of torch's compiler; a test takes one that writes no code."""
TURNED_OFF = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")
"""Variables by which torch calls the layers as they are, without a word."""
IMAGES = (torch.channels_last, torch.channels_last_3d)
FOLDER = "compiled"
"""Folder of compiled code in the cache."""


def compile_layers(lm: PreTrainedModel) -> None:
    """Let the decoder's layers be compiled at their first use with gradients.

    Call it before the engine is made, and after adapters are attached.
    """
    layers = decoder_layers(lm)
    zero3.gather_whole(layers)
    for layer in layers:
        layer.forward = partial(_forward, layer)
        layer.register_forward_pre_hook(_with_gradient)


def is_compiled(lm: PreTrainedModel) -> bool:
    """Return whether `compile_layers` has been called."""
    return any("forward" in vars(layer) for layer in decoder_layers(lm))


def takes(tokens: int) -> bool:
    """Return whether a row of so many tokens is computed by compiled layers at this moment."""
    # A compiler takes a size of 1 for a constant.
    return tokens > 1 and torch.is_grad_enabled()


def _with_gradient(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Let the first layer's input need a gradient also where the embeddings are frozen.

    ZeRO-3 takes the gradients of a layer that it gathers as a whole when torch has that of its input. Without one torch
    says so before the layer's backward pass, and the gradients would be taken for 0.
    """
    hidden, *rest = given
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    return hidden, *rest


def _forward(layer: Any, *given: Any, **named: Any) -> Any:
    """Compute a layer: compiled where it gets the number of its row, else as it is."""
    plain = type(layer).forward
    if not isinstance(named.get("segments"), torch.Tensor):
        return plain(layer, *given, **named)
    checkpointed = False
    if isinstance(layer, GradientCheckpointingLayer):
        plain = plain.__wrapped__  # without the checkpoint, which stays outside the graph
        checkpointed = layer.gradient_checkpointing and layer.training
    call = partial(_call, _compiled(plain), layer, named)
    return layer._gradient_checkpointing_func(call, *given) if checkpointed else call(*given)


def _call(compiled: Callable[..., Any], layer: nn.Module, named: dict[str, Any], *given: Any) -> Any:
    # Here, since a tensor that is given again for the second computation has lost its marks.
    _mark_lengths([*given, *named.values()], given[0].shape[1])
    return compiled(layer, *given, **named)


@cache
def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    _take_one_head_for_rows()
    return torch.compile(forward, fullgraph=True, backend=BACKEND)


@cache
def _take_one_head_for_rows() -> None:
    """Let the compiler take [1, 1, T, d], the rows of one head, for no image of one channel in channels-last order.

    Both orders are the same bytes, but for the image torch 2.13 asks for T as a number, which it does not have.
    """
    from torch._inductor import ir

    def holds(x: torch.Tensor, *, memory_format: torch.memory_format) -> bool:
        one_channel = x.dim() > 1 and isinstance(x.shape[1], int) and x.shape[1] == 1
        return not (one_channel and memory_format in IMAGES) and bool(plain(x, memory_format=memory_format))

    name = "is_contiguous_for_memory_format_or_false"
    plain: Any = getattr(ir, name, None)
    if plain is not None:  # else the proof tells whether the compiler takes such a model
        setattr(ir, name, holds)


def _mark_lengths(values: Iterable[Any], tokens: int) -> None:
    """Tell the compiler which dimensions are the row's length T: those of tensors [1, T, …] and [T, …]."""
    for value in values:
        if isinstance(value, list | tuple):
            _mark_lengths(value, tokens)
        elif isinstance(value, torch.Tensor):
            for d in range(min(2, value.dim())):
                if value.shape[d] == tokens and value.shape[:d].numel() == 1:
                    torch._dynamo.decorators.mark_unbacked(
                        value, d, hint_override=GUESSED_TOKENS, shape_id="tokens", min=2
                    )


def prepare(folder: Path) -> None:
    """Set the compiler up, with compiled code kept in a folder from one start to the next; forget earlier models.

    Code for other versions, processors or numbers of threads has a folder of its own there. No process is started to
    compile: it would outlive a rank that is killed.

    Args:
        folder: the cache of the runs.
    """
    import torch._inductor.config as inductor

    code = folder / FOLDER / _digest()
    _remove_torn(code)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(code)
    inductor.compile_threads = 1
    torch._dynamo.config.recompile_limit = MOST_KINDS
    torch._dynamo.reset()


def _digest() -> str:
    # All instructions that the processor knows, since the compiler may use each (-march=native).
    processor = (
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        sorted(torch.cpu.get_capabilities().items()),
    )
    of = (torch.__version__, processor, torch.get_num_threads())
    return hashlib.blake2b(repr(of).encode(), digest_size=8).hexdigest()


def _remove_torn(code: Path) -> None:
    """Remove libraries that a kill or a full disk has cut short: torch loads each that exists, and would fail for ever.

    Args:
        code: the folder of compiled code, which other jobs may be filling.
    """
    for library in code.glob("*/*.so"):
        if _is_whole(library):
            continue
        # A compiler that is still writing holds this lock of torch's.
        with (
            contextlib.suppress(OSError, Timeout),
            FileLock(code / "locks" / f"{library.name.split('.')[0]}.lock", 600),
        ):
            if not _is_whole(library):
                library.unlink(missing_ok=True)


def _is_whole(library: Path) -> bool:
    """Return whether a library has all of its bytes; one of another form than ELF is taken for whole."""
    with library.open("rb") as file:
        head, size = file.read(64), os.fstat(file.fileno()).st_size
    if not head.strip(b"\0"):
        return False
    if not head.startswith(b"\x7fELF\x02\x01"):  # 64 bit, little endian
        return True
    if len(head) < 64:
        return False
    # The table of sections is the file's end.
    (table,), (entry, entries) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
    whole: bool = table > 0 and table + entry * entries <= size
    return whole


def lack(device: torch.device) -> str | None:
    """Return what this process lacks for compiled layers on a device, as a clause after the word layers, or None."""
    if (name := next((n for n in TURNED_OFF if os.environ.get(n) == "1"), None)) is not None:
        return f"which {name}=1 in the environment turns off; unset it"
    if device.type == "cpu" and compiler() is None:
        return "which needs a C++ compiler on a CPU, and neither CXX names one nor is g++ installed; install g++"
    return None


def compiler() -> str | None:
    """Return the C++ compiler that a CPU's code needs; None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))
