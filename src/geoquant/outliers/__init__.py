"""Which weights matter, to whom, and why: origins of outliers, scores, and identity by intervention."""
