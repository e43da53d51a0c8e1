"""The machine that a job is planned for: memory and speed of a GPU, or of this machine's CPU.

The table is from the manufacturer's data sheets: NVIDIA H200 and H100 (SXM; their NVL and PCIe cards are slower), A100
(SXM 80 GB, PCIe 40 GB) and L40S. A sheet's "GB" counts as 10⁹ bytes, which is a little less than the driver reports.
The peak is that of dense bfloat16 matrix products accumulated in float32: the sheets' figures "with sparsity", halved.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from prefopt_dist.config import Plan
from prefopt_dist.model.activation_checkpointing import host_bytes, usable

GPUS = {
    "h200": (141e9, 989e12),
    "h100": (80e9, 989e12),
    "a100-80": (80e9, 312e12),
    "a100-40": (40e9, 312e12),
    "l40s": (48e9, 362e12),
    "h200-nvl": (141e9, 835e12),
    "h100-nvl": (94e9, 835e12),
    "h100-pcie": (80e9, 756e12),
}
"""(bytes of memory, peak in FLOP/s) by the GPU's name: those of `plan.gpu`, and the cards that are only found here."""
BANDWIDTHS = {
    "h200": 4.8e12,
    "h100": 3.35e12,
    "a100-80": 2.04e12,
    "a100-40": 1.56e12,
    "l40s": 0.86e12,
    "h200-nvl": 4.8e12,
    "h100-nvl": 3.9e12,
    "h100-pcie": 2.0e12,
}
"""Memory bandwidth in bytes a second, from the same data sheets."""
CARDS = ("NVL", "PCIE")
"""Words in a driver's name for the cards, which are not the SXM module."""

GPU_EFFICIENCY = 0.4
"""Share of the peak that a training step reaches: the model FLOP utilisation that well-tuned jobs on A100 and H100
report (0.35 to 0.5; PaLM's 0.46, Chowdhery et al. 2022, Megatron-LM's 0.4 to 0.5). Not measured here."""
CPU_EFFICIENCY = 0.6
"""Share of the peak that a training step reaches on a CPU, whose peak is the measured speed of a matrix product."""

GPUS_A_NODE = 8
"""GPUs of a node where `plan.gpu` names a kind and `plan.gpus_per_node` is null."""
CPU_RANKS = 2
"""Ranks that launch/run.sh starts on a machine without a GPU."""


@dataclass(frozen=True)
class Machine:
    """A number of equal nodes, each with the same number of equal ranks."""

    name: str
    nodes: int
    ranks_a_node: int
    memory: int
    """Bytes that one rank may use"""
    peak: float | None
    """Peak of one rank in FLOP/s; None where it is not known"""
    efficiency: float
    """Share of the peak that the plan assumes"""
    is_gpu: bool
    bandwidth: float | None = None
    """Memory bandwidth of a rank's device in bytes a second; None where it is not known"""

    @property
    def ranks(self) -> int:
        """Return the number of ranks of all nodes."""
        return self.nodes * self.ranks_a_node

    @property
    def usable(self) -> int:
        """Return the bytes of a rank's memory that a plan may use; the rest stays free."""
        return usable(self.memory, self.memory if self.is_gpu else None)

    def text(self) -> str:
        """Return a description such as `1 node of 8 GPUs (h200)`."""
        unit = "GPU" if self.is_gpu else "CPU rank"
        nodes = "node" if self.nodes == 1 else "nodes"
        return f"{self.nodes} {nodes} of {self.ranks_a_node} {unit}{'s' * (self.ranks_a_node > 1)} ({self.name})"


def planned_machine(plan: Plan) -> Machine:
    """Return the machine that the section `plan` names; this machine where `plan.gpu` is null."""
    name = plan.gpu or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        ranks = plan.gpus_per_node or CPU_RANKS
        return Machine("cpu", plan.nodes, ranks, host_bytes() // ranks, _product_speed() / ranks, CPU_EFFICIENCY, False)
    if name == "cuda":
        found = torch.cuda.get_device_properties(0)
        ranks = plan.gpus_per_node or torch.cuda.device_count()
        known = known_gpu(found.name, found.total_memory)
        bandwidth = None if known is None else BANDWIDTHS[known]
        return Machine(
            found.name, plan.nodes, ranks, found.total_memory, device_peak(), GPU_EFFICIENCY, True, bandwidth
        )
    memory, peak = GPUS[name]
    ranks = plan.gpus_per_node or GPUS_A_NODE
    return Machine(name, plan.nodes, ranks, int(memory), peak, GPU_EFFICIENCY, True, BANDWIDTHS[name])


def device_peak() -> float | None:
    """Return the dense bfloat16 peak of this rank's GPU in FLOP/s; None on the CPU and for an unknown GPU."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    known = known_gpu(found.name, found.total_memory)
    return GPUS[known][1] if known else None


def known_gpu(device: str, memory: int) -> str | None:
    """Return the table's name of a GPU; None where it is not in the table.

    Args:
        device: the name that the driver reports.
        memory: bytes of its memory.
    """
    device = device.upper()
    card = next((word for word in CARDS if word in device), None)
    of_card = [name for name in GPUS if card is not None and name.upper().endswith(f"-{card}")]
    for name in (*of_card, *(name for name in GPUS if not name.upper().endswith(CARDS))):
        if name.partition("-")[0].upper() in device and memory < 1.3 * GPUS[name][0]:
            return name
    return None


def _product_speed() -> float:
    """Measure the FLOP/s of a float32 matrix product on all threads of this process, for a fifth of a second."""
    n = 1024
    a = torch.ones(n, n)
    a @ a
    start, products = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < 0.2:
        a @ a
        products += 1
    return 2 * n**3 * products / passed
