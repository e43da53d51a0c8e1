"""A pretended CUDA device in this process: tensors on cuda:0 whose kernels are the CPU's (see device.cpp).

It is compiled on first use. `install` needs a process that was started with `environment`. `MEMORY` in the environment
is the device's memory in bytes.
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
MEMORY = "PRETENDED_MEMORY"
"""Environment variable: bytes of the device in all; 80 GiB where it is not set."""


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


def whole_environment() -> dict[str, str]:
    """The environment of a process that computes on the pretended device, which is built if need be."""
    import gpu_parts

    hidden = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
    own = {k: v for k, v in gpu_parts.environment("cpu").items() if k not in hidden}
    path = os.pathsep.join([own["PYTHONPATH"], str(HERE)])
    return own | environment(build()) | {"PYTHONPATH": path}


def install() -> Any:
    """Make cuda:0 usable; return the extension, which counts kernels and memory and tells of waits and copies."""
    import pretended_cuda
    import torch
    import torch.nn.functional as F
    from pretended_flash import Flash

    spec = importlib.util.spec_from_file_location("device", Path(os.environ["PRETENDED"]) / "device.so")
    assert spec is not None
    assert spec.loader is not None
    device = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(device)
    pretended_cuda.install(device, int(os.environ.get(MEMORY, 80 * 2**30)))

    original = F.scaled_dot_product_attention

    def attention(q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, **options: Any) -> Any:
        """The composite asks the device which of its kernels to take; the pretended one has the plain one."""
        if not q.is_cuda:
            return original(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, **options)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
        causal = options.pop("is_causal", False)
        math = torch.ops.aten._scaled_dot_product_attention_math
        return math(q, k, v, attn_mask, dropout_p, causal, None, **options)[0]

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
