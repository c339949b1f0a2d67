"""The Hessian, matrix-free: extreme eigenvalues, spectral density, trace, blocks by module, restriction to task vectors."""

from __future__ import annotations

from emomerge.probing.hessian.hutchinson import Trace, trace
from emomerge.probing.hessian.product import Curvature, Method, curvature
from emomerge.probing.hessian.span import SpanHessian, in_span
from emomerge.probing.hessian.spectrum import Extreme, Lanczos, blockwise, density, lanczos

__all__ = [
    "Curvature", "Extreme", "Lanczos", "Method", "SpanHessian", "Trace",
    "blockwise", "curvature", "density", "in_span", "lanczos", "trace",
]  # fmt: skip
