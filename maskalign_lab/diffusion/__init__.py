"""Interpolants, objectives, networks, samplers, and taps to look inside."""
