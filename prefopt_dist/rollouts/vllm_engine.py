"""Sampling with vLLM, for clusters.

This file has not been run with vLLM: vLLM 0.33.0 pins torch 2.14 and transformers below 5.21, so it cannot be installed
beside the versions with which this package is tested.

vLLM samples by a seed for each request, so its responses also depend on (seed, prompt, number). They differ from those
of the transformers engine, and whether they are the same in another batch depends on vLLM's kernels.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from prefopt_dist.errors import UserError
from prefopt_dist.model.folder import ModelFolder
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.sampling import Ids, Sampling, uniforms

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MEMORY_SHARE = 0.85
"""Share of the GPU's memory that vLLM may use; the rest is for the job's own CUDA context."""


def refuse_where_absent() -> None:
    """Raise UserError where vLLM is not installed or the machine has no GPU."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "generate.engine: 'vllm' needs the package vllm, which is not installed; install a version that supports "
            "the installed torch and transformers, or set generate.engine=transformers"
        )
    if not torch.cuda.is_available():
        raise UserError(
            "generate.engine: 'vllm' needs a GPU, and torch finds none on this machine; set "
            "generate.engine=transformers"
        )


class VllmEngine:
    """Sampling with the model of a folder in a vLLM engine on this rank's GPU."""

    lockstep = False

    def __init__(self, folder: ModelFolder, *, dtype: torch.dtype, longest: int) -> None:
        vllm = importlib.import_module("vllm")
        self._parameters = vllm.SamplingParams
        with _single_gpu_environment():
            self._engine: Any = vllm.LLM(
                model=str(folder.path),
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=longest,
                gpu_memory_utilization=MEMORY_SHARE,
                enable_prefix_caching=True,  # a prompt's n responses share it
            )

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Ids]]:
        """Sample as in `Engine`."""
        requests, parameters = [], []
        for prompt in prompts:
            for k in range(sampling.n):
                requests.append({"prompt_token_ids": prompt.ids})
                parameters.append(
                    self._parameters(
                        temperature=sampling.temperature,
                        top_p=sampling.top_p,
                        max_tokens=sampling.max_new_tokens,
                        stop_token_ids=list(sampling.stop_ids),
                        ignore_eos=True,  # the stop tokens include eos
                        seed=int(uniforms(sampling.seed, prompt.key, k, 1)[0] * 2**31),
                        detokenize=False,
                    )
                )
        answers = iter(self._engine.generate(requests, parameters, use_tqdm=False))
        return [[list(next(answers).outputs[0].token_ids) for _ in range(sampling.n)] for _ in prompts]

    def meet(self) -> None:
        """Do nothing: each rank samples by itself."""

    def close(self) -> None:
        """Delete the client: vLLM's own process holds the GPU's memory and ends with it."""
        del self._engine


@contextmanager
def _single_gpu_environment() -> Iterator[None]:
    """Set an environment with this rank's GPU alone and without torchrun's variables, for the process vLLM starts."""
    before = {name: os.environ.get(name) for name in (*TORCHRUN, "CUDA_VISIBLE_DEVICES")}
    visible = (before["CUDA_VISIBLE_DEVICES"] or ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    for name in TORCHRUN:
        os.environ.pop(name, None)
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[torch.cuda.current_device()]
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
