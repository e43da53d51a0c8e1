"""The settings of a DeepSpeed JSON that decide the memory and the traffic of ZeRO-3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

DTYPE_BYTES: Mapping[str | None, int] = {"fp32": 4, "bf16": 2}
"""Bytes of a number of the dtypes that a DeepSpeed JSON may name; None, where it names none, is the model's"""


@dataclass(frozen=True)
class ZeroSettings:
    """The settings of a DeepSpeed JSON that decide memory; sizes are numbers of elements."""

    max_live: int
    prefetch: int
    reduce_bucket: int
    sub_group: int
    persistence: int
    secondary: int
    """hpZ: number of ranks that share a second copy of the parameters; 1 is off"""
    gradient_dtype_bytes: int
    """Bytes of a number in the accumulated gradient"""
    reduced_dtype_bytes: int
    """Bytes of a number while gradients are summed over ranks: `communication_data_type`"""
    offload_optimizer: bool
    offload_param: bool

    @classmethod
    def of(cls, settings: Mapping[str, Any], item: int) -> ZeroSettings:
        """Return the settings of a whole DeepSpeed JSON, with DeepSpeed's defaults.

        Args:
            settings: the JSON.
            item: bytes of a number in the model's dtype.
        """
        zero = settings.get("zero_optimization", {})
        accumulated = settings.get("data_types", {}).get("grad_accum_dtype")

        def offloaded(name: str) -> bool:
            return bool((zero.get(name) or {}).get("device") == "cpu")

        return cls(
            max_live=int(zero.get("stage3_max_live_parameters", 1e9)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            reduce_bucket=int(zero.get("reduce_bucket_size", 5e8)),
            sub_group=int(zero.get("sub_group_size", 1e9)),
            persistence=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            secondary=int(zero.get("zero_hpz_partition_size", 1)),
            gradient_dtype_bytes=DTYPE_BYTES.get(accumulated, item),
            reduced_dtype_bytes=DTYPE_BYTES.get(settings.get("communication_data_type"), item),
            offload_optimizer=offloaded("offload_optimizer"),
            offload_param=offloaded("offload_param"),
        )

    def offloading(self, optimizer: bool, param: bool) -> ZeroSettings:
        """Return the same settings with other offloading."""
        return replace(self, offload_optimizer=optimizer, offload_param=param)
