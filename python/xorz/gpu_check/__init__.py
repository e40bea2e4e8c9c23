"""`python -m xorz.gpu_check`: whether a GPU computes what the CPU does, and how fast. `__main__` says how."""
