"""Mixed precision: where bfloat16 pays."""

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
    """Return whether forwards run in bfloat16; `amp` as in `TrainConfig`."""
    return amp == "bf16" or (amp == "auto" and computes_in_bf16(device))


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Return the context to run forwards in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(device, amp))
