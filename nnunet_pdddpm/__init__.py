"""Diffusion refinement for nnU-Net v2: PD-DDPM (Guo et al., arXiv 2210.17408) on the user's own trained models."""
import logging

__version__ = '0.2.0'

logging.getLogger(__name__).addHandler(logging.NullHandler())  # who imports the package decides what is shown
