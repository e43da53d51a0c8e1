"""The exact answer about the experts of a mixture: one sequence at a time, token by token, by the paper's formulas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import plain
import torch


class PlainExperts:
    """Follows the routers of a plain model, whose outputs are scores, weights and chosen experts."""

    def __init__(self, model: Any, routers: Sequence[str], affinity: str) -> None:
        self._model, self._affinity, self._seen = model, affinity, {}
        self.counts: dict[str, Counter[int]] = {name: Counter() for name in routers}
        for name in routers:
            model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: self._note(name, out))

    def _note(self, name: str, output: Any) -> None:
        self._seen[name] = (output[0].double()[:-1], output[2][:-1])  # the last token predicts nothing

    def sequence(self, prompt: Any, response: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """float64 [] each: log π(y | x); Σ over the routers of Σ_i f_i P_i, equations 17 to 20 of arXiv:2412.19437."""
        logp = plain.sequence_logp(self._model, prompt, response)
        total = torch.zeros((), dtype=torch.float64)
        for name, (scores, chosen) in self._seen.items():
            tokens, experts = scores.shape
            k = chosen.shape[1]
            affinity = scores.sigmoid() if self._affinity == "sigmoid" else scores.softmax(1)
            for i in range(experts):
                took = [t for t in range(tokens) if i in chosen[t].tolist()]
                self.counts[name][i] += len(took)
                f = experts / (k * tokens) * len(took)
                total = total + f * (affinity[:, i] / affinity.sum(1)).sum() / tokens
        return logp, total

    def max_load(self) -> dict[str, float]:
        """The load of each router's busiest expert over the mean load of its experts, and begin again."""
        found = {}
        for name, counter in self.counts.items():
            found[name] = max(counter.values()) * len(counter) / sum(counter.values())
            self.counts[name] = Counter()
        return found
