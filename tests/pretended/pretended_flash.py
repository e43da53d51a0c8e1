"""The flash kernel of variable length for the pretended device: plain float32 math, and the kernel's own conditions."""

from __future__ import annotations

from typing import Any

import torch


class Flash:
    """The flash kernel of variable length by plain float32 math, with the kernel's own conditions."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def forward(self, q: Any, k: Any, v: Any, ends_q: Any, ends_k: Any, *lengths: Any, **options: Any) -> Any:
        self._check(q, k, v, ends_q, ends_k)
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        into, into_lse = self.device.on_host(out), self.device.on_host(lse)
        for queries, _, qs, ks, vs in self._sequences(q, k, v, ends_q, ends_k):
            scores = self._scores(qs, ks, options)
            into_lse[:, queries] = scores.logsumexp(-1)
            into[queries] = (scores.softmax(-1) @ vs).transpose(0, 1).to(into.dtype)
        state = torch.empty(2, dtype=torch.uint64, device=q.device)
        return out, lse, state, torch.empty(0, device=q.device), torch.empty(0, device=q.device)

    def backward(
        self,
        gradient: Any,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        lse: Any,
        ends_q: Any,
        ends_k: Any,
        *_: Any,
        **options: Any,
    ) -> Any:
        self._check(q, k, v, ends_q, ends_k)
        assert gradient.dtype == q.dtype
        assert gradient.shape == q.shape
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        gradient = gradient.contiguous()  # what is on the host keeps no memory alive
        into_q, into_k, into_v, g = (self.device.on_host(x) for x in (dq, dk, dv, gradient))
        heads, scale = k.shape[1], options["scale"]
        for queries, keys, qs, ks, vs in self._sequences(q, k, v, ends_q, ends_k):
            weights = self._scores(qs, ks, options).softmax(-1)
            of_out = g[queries].transpose(0, 1).float()
            of_weights = of_out @ vs.transpose(1, 2)
            of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * scale
            into_q[queries] = (of_scores @ ks).transpose(0, 1).to(q.dtype)
            for into, by_head in ((into_k, of_scores.transpose(1, 2) @ qs), (into_v, weights.transpose(1, 2) @ of_out)):
                grouped = by_head.view(heads, -1, *by_head.shape[1:]).sum(1)
                into[keys] = grouped.transpose(0, 1).to(into.dtype)
        return dq, dk, dv

    def _check(self, q: Any, k: Any, v: Any, ends_q: Any, ends_k: Any) -> None:
        assert q.dtype in (torch.bfloat16, torch.float16)
        assert q.dtype == k.dtype == v.dtype
        assert ends_q.dtype == ends_k.dtype == torch.int32
        assert ends_q.is_cuda
        assert ends_k.is_cuda
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        assert q.shape[-1] % 8 == 0
        assert q.shape[-1] <= 256
        assert q.shape[1] % k.shape[1] == 0

    def _sequences(self, q: Any, k: Any, v: Any, ends_q: Any, ends_k: Any) -> Any:
        """Places of queries and keys of each sequence, and its float32 queries, keys and values by query head."""
        q, k, v, ends_q, ends_k = (self.device.on_host(x) for x in (q, k, v, ends_q, ends_k))
        starts, key_starts, group = ends_q.tolist(), ends_k.tolist(), q.shape[1] // k.shape[1]
        assert (starts[-1], key_starts[-1]) == (len(q), len(k))
        for i in range(len(starts) - 1):
            queries, keys = slice(*starts[i : i + 2]), slice(*key_starts[i : i + 2])
            ks, vs = (x[keys].transpose(0, 1).repeat_interleave(group, 0).float() for x in (k, v))
            yield queries, keys, q[queries].transpose(0, 1).float(), ks, vs

    def _scores(self, qs: Any, ks: Any, options: Any) -> Any:
        """Scaled scores, -inf where a query does not see a key: lower right, and within the window."""
        left, right = (options.get(f"window_size_{side}") for side in ("left", "right"))
        n, m = qs.shape[1], ks.shape[1]
        distance = torch.arange(n)[:, None] + (m - n) - torch.arange(m)
        seen = distance >= (-m if right is None or right < 0 else -right)
        if left is not None and left >= 0:
            seen &= distance <= left
        return (qs @ ks.transpose(1, 2) * options["scale"]).masked_fill(~seen, -torch.inf)
