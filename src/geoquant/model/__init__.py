"""Models: load one, find its blocks and linear sites, put quantized weights in."""
