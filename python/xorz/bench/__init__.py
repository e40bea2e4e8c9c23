"""`python -m xorz.bench`: how fast fine-tunes of one base run on this machine, beside every other way of
running them.

On the user's own model or on synthetic matrices; `make bench` is the same code. Needs torch only; what takes
more (zstandard for the seed notebook's way, safetensors for checkpoints) says so or is left out.
"""
