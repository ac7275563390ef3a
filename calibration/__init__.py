"""Measurements in, fitted hardware out, and how far the model is from the truth."""
