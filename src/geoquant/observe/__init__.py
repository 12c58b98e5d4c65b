"""Moments of the inputs that reach each site, streamed block by block."""
