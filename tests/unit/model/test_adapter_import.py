"""What the import of peft says, and to whom."""

from __future__ import annotations

import logging

from prefopt_dist.model.adapter import _peft


def test_peft_does_not_warn_of_products_in_4_bit() -> None:
    _peft()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")

    def shown(text: str) -> bool:
        return bool(logger.filter(logging.LogRecord(logger.name, logging.WARNING, "", 0, text, ("no kernels",), None)))

    assert not shown("Failed to load CPU gemm_4bit_forward from kernels-community: %s.")
    assert shown("Failed to load another library: %s.")
