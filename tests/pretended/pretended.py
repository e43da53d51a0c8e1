"""A pretended CUDA device in this process: tensors on cuda:0 whose kernels are the CPU's (see device.cpp).

It is compiled on first use. `install` needs a process that was started with `environment`.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from places import REPOSITORY

HERE = Path(__file__).parent
SOURCES = ("accelerator.cpp", "device.cpp")


def missing() -> str | None:
    """What the build lacks; None where it lacks nothing."""
    return None if shutil.which("c++") else "no C++ compiler (c++) is here"


def build() -> Path:
    """Compile what is not compiled yet for these sources and this torch; return the folder."""
    import torch
    from torch.utils import cpp_extension

    digest = hashlib.sha256(f"{torch.__version__} {sys.version}".encode())
    for name in SOURCES:
        digest.update((HERE / name).read_bytes())
    folder = REPOSITORY / "build" / f"pretended-{digest.hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "device.so").exists():
            include = [f"-I{path}" for path in cpp_extension.include_paths()]
            include.append(f"-I{sysconfig.get_path('include')}")
            libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
            compile_ = ["c++", "-O1", "-std=c++20", "-shared", "-fPIC"]
            abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
            run([*compile_, str(HERE / "accelerator.cpp"), "-o", str(folder / "accelerator.so"), "-ldl"])
            made = folder / "device.so.new"
            libraries += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
            flags = ["-w", "-DTORCH_EXTENSION_NAME=device", "-DTORCH_API_INCLUDE_EXTENSION_H", abi]
            run([*compile_, *flags, *include, str(HERE / "device.cpp"), "-o", str(made), *libraries])
            made.rename(folder / "device.so")
    return folder


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")


def environment(folder: Path) -> dict[str, str]:
    """What a process needs besides its own environment."""
    return {"LD_PRELOAD": str(folder / "accelerator.so"), "PRETENDED": str(folder), "DS_ACCELERATOR": "cuda"}


def install() -> Any:
    """Make cuda:0 usable; return the extension, which counts launches and the host's waiting."""
    import torch
    import torch.nn.functional as F

    spec = importlib.util.spec_from_file_location("device", Path(os.environ["PRETENDED"]) / "device.so")
    assert spec is not None
    assert spec.loader is not None
    device = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(device)
    for name, value in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_capability": lambda _=None: (9, 0),
        "synchronize": lambda _=None: None,
        "set_sync_debug_mode": lambda mode: device.refuse_waiting(mode == "error"),
    }.items():
        setattr(torch.cuda, name, value)

    # It has no page-locked memory; a copy to it waits, so that batches are moved before waiting is refused.
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor

    original = F.scaled_dot_product_attention

    def attention(q: Any, k: Any, v: Any, attn_mask: Any = None, is_causal: bool = False, scale: Any = None) -> Any:
        """The composite asks the device which of its kernels to take; the pretended one has the plain one."""
        if not q.is_cuda:
            return original(q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
        if attn_mask is not None:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
        return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, attn_mask, 0.0, is_causal, None, scale=scale)[
            0
        ]

    def histc(x: Any, bins: int = 100, low: float = 0, high: float = 0) -> Any:
        """The CPU's has no integers, with which the counts of experts are made."""
        out = torch.empty(bins, dtype=x.dtype, device=x.device)
        device.on_host(out).copy_(torch.histc(device.on_host(x).float(), bins, low, high))
        return out

    F.scaled_dot_product_attention = attention
    global _kernels
    _kernels = torch.library.Library("aten", "IMPL")
    _kernels.impl("histc", histc, "CUDA")
    _kernels.impl("_flash_attention_forward", Flash(device).forward, "CUDA")
    _kernels.impl("_flash_attention_backward", Flash(device).backward, "CUDA")
    return device


_kernels: Any = None


class Flash:
    """The flash kernel of variable length by plain float32 math, with the kernel's own conditions."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def forward(self, q: Any, k: Any, v: Any, ends_q: Any, ends_k: Any, *lengths: Any, **options: Any) -> Any:
        import torch

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
        import torch

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
        import torch

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
        import torch

        left, right = (options.get(f"window_size_{side}") for side in ("left", "right"))
        n, m = qs.shape[1], ks.shape[1]
        distance = torch.arange(n)[:, None] + (m - n) - torch.arange(m)
        seen = distance >= (-m if right is None or right < 0 else -right)
        if left is not None and left >= 0:
            seen &= distance <= left
        return (qs @ ks.transpose(1, 2) * options["scale"]).masked_fill(~seen, -torch.inf)
