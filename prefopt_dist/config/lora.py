"""The options of a run that trains adapters."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt_dist.config.rules import Count, Text


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters, trained in place of the weights: W + s · B A, B = 0 at the start (Hu et al. 2021).

    Their dropout is 0, as that of the reference is.
    """

    r: Count = 16
    """The rank: rows of A and columns of B."""
    alpha: Count = 32
    """α: the product B A counts s = α/r times."""
    rslora: bool = False
    """s = α/√r instead, with which large ranks still learn (Kalajdzievski 2023)."""
    target_modules: tuple[Text, ...] | None = None
    """The linear layers that get one, by name, such as [q_proj, v_proj]; null: all but the output head."""
