"""Geometry of weights as points: tangent spaces, dimensions, distances. Knows tensors and nothing else.

Points are the rows of a matrix (neurons). For distances that carry function, hand in the points and their changes
multiplied by a factor L of the metric, `A = L L^T`: `|x L|^2 = x^T A x`.
"""
