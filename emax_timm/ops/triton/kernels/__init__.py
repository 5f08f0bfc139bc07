"""The kernels, by what they compute; `tiles.py` says how the tensors lie in memory.

Shapes and formulas are those of `ops/portable`, and `docs/emax.md` proves and derives them. A
tensor of a part that a layer lacks is None.
"""
