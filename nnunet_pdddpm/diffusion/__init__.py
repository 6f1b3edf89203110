"""Truncated diffusion on masks: pure functions on tensors that know nothing of nnU-Net."""
