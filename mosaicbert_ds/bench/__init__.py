"""Measurements of the hot path on the machine at hand."""
