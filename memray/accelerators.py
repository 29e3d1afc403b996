"""The devices that `plan` knows: memory as torch reports it, and speed from the vendors' data sheets.

Peak rates are dense (no sparsity). What a training step reaches is a share of them: see `cost.py`.
"""

import os
from dataclasses import dataclass

from memray.names import unknown_name


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One row of the table.

    Attributes:
        device: torch's device type.
        device_name: What the name that torch reports of such a device contains.
        memory_gib: Memory of one device.
        fp32_flops: Peak floating-point operations a second at fp32 (no TF32: it would change the numbers).
        bf16_flops: The same at bf16.
    """

    name: str
    device: str
    device_name: str = ""
    memory_gib: float
    fp32_flops: float
    bf16_flops: float


def _this_machine() -> Accelerator:
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    # One core with two 8-lane FMA units at 2.5 GHz; AVX-512 or a slower clock move it by a factor of two. Without
    # units for bf16, training steps at bf16 were ten times slower than at fp32.
    core = 2 * 2 * 8 * 2.5e9
    return Accelerator(name="cpu", device="cpu", memory_gib=memory_gib, fp32_flops=core, bf16_flops=core / 10)


ACCELERATORS: dict[str, Accelerator] = {
    row.name: row
    for row in (
        _this_machine(),
        Accelerator(name="t4", device="cuda", device_name="T4", memory_gib=14.6, fp32_flops=8.1e12, bf16_flops=8.1e12),
        Accelerator(name="l4", device="cuda", device_name="L4", memory_gib=22.0, fp32_flops=30.3e12, bf16_flops=121e12),
        Accelerator(
            name="a10g", device="cuda", device_name="A10G", memory_gib=22.0, fp32_flops=31.2e12, bf16_flops=70e12
        ),
        Accelerator(
            name="v100-32gb", device="cuda", device_name="V100", memory_gib=31.7, fp32_flops=15.7e12, bf16_flops=15.7e12
        ),
        Accelerator(
            name="a100-40gb", device="cuda", device_name="A100", memory_gib=39.5, fp32_flops=19.5e12, bf16_flops=312e12
        ),
        Accelerator(
            name="a100-80gb", device="cuda", device_name="A100", memory_gib=79.1, fp32_flops=19.5e12, bf16_flops=312e12
        ),
        Accelerator(
            name="h100-80gb", device="cuda", device_name="H100", memory_gib=79.1, fp32_flops=67e12, bf16_flops=989e12
        ),
        Accelerator(
            name="h200", device="cuda", device_name="H200", memory_gib=139.8, fp32_flops=67e12, bf16_flops=989e12
        ),
    )
}


def accelerator(name: str) -> Accelerator:
    """The row of that name.

    Raises:
        ValueError: If the table has no such row.
    """
    if name not in ACCELERATORS:
        raise unknown_name("accelerator", name, ACCELERATORS)
    return ACCELERATORS[name]
