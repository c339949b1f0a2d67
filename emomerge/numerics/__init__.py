"""Where "the same bits" is kept: sums in a fixed order, seeds from names, hashes, and sections that run on one thread.

Every other package imports these instead of writing its own, so that a result depends neither on the number of threads nor
on the hash seed, nor on how the work is split. The modules are imported by name; `hashing` needs no torch.
"""
