"""GPUs whose speed is known, by the driver's device name.

Names must match exactly: laptop chips, partial GPUs (MIG, vGPU) and models with fewer cores have names that begin
alike. All figures are public, and none was measured here. Sources:

- bf16: dense TFLOP/s with fp32 accumulation. NVIDIA's data sheets (half of the figures with sparsity). GeForce: the
  white papers of the Ampere GA102 and Ada architectures for the RTX 3090 and 4090; of the others, twice the fp32 rate,
  which is 2 x CUDA cores x boost clock of the product pages. Where two models have one name, the more common one.
- memory: GB/s, from the data sheets and product pages.
- link: GB/s to another GPU of the machine, in one direction: half of the NVLink bandwidth in the data sheets, or PCIe
  4.0 x16 (32) and 5.0 x16 (64) without NVLink; half of that for cards with 8 lanes. Bridges between two GPUs do not
  count.
"""

from typing import NamedTuple

import torch

PCIE_4, PCIE_5 = 32.0, 64.0
CPU_NAME = "cpu"  # has no entry: how fast a CPU computes depends on too much


class Gpu(NamedTuple):
    """Speed of a GPU by its maker's figures."""

    bf16_tflops: float
    memory_gbs: float
    link_gbs: float

    @property
    def peak_flops(self) -> float:
        """Dense FLOP/s in bf16."""
        return self.bf16_tflops * 1e12


GPUS = {
    "NVIDIA B200": Gpu(2250.0, 8000.0, 900.0),
    "NVIDIA H200": Gpu(989.5, 4800.0, 450.0),
    "NVIDIA H200 NVL": Gpu(835.5, 4800.0, PCIE_5),
    "NVIDIA H100 80GB HBM3": Gpu(989.5, 3350.0, 450.0),  # SXM
    "NVIDIA H100 PCIe": Gpu(756.5, 2000.0, PCIE_5),
    "NVIDIA H100 NVL": Gpu(835.5, 3900.0, PCIE_5),
    "NVIDIA A100-SXM4-40GB": Gpu(312.0, 1555.0, 300.0),
    "NVIDIA A100-SXM4-80GB": Gpu(312.0, 2039.0, 300.0),
    "NVIDIA A100-PCIE-40GB": Gpu(312.0, 1555.0, PCIE_4),
    "NVIDIA A100 80GB PCIe": Gpu(312.0, 1935.0, PCIE_4),
    "NVIDIA A40": Gpu(149.7, 696.0, PCIE_4),
    "NVIDIA A30": Gpu(165.0, 933.0, PCIE_4),
    "NVIDIA A10": Gpu(125.0, 600.0, PCIE_4),
    "NVIDIA L40S": Gpu(362.05, 864.0, PCIE_4),
    "NVIDIA L40": Gpu(181.05, 864.0, PCIE_4),
    "NVIDIA L4": Gpu(121.0, 300.0, PCIE_4),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": Gpu(503.8, 1792.0, PCIE_5),
    "NVIDIA RTX 6000 Ada Generation": Gpu(364.2, 960.0, PCIE_4),
    "NVIDIA RTX A6000": Gpu(154.8, 768.0, PCIE_4),
    "NVIDIA RTX A5000": Gpu(111.1, 768.0, PCIE_4),
    "NVIDIA GeForce RTX 5090": Gpu(209.5, 1792.0, PCIE_5),
    "NVIDIA GeForce RTX 5080": Gpu(112.6, 960.0, PCIE_5),
    "NVIDIA GeForce RTX 5070 Ti": Gpu(87.9, 896.0, PCIE_5),
    "NVIDIA GeForce RTX 5070": Gpu(61.7, 672.0, PCIE_5),
    "NVIDIA GeForce RTX 5060 Ti": Gpu(47.4, 448.0, PCIE_5 / 2),
    "NVIDIA GeForce RTX 5060": Gpu(38.4, 448.0, PCIE_5 / 2),
    "NVIDIA GeForce RTX 4090": Gpu(165.2, 1008.0, PCIE_4),
    "NVIDIA GeForce RTX 4080 SUPER": Gpu(104.4, 736.0, PCIE_4),
    "NVIDIA GeForce RTX 4080": Gpu(97.5, 717.0, PCIE_4),
    "NVIDIA GeForce RTX 4070 Ti SUPER": Gpu(88.2, 672.0, PCIE_4),
    "NVIDIA GeForce RTX 4070 Ti": Gpu(80.2, 504.0, PCIE_4),
    "NVIDIA GeForce RTX 4070 SUPER": Gpu(71.0, 504.0, PCIE_4),
    "NVIDIA GeForce RTX 4070": Gpu(58.3, 504.0, PCIE_4),
    "NVIDIA GeForce RTX 4060 Ti": Gpu(44.1, 288.0, PCIE_4 / 2),
    "NVIDIA GeForce RTX 4060": Gpu(30.2, 272.0, PCIE_4 / 2),
    "NVIDIA GeForce RTX 3090 Ti": Gpu(80.0, 1008.0, PCIE_4),
    "NVIDIA GeForce RTX 3090": Gpu(71.0, 936.0, PCIE_4),
    "NVIDIA GeForce RTX 3080 Ti": Gpu(68.2, 912.0, PCIE_4),
    "NVIDIA GeForce RTX 3080": Gpu(59.5, 760.0, PCIE_4),  # 10 GB
    "NVIDIA GeForce RTX 3070 Ti": Gpu(43.5, 608.0, PCIE_4),
    "NVIDIA GeForce RTX 3070": Gpu(40.6, 448.0, PCIE_4),
    "NVIDIA GeForce RTX 3060 Ti": Gpu(32.4, 448.0, PCIE_4),
    "NVIDIA GeForce RTX 3060": Gpu(25.5, 360.0, PCIE_4),  # 12 GB
}


def find_gpu(device_name: str) -> Gpu | None:
    """Return the GPU of a name that the driver reports; None if it is not in the table."""
    return GPUS.get(device_name)


def find_gpu_of(device: torch.device) -> Gpu | None:
    """Return the GPU of a device; None if it is not in the table, as a CPU is not."""
    return find_gpu(torch.cuda.get_device_name(device) if device.type == "cuda" else CPU_NAME)
