"""Attention kernels: one specification (spec), one oracle (reference), several backends (backends)."""
