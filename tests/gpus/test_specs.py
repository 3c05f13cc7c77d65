"""Peak TFLOP/s by the name of a GPU."""

import pytest

from flare.gpus.specs import peak_tflops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A800 80GB PCIe", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A40", 149.7),
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A400", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("GRID A100-10C", None),
        ("NVIDIA B200", None),
        ("", None),
    ],
)
def test_peak_is_the_published_one_or_none_never_a_guess(name, tflops):
    assert peak_tflops(name) == tflops
