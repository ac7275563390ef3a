"""The simulated hardware: SimPy processes for hosts, streams, SMs, memory and links."""
