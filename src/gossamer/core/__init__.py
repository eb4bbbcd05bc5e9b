"""Tensors in, tensors out; torch only."""
