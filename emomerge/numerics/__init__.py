"""The basis of reproducible bits: fixed-order sums, seeds from names, rounding, hashes and single-threaded sections.

All other packages use these instead of writing their own, so that results depend neither on the number of threads, nor on the
hash seed, nor on how the work is split. Import the modules by name; `hashing` needs no torch.
"""
