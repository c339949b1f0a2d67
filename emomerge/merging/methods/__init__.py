"""The merge methods by family: one function each, on one tensor, reading as its formula.

Notation: τ_t = θ_t − θ₀ are the task vectors of N runs, S = Σ_t τ_t, τ̄ = S/N; a method gives τ_m, and the merge is
θ₀ + scale·τ_m. `deltas` (runs, *shape) stacks the τ_t of one tensor; `weights` (runs,) has mean 1 unless a method says
otherwise. Sums over runs are loops in the order of the runs, and sums over elements go by rows of a fixed length, so that
no result depends on how the work is split.
"""

from emomerge.merging.methods import averages, positioning, sparse, spectral, spherical, tall_mask, ties

__all__ = ["averages", "positioning", "sparse", "spectral", "spherical", "tall_mask", "ties"]
