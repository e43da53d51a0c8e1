"""Stand-ins for what torch.cuda asks of a driver: one device, streams that are always done, counted memory."""

from __future__ import annotations

import time
import types
from typing import Any

import torch
import torch._dynamo  # these two and torch.optim make classes of the streams that torch has before `install`
import torch._inductor.utils
import torch.optim

CONTEXT = 512 * 2**20
"""Bytes that a process's context takes of the device, as the plan counts them."""
NAME = "NVIDIA H100 80GB HBM3"
"""Its peak is known, so that perf/mfu is in the metrics."""


class Nothing:
    """A context that does nothing, such as the choice of the one device or stream there is."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.idx = 0

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def install(device: Any, total: int) -> None:
    """Put the stand-ins in place; `device` is the extension, `total` its bytes of memory."""
    device.set_total(total - CONTEXT)

    class Event:
        """A moment: the work before it is done, since kernels are the CPU's."""

        def __init__(self, *_: Any, **__: Any) -> None:
            self.moment = 0.0

        def record(self, _: Any = None) -> None:
            self.moment = time.perf_counter()

        def elapsed_time(self, other: Event) -> float:
            return 1000 * (other.moment - self.moment)

        def synchronize(self) -> None:
            device.wait("event")

        def wait(self, _: Any = None) -> None:
            return None

        def query(self) -> bool:
            return True

    class Stream(Nothing):
        """A queue whose work is always done."""

        cuda_stream = 0

        def synchronize(self) -> None:
            device.wait("stream")

        def record_event(self, event: Event | None = None) -> Event:
            event = event or Event()
            event.record()
            return event

        def wait_stream(self, _: Any) -> None:
            return None

        def wait_event(self, _: Any) -> None:
            return None

        def query(self) -> bool:
            return True

    stream = Stream()
    properties = types.SimpleNamespace(name=NAME, total_memory=total, major=9, minor=0, multi_processor_count=132)
    found: dict[str, Any] = {
        "Event": Event,
        "Stream": Stream,
        "ExternalStream": Stream,
        "StreamContext": Nothing,
        "stream": Nothing,
        "device": Nothing,
        "device_of": Nothing,
        "current_stream": lambda _=None: stream,
        "default_stream": lambda _=None: stream,
        "set_stream": lambda _: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "is_current_stream_capturing": lambda: False,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_is_compiled": lambda: True,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_capability": lambda _=None: (9, 0),
        "get_device_name": lambda _=None: NAME,
        "get_device_properties": lambda _=None: properties,
        "synchronize": lambda _=None: device.wait("device"),
        "set_sync_debug_mode": lambda mode: device.refuse_waiting(mode == "error"),
        "mem_get_info": lambda _=None: (total - CONTEXT - device.live(), total),
        "memory_allocated": lambda _=None: device.live(),
        "memory_reserved": lambda _=None: device.live(),
        "max_memory_allocated": lambda _=None: device.peak(),
        "max_memory_reserved": lambda _=None: device.peak(),
        "reset_peak_memory_stats": lambda _=None: device.reset_peak(),
        "memory_stats": lambda _=None: {"num_alloc_retries": 0, "reserved_bytes.all.peak": device.peak()},
        "empty_cache": lambda: None,
        # The device's numbers are drawn by the host's generator.
        "get_rng_state": lambda _=None: torch.get_rng_state(),
        "set_rng_state": lambda state, _=None: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
        "manual_seed": lambda _: None,
        "manual_seed_all": lambda _: None,
    }
    for name, value in found.items():
        setattr(torch.cuda, name, value)
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]
    torch.version.cuda = "13.0"
    for name in ("range_push", "range_pop"):
        setattr(torch.cuda.nvtx, name, lambda *_: 0)
