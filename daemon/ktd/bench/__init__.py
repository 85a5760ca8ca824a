"""Measurements of this machine: kernels against the peer and the wall, and whole models."""
