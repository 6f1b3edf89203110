"""The embedded default: a phantom data set, and the whole way from raw images to refined masks on it."""
