"""One file a kind of sparsity; `_walk.py` is the only one that knows how a Hugging Face model is built."""
