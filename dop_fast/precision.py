"""Mixed precision: where a short type pays."""

import torch


def computes_in_bf16(device: torch.device) -> bool:
    """Return whether the device has bfloat16 arithmetic of its own.

    A CPU without it imitates it, at half the speed of float32; one with it gains 1.6 times.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def in_bf16(device: torch.device, amp: str) -> bool:
    """Return whether an extraction's forwards run in bfloat16; `amp` as in `ExtractConfig`."""
    return amp == "bf16" or (amp == "auto" and computes_in_bf16(device))


def training_type(device: torch.device, amp: str) -> torch.dtype:
    """Return what a training's forwards and backwards run in; `amp` as in `TrainConfig`."""
    if amp == "auto":
        older = "fp16" if device.type == "cuda" else "off"
        amp = "bf16" if computes_in_bf16(device) else older
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context to run forwards in; of float32, one that changes nothing."""
    short = dtype != torch.float32
    return torch.autocast(device.type, dtype if short else torch.bfloat16, enabled=short)
