"""The parts of the GPU suite; `gpu_suite.py` runs them."""
