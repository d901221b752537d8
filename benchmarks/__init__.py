"""Benchmarks of gatedconv against every runtime that a user could pick instead: ``pytest benchmarks``."""
