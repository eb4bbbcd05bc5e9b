"""Doctests are looked for in every file of the package, and some of them are for a GPU alone."""

from importlib.util import find_spec

GPU = ["src/gossamer/kernels/*/triton.py", "src/gossamer/kernels/_gpu.py", "src/gossamer/kernels/_ptx.py"]
collect_ignore_glob = [] if find_spec("triton") else GPU
