"""The embedded default: a phantom data set, and the whole way from raw images to masks, samples and a report on it."""
