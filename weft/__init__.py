"""The public face: the command line and the few functions that notebooks call."""
