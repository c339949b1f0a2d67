"""The merge methods by family. Each is one function, which merges one tensor and follows its formula.

Notation: τ_t = θ_t − θ₀ are the task vectors of N runs, S = Σ_t τ_t, τ̄ = S/N. A method computes τ_m, and the merge is
θ₀ + scale·τ_m. `deltas` (runs, *shape) stacks the τ_t of one tensor; `weights` (runs,) have a mean of 1 unless a method
states otherwise. Sums over runs are loops in the order of the runs, and sums over elements are taken by rows of a fixed
length, so that results do not depend on how the work is split.
"""

# These modules register their methods when they are imported.
from emomerge.merging.methods import agreement as agreement
from emomerge.merging.methods import averages as averages
from emomerge.merging.methods import metrics_weighted as metrics_weighted
from emomerge.merging.methods import positioning as positioning
from emomerge.merging.methods import sparse as sparse
from emomerge.merging.methods import spectral as spectral
from emomerge.merging.methods import spherical as spherical
from emomerge.merging.methods import tall_mask as tall_mask
from emomerge.merging.methods import ties as ties
