"""The modules nnU-Net sees: the denoiser, and the refiner that joins it to the frozen stock network."""
