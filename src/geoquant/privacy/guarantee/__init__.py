"""Guarantees with a proof: what is released came out of a mechanism whose accounting is exact, and says its scope."""
