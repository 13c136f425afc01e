"""Which device computes, and in which precision it is fast."""

from __future__ import annotations

import torch

from edge_runtime.errors import UsageError, nearest

DEVICES = ("auto", "cpu", "cuda")


def choose_device(name: str) -> torch.device:
    """Return the device called ``auto`` (a GPU where there is one), ``cpu`` or ``cuda``.

    Raises:
        UsageError: another name, or ``cuda`` without a GPU.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if name not in DEVICES:
        raise UsageError(f"no device {name!r}; {nearest(name, DEVICES)}")
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise UsageError("device 'cuda': this torch sees no CUDA GPU; use auto or cpu")
    return torch.device("cuda" if found and name != "cpu" else "cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Tell whether the hardware multiplies bfloat16; emulated, it is twenty times slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
