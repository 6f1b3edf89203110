"""Diffusion refinement for nnU-Net v2: PD-DDPM (Guo et al., arXiv 2210.17408) on the user's own trained models."""
__version__ = '0.2.0'
