"""Models: file names, indexes, safetensors headers, and the order in which a loader reads. Pure."""
