"""Benchmarks of the strategies: longer than tests, run by hand."""
