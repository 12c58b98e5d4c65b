"""Closest-vector solvers on the lattice that a layer's Hessian defines. Knows tensors and nothing else."""
