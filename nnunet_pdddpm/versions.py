"""The nnU-Net versions this package works with."""
from __future__ import annotations

import re
from importlib.metadata import version

MINIMUM_NNUNET = (2, 8)


def require_nnunet() -> str:
    """Version of the installed nnunetv2.

    Raises:
        ImportError: if it is older than 2.8, whose trainers build networks from other arguments.
    """
    installed = version('nnunetv2')
    if tuple(int(part) for part in re.findall(r'\d+', installed)[:2]) < MINIMUM_NNUNET:
        raise ImportError(f'nnunet-pdddpm needs nnunetv2 2.8 or newer, {installed} is installed: '
                          f'pip install "nnunetv2>=2.8,<3".')
    return installed
