"""Slow, obvious references that share no formula and no code path with what they judge."""
