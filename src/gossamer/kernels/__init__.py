"""One folder a product: reference.py says what it is, cpu.py and triton.py compute it fast, cases.py what it is tested on."""
