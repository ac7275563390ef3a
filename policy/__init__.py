"""The one shared scheduler: which batches to form and which kernels to launch together next, as a pure function."""
