"""The real hardware: torch.distributed ranks that run the rounds of the shared policy."""
