"""Calls of collectives and host reads, counted by the package whose code makes them."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist


class Counts:
    """Calls of collectives and host reads, by the package whose code makes them."""

    COLLECTIVES = (
        "all_reduce broadcast all_gather all_gather_into_tensor all_gather_object broadcast_object_list barrier"
    )
    READS = "item tolist numpy cpu __bool__ __float__ __int__ __index__"

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.found: dict[str, list[str]] = {"collective": [], "read": []}
        for kind, owner, names in (("collective", dist, self.COLLECTIVES), ("read", torch.Tensor, self.READS)):
            for name in names.split():
                patch.setattr(owner, name, self._counted(kind, name, getattr(owner, name)))

    def _counted(self, kind: str, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            while frame is not None:
                packages = [
                    p for p in ("/prefopt_dist/", "/deepspeed/", "/transformers/") if p in frame.f_code.co_filename
                ]
                if packages:
                    if packages == ["/prefopt_dist/"]:
                        self.found[kind].append(name)
                    break
                frame = frame.f_back
            return real(*args, **kwargs)

        return call
