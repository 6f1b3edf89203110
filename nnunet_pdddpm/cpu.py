"""What the processor can do."""
from __future__ import annotations

import torch


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 (AVX512-BF16): without them it would be slower than float32."""
    supported = getattr(torch.cpu, '_is_avx512_bf16_supported', None)  # torch has no public name for it
    return supported is not None and bool(supported())
