"""Transformer shapes and the kernels they become: FLOPs, bytes, message sizes, and how a kernel may be split."""
