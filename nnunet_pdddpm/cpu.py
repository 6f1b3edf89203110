"""What the processor can do."""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 (AVX512-BF16): without them it would be slower than float32."""
    supported = getattr(torch.cpu, '_is_avx512_bf16_supported', None)  # torch has no public name for it
    return supported is not None and bool(supported())


def available_cpus() -> int:
    """Number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Within it torch uses this number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
