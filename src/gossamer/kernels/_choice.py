"""Which implementation of a product runs: the fastest that this machine has, or the one asked for by name."""

import importlib.util
import platform
from collections.abc import Collection
from functools import cache

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError

# avx512, avx2 and portable are the CPU's (cpu.py), triton is the GPU's, reference runs anywhere and has gradients.
NAMES = ("auto", "avx512", "avx2", "portable", "triton", "reference")


@cache
def cpu_features() -> frozenset[str]:
    """Return what Numba compiles for, in LLVM's words: what the processor has, or what NUMBA_CPU_FEATURES says."""
    from numba import config
    from numba.core.codegen import get_host_cpu_features

    told = config.CPU_FEATURES if config.CPU_FEATURES is not None else get_host_cpu_features()  # less NUMBA_ENABLE_AVX=0
    return frozenset(name[1:] for name in told.split(",") if name.startswith("+"))


@cache
def has_avx512() -> bool:
    """Whether 16-bit and 32-bit values can be expanded under a mask in one instruction."""
    wanted = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi2"}
    return platform.machine() in ("x86_64", "AMD64") and wanted <= cpu_features()


@cache
def has_avx2() -> bool:
    """Whether eight values can be put in any order in one instruction, as most x86-64 processors since 2013 can."""
    return platform.machine() in ("x86_64", "AMD64") and {"avx2", "fma", "f16c", "popcnt"} <= cpu_features()


@cache
def has_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 on the CPU about as fast as float32; x86 without instructions for it is far from it."""
    from llvmlite import binding

    there = {name for name, has in binding.get_host_cpu_features().items() if has}
    return platform.machine() not in ("x86_64", "AMD64") or bool({"avx512bf16", "amx-bf16"} & there)


@cache
def has_triton() -> bool:
    """Whether the GPU kernels run: they hold PTX, which AMD's Triton has not."""
    return importlib.util.find_spec("triton") is not None and torch.version.hip is None


def choose(kernel: str, device: torch.device, there: Collection[str]) -> str:
    """Return the implementation that will run.

    Args:
        kernel: "auto", or a name.
        device: where the operands are.
        there: which implementations the product has.

    Raises:
        GossamerError: an unknown name, or one that cannot run here.
    """
    if kernel == "auto":
        if device.type == "cuda" and "triton" in there and has_triton():
            return "triton"
        if device.type == "cpu":
            if "avx512" in there and has_avx512():
                return "avx512"
            return "avx2" if "avx2" in there and has_avx2() else "portable"
        return "reference"
    if kernel not in NAMES:
        raise GossamerError(f"unknown kernel {kernel!r}; known: {', '.join(NAMES)}")
    if kernel not in there:
        raise GossamerError(f"this format has no kernel {kernel!r}; it has {', '.join(there)}")
    if kernel in ("avx512", "avx2", "portable") and device.type != "cpu":
        raise GossamerError(f"the kernel {kernel!r} runs on the CPU, and the weight is on {device}")
    if kernel == "avx512" and not has_avx512():
        raise GossamerError("the kernel 'avx512' needs AVX-512 with VBMI2, which this processor has not; 'auto' runs here")
    if kernel == "avx2" and not has_avx2():
        raise GossamerError("the kernel 'avx2' needs AVX2 with FMA and F16C, which this processor has not; 'auto' runs here")
    if kernel == "triton" and not has_triton():
        raise GossamerError("the kernel 'triton' needs the package triton, which is not installed; 'auto' does without it")
    if kernel == "triton" and device.type != "cuda":
        raise GossamerError(f"the kernel 'triton' runs on a GPU, and the weight is on {device}")
    return kernel


def needs_gradient(*operands: Tensor) -> bool:
    """Whether a product has to be differentiable."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in operands)
