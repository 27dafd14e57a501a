"""The pruned and quantized network as bytes: container, coders, and the command line."""
