"""The command line with a prompt for each response: python tests/helpers/unshared_door.py STAGE RUN.yaml …"""

import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from prefopt_dist import cli
from prefopt_dist.batching import packing, row_parts
from prefopt_dist.batching.micro_batch import MicroBatch
from prefopt_dist.data.unit import Unit


class Own(np.ndarray):
    """Tokens that are equal to none but themselves."""

    def tobytes(self, order: str | None = "C") -> bytes:  # type: ignore[override]
        return super().tobytes() + id(self).to_bytes(8, "little")


def pack(units: Sequence[Unit], responses_per_unit: int, *_: object) -> MicroBatch:
    """As the package's, with every response in a row part of its own."""
    if not units:
        return packing.pack(units, responses_per_unit)
    alone = [Unit(u.row, u.prompt.copy().view(Own), (r,)) for u in units for r in u.responses]
    packed = packing.pack(alone, 1)
    assert packed.tokens == sum(len(u.prompt) + len(r) - 1 for u in units for r in u.responses)
    # A unit hangs together although its responses have a prompt each.
    ends = packed.prompts[responses_per_unit - 1 :: responses_per_unit]
    return replace(
        packed,
        units=packed.units.view(-1, responses_per_unit),
        rows=tuple(u.row for u in units),
        by_prompt=torch.arange(len(units)),
        prompts=tuple(end._replace(units=i + 1) for i, end in enumerate(ends)),
    )


if __name__ == "__main__":
    assert row_parts.pack is packing.pack, "what packs the rows of all stages has another name"
    row_parts.pack = pack
    status = cli.main(sys.argv[1:])
    cli._exit(status)
