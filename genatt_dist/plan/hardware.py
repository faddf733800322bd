"""What the machines can do: one row of constants a device, each with where it comes from.

Peaks are the makers' data sheets (dense, without sparsity); what a kernel reaches of a peak is assumed and says so.
A network is two numbers a message: α, seconds before the first byte, and β, bytes a second and rank (Hockney 1994).
"""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.errors import GenattError

GIB = 1 << 30


@dataclass(frozen=True)
class Hardware:
    """One rank's device and its links. flops, bandwidth: a second. memory: bytes of the device, None: the machine's.

    reached_flops, reached_bandwidth: share of the peaks that small matrices and element-wise kernels reach. launch:
    seconds that an operation costs whatever its size; recurrence_launch: the same inside the loop of the GRU.
    node_bandwidth, node_latency: between ranks of a node; net_…: between nodes, of one rank. base_bytes: device memory
    before the first tensor.
    """

    name: str
    device: str
    memory: int | None
    flops_fp32: float
    flops_bf16: float
    bandwidth: float
    reached_flops: float
    reached_bandwidth: float
    launch: float
    recurrence_launch: float
    node_bandwidth: float
    node_latency: float
    net_bandwidth: float
    net_latency: float
    base_bytes: int
    source: str


_ASSUMED = (
    "assumed: 0.35 of the peak in matrix products and 0.6 of the memory's bandwidth at these widths, 6 µs an "
    "operation (eager PyTorch), 1 GiB for the CUDA context, libraries and NCCL's channels; between nodes 15 to 20 µs "
    "and "
)

HARDWARE = {
    "h100": Hardware(
        *("h100", "cuda", 80 * GIB, 67e12, 989e12, 3.35e12, 0.35, 0.6, 6e-6, 1e-6),
        *(450e9, 10e-6, 50e9, 15e-6, GIB),
        "NVIDIA H100 SXM data sheet (67 TFLOP/s fp32, 989 bf16, 3.35 TB/s, NVLink 450 GB/s a direction); "
        + _ASSUMED
        + "400 Gbit/s a GPU",
    ),
    "h200": Hardware(
        *("h200", "cuda", 141 * GIB, 67e12, 989e12, 4.8e12, 0.35, 0.6, 6e-6, 1e-6),
        *(450e9, 10e-6, 50e9, 15e-6, GIB),
        "NVIDIA H200 SXM data sheet (67 TFLOP/s fp32, 989 bf16, 4.8 TB/s, NVLink 450 GB/s a direction); "
        + _ASSUMED
        + "400 Gbit/s a GPU",
    ),
    "a100": Hardware(
        *("a100", "cuda", 80 * GIB, 19.5e12, 312e12, 2.04e12, 0.35, 0.6, 6e-6, 1e-6),
        *(300e9, 10e-6, 25e9, 15e-6, GIB),
        "NVIDIA A100 80GB SXM data sheet (19.5 TFLOP/s fp32, 312 bf16, 2.04 TB/s, NVLink 300 GB/s a direction); "
        + _ASSUMED
        + "200 Gbit/s a GPU",
    ),
    "l4": Hardware(
        *("l4", "cuda", 24 * GIB, 30.3e12, 121e12, 0.3e12, 0.35, 0.6, 6e-6, 1e-6),
        *(25e9, 15e-6, 12.5e9, 20e-6, GIB),
        "NVIDIA L4 data sheet (30.3 TFLOP/s fp32, 121 bf16 without sparsity, 300 GB/s, PCIe 4 x16); "
        + _ASSUMED
        + "100 Gbit/s a GPU",
    ),
    "cpu": Hardware(
        *("cpu", "cpu", None, 45e9, 15e9, 12e9, 0.8, 0.8, 6e-6, 3e-6),
        *(1.5e9, 150e-6, 1.0e9, 300e-6, 0),
        "one core with AVX2; assumed, of the order that benchmarks/plan_check.py measures; gloo over loopback or "
        "10 Gbit/s",
    ),
}


def hardware(name: str) -> Hardware:
    """The constants of a device. Raises GenattError for an unknown one."""
    if name not in HARDWARE:
        raise GenattError(f"--gpu {name} is unknown: use one of {', '.join(HARDWARE)}")
    return HARDWARE[name]
