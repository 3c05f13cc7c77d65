"""Peak TFLOP/s and bf16 support of a GPU, from its name as nvidia-smi prints it. Standard library only."""

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
"""Peak dense bf16 TFLOP/s, by the word of the name that identifies the chip. Source: shared/FIELD.md."""

OTHER_PRODUCT_WORDS = {"H100": {"pcie", "nvl"}, "H200": {"nvl"}, "4090": {"d", "laptop"}, "3090": {"ti"}}
"""Words in the name of another product, with another peak, than the one in PEAK_TFLOPS."""


BEFORE_AMPERE = {
    "tesla", "quadro", "titan", "gtx", "gt",  # product names that NVIDIA no longer used for Ampere
    "2060", "2070", "2080",  # GeForce RTX; the 2050 is Ampere
    "k80", "m10", "m40", "m60", "p4", "p40", "p100", "gp100", "v100", "v100s", "gv100", "t4", "t4g",
    "t400", "t500", "t550", "t600", "t1000", "t1200", "xavier",
}  # fmt: skip
"""Words in the names of GPUs with a compute capability below 8.0, which have no bf16. Source: NVIDIA's table of CUDA
GPUs. For names that are not listed here, ``process_group.bind_gpu`` checks the capability."""


def name_words(name: str) -> set[str]:
    """Lower-case words of a name: nvidia, a100, sxm4 and 80gb for "NVIDIA A100-SXM4-80GB"."""
    return set(re.findall(r"[^\W_]+", name.casefold()))


def peak_tflops(name: str) -> float | None:
    """Peak dense bf16 TFLOP/s of a GPU by its name. None when unknown; then there is no MFU."""
    words = name_words(name)
    # A MIG device or a vGPU ("GRID A100-10C") is only a part of the GPU in its name.
    if "mig" in words or re.search(r"-[0-9]+[QCAB]$", name):
        return None
    for chip, tflops in PEAK_TFLOPS.items():
        if chip.casefold() in words and not words & OTHER_PRODUCT_WORDS.get(chip, set()):
            return tflops
    return None


def lacks_bf16(name: str) -> bool:
    """Whether a GPU is older than Ampere, by its name as nvidia-smi prints it."""
    return bool(name_words(name) & BEFORE_AMPERE)
