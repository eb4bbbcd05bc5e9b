"""Doctests are looked for in every file of the package, and some of them are for a GPU alone."""

from importlib.util import find_spec

GPU = [f"src/gossamer/kernels/{file}.py" for file in ("*/triton", "*/_ptx", "*/_hopper", "*/_prompt", "_gpu", "_ptx")]
collect_ignore_glob = [] if find_spec("triton") else GPU
