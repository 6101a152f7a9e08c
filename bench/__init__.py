"""Benchmarks: every figure that this project states comes out of a script in this folder."""
