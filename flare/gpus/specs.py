"""What a GPU's name, as nvidia-smi prints it, tells: its peak, and whether it has bf16. Standard library only."""

import re

PEAK_TFLOPS = {
    "A800": 312.0,
    "A100": 312.0,
    "A40": 149.7,
    "H100": 989.0,  # SXM
    "H200": 989.0,  # SXM
    "H20": 148.0,
    "L40S": 362.0,
    "4090": 165.0,
    "3090": 71.0,
}
"""Peak dense bf16 TFLOP/s, by the word of the name that tells the chip. Source: shared/FIELD.md."""

OTHER_PRODUCT = {"H100": {"pcie", "nvl"}, "H200": {"nvl"}, "4090": {"d", "laptop"}, "3090": {"ti"}}
"""Words that make another product, with another peak, of a name in PEAK_TFLOPS."""


BEFORE_AMPERE = {
    "tesla", "quadro", "titan", "gtx", "gt",  # names that NVIDIA gave up before Ampere
    "2060", "2070", "2080",  # GeForce RTX; 2050 is an Ampere
    "k80", "m10", "m40", "m60", "p4", "p40", "p100", "gp100", "v100", "v100s", "gv100", "t4", "t4g",
    "t400", "t500", "t550", "t600", "t1000", "t1200", "xavier",
}  # fmt: skip
"""Words of the names of GPUs whose compute capability is below 8.0: they have no bf16. Source: NVIDIA's table of
CUDA GPUs. What is not here is judged by ``distributed.bind_gpu``."""


def name_words(name: str) -> set[str]:
    """Lower-case words; "NVIDIA A100-SXM4-80GB" has nvidia, a100, sxm4 and 80gb."""
    return set(re.findall(r"[^\W_]+", name.casefold()))


def peak_tflops(name: str) -> float | None:
    """Peak dense bf16 TFLOP/s of a GPU by its name; None when unknown: never a guess, so no MFU."""
    words = name_words(name)
    # A MIG device and a vGPU ("GRID A100-10C") are parts of the GPU that their name tells.
    if "mig" in words or re.search(r"-[0-9]+[QCAB]$", name):
        return None
    for chip, tflops in PEAK_TFLOPS.items():
        if chip.casefold() in words and not words & OTHER_PRODUCT.get(chip, set()):
            return tflops
    return None


def lacks_bf16(name: str) -> bool:
    """Whether a GPU's name, as nvidia-smi prints it, says that it is older than Ampere."""
    return bool(name_words(name) & BEFORE_AMPERE)
