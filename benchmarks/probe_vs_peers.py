"""The Hessian's figures against PyHessian, hessian-eigenthings and curvlinops: CPU time at equal accuracy, and memory.

    apt-get install dataset-fashion-mnist              # or --data FOLDER with the four IDX files
    pip install torch==2.13.0 pyhessian hessian-eigenthings==1.0.0a5 curvlinops-for-pytorch
    python benchmarks/probe_vs_peers.py cnn            # 4 minutes on one core; vit takes 10
    python benchmarks/probe_vs_peers.py cnn --memory

`--out benchmarks/results/probe_vs_peers.json` keeps the figures of this model beside those of the other, for `docs_tables.py`.

A CNN (GELU, without GroupNorm, which curvlinops cannot differentiate forward) or a small ViT, trained for 200 steps on
FashionMNIST, on two batches of 256 images. Three jobs:

- `λmax`: within 0.5 %. emomerge stops by its own bound. The peers are told: of hessian-eigenthings' steps, scipy's basis for
  curvlinops and PyHessian's tolerances each gets the cheapest that comes within 0.5 % of the known λmax, found beforehand.
  “by residual” is what hessian-eigenthings needs without being told: steps until its residual is below 0.5 %.
- `trace`: with the standard error that 32 probes of Hutchinson's method have here, by a Lanczos run and then as many probes as
  that needs, or with the peers' Hutch++ (by as many products as that needs) or Hutchinson's method, whichever is cheaper.
- `all`: λmax and λmin, both to 0.5 % of λmax, the spectral density, and the trace. hessian-eigenthings, told again, does this
  by its three functions, or by hand from one tridiagonal matrix.

Memory: of a training step on one batch (AdamW), of λmax, and of 30 Lanczos steps with a trace, by either kind of product.

Double backward has no fused attention, so that autograd peers run the ViT under the math backend.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from stacked_training import machine
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from emomerge import recipe
from emomerge.probing import Perturbable, hessian, rms
from emomerge.tasks.image_classification import ImageClassification, ImageClassificationTask
from emomerge.tasks.models import build

WITHIN = 0.005
PROBES = 32
LEAST = 4
"""Probes for a standard error; the peers' Hutch++ begins with as many."""
PEAKS = ["training step", "λmax", "finite-difference", "autograd"]
PEERS = ("pyhessian", "hessian-eigenthings", "curvlinops-for-pytorch")
Batch = tuple[Tensor, Tensor]
Found = tuple[float | None, float | None, float | None]
"""λmax, trace, and its standard error."""
Job = Callable[[], Found]


class Logits(nn.Module):
    """A model of transformers that returns its logits only, as the peers want it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.model(pixels).logits
        return logits


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (1, 32, 32):
        layers += [nn.Conv2d(channels, 32, kernel_size=3, stride=2, padding=1), nn.GELU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 4 * 4, 32), nn.GELU(), nn.Linear(32, 10))


def prepare(kind: Any, folder: Path) -> tuple[nn.Module, list[Batch]]:
    section = ImageClassification(kind="image-classification", train=str(folder))
    settings = recipe.Prepare(model="vit", hidden=64, layers=4, patch_size=7)
    data = ImageClassificationTask(section).load_data(recipe.Base(prepare=settings)).train
    torch.manual_seed(0)
    classes = [str(number) for number in range(10)]
    model = cnn() if kind == "cnn" else Logits(build(settings, channels=1, image_size=28, classes=classes))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(200):
        batch = data.batch(torch.randint(len(data), (64,)))
        optimizer.zero_grad()
        F.cross_entropy(model(batch["pixel_values"]), batch["labels"]).backward()
        optimizer.step()
    optimizer.zero_grad()
    rows = [data.batch(range(start, start + 256)) for start in (0, 256)]
    return model.eval(), [(batch["pixel_values"], batch["labels"]) for batch in rows]


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
    return F.cross_entropy(model(batch[0]), batch[1]), float(len(batch[1]))


def ours(model: nn.Module, batches: list[Batch], target: float) -> dict[str, Job]:
    def new() -> Perturbable:
        return Perturbable(model, loss, batches, rms(model))

    def needed(ends: Any) -> int:
        run = hessian.lanczos(new(), tolerance=WITHIN, ends=ends)
        pilot = hessian.trace(new(), PROBES, lanczos=run).summary()
        probes = max(LEAST, math.ceil((pilot["stderr"] / target) ** 2 * PROBES))
        print(f"emomerge: {len(run.alpha)} Lanczos steps for {ends}, then {probes} probes")
        return probes

    one, both = needed("largest"), needed("both")

    def largest() -> Found:
        return hessian.lanczos(new(), tolerance=WITHIN, ends="largest").largest.value, None, None

    def trace() -> Found:
        probe = new()
        run = hessian.lanczos(probe, tolerance=WITHIN, ends="largest")
        found = hessian.trace(probe, one, lanczos=run).summary()
        return None, found["mean"], found["stderr"]

    def everything() -> Found:
        probe = new()
        run = hessian.lanczos(probe, tolerance=WITHIN)
        hessian.density([run])
        found = hessian.trace(probe, both, lanczos=run).summary()
        return run.largest.value, found["mean"], found["stderr"]

    return {"λmax": largest, "trace": trace, "all": everything}


@dataclass(frozen=True)
class Budget:
    """What hessian-eigenthings needs to be as accurate."""

    largest: int
    """Lanczos steps for λmax."""
    sure: int
    """The same by the residual."""
    smallest: int
    """And for λmin."""
    products: int
    """Of the trace."""
    method: Any


def budget(model: nn.Module, batches: list[Batch], exact: hessian.Lanczos, target: float, plain: int) -> Budget:
    """The smallest budget in steps (Lanczos), by double backward, or in six products (Hutch++), by finite differences."""
    import hessian_eigenthings as peer

    matrix = peer.HessianOperator(model, batches, peer.supervised_loss(F.cross_entropy), method="autograd")
    start = torch.randn(matrix.size, generator=torch.Generator().manual_seed(0))
    with math_attention():
        run = peer.lanczos_tridiagonal(matrix, start, 30)
    whole = torch.diag(run.alphas) + torch.diag(run.betas, 1) + torch.diag(run.betas, -1)
    ritz = {steps: torch.linalg.eigh(whole[:steps, :steps]) for steps in range(2, 30)}
    assert exact.smallest is not None
    near, low = WITHIN * exact.largest.value, exact.smallest.value
    largest = next(k for k, (values, _) in ritz.items() if abs(values[-1] - exact.largest.value) <= near)
    sure = next(k for k, (_, vectors) in ritz.items() if run.betas[k - 1] * vectors[-1, -1].abs() <= near)
    smallest = next(k for k, (values, _) in ritz.items() if k >= largest and abs(values[0] - low) <= near)
    matrix = peer.HessianOperator(model, batches, peer.supervised_loss(F.cross_entropy), method="finite_difference")
    for products in range(12, plain, 6):  # one run's four or more samples would say too little of its own error
        errors = [peer.trace(matrix, num_matvecs=products, method="hutch++", seed=seed).stderr for seed in range(5)]
        if statistics.fmean(error**2 for error in errors) <= target**2:
            return Budget(largest, sure, smallest, products, "hutch++")
    return Budget(largest, sure, smallest, plain, "hutchinson")


def eigenthings(model: nn.Module, batches: list[Batch], needs: Budget, method: Any) -> tuple[dict[str, Job], Job, Job]:
    """The jobs, `all` by hand, and λmax by residual."""
    import hessian_eigenthings as peer

    matrix = peer.HessianOperator(model, batches, peer.supervised_loss(F.cross_entropy), method=method)

    def largest(steps: int = needs.largest) -> Found:
        found = peer.lanczos(matrix, k=1, max_iter=steps, which="LA", seed=0)
        return float(found.eigenvalues[0]), None, None

    def trace() -> Found:
        found = peer.trace(matrix, num_matvecs=needs.products, method=needs.method, seed=0)
        return None, found.estimate, found.stderr

    def everything() -> Found:
        value = largest()[0]
        peer.lanczos(matrix, k=1, max_iter=needs.smallest, which="SA", seed=0)
        peer.spectral_density(matrix, num_runs=1, lanczos_steps=needs.smallest, seed=0)
        return (value, *trace()[1:])

    def by_hand() -> Found:
        start = torch.randn(matrix.size, generator=torch.Generator().manual_seed(0))
        found = peer.lanczos_tridiagonal(matrix, start, needs.smallest)
        whole = torch.diag(found.alphas) + torch.diag(found.betas, 1) + torch.diag(found.betas, -1)
        return (float(torch.linalg.eigvalsh(whole)[-1]), *trace()[1:])

    return {"λmax": largest, "trace": trace, "all": everything}, by_hand, lambda: largest(needs.sure)


def curvlinops(model: nn.Module, batches: list[Batch], reference: float, plain: int) -> dict[str, Job]:
    import curvlinops as peer
    from scipy.sparse.linalg import eigsh

    parameters = [p for p in model.parameters() if p.requires_grad]
    matrix = peer.HessianLinearOperator(model, nn.CrossEntropyLoss(), parameters, batches, check_deterministic=False)

    def largest(basis: int) -> Found:
        torch.manual_seed(0)
        start = torch.randn(sum(p.numel() for p in parameters)).numpy()
        found = eigsh(matrix.to_scipy(), k=1, which="LA", v0=start, ncv=basis, tol=1.0, return_eigenvectors=False)
        return float(found[0]), None, None

    def trace() -> Found:
        torch.manual_seed(0)
        found = torch.stack([peer.hutchinson_trace(matrix, num_matvecs=1) for _ in range(plain)])
        return None, float(found.mean()), float(found.std() / plain**0.5)

    basis = next(basis for basis in range(3, 100) if abs((largest(basis)[0] or 0) / reference - 1) <= WITHIN)
    print(f"curvlinops: {basis} vectors")
    return {"λmax": lambda: largest(basis), "trace": trace}


def pyhessian(model: nn.Module, batches: list[Batch], reference: float, plain: int) -> dict[str, Job]:
    from pyhessian import hessian as peer

    whole = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])

    def largest(tolerance: float) -> Found:
        torch.manual_seed(0)
        found = peer(model, nn.CrossEntropyLoss(), data=whole, cuda=False).eigenvalues(maxIter=200, tol=tolerance)[0][0]
        return found, None, None

    def trace() -> Found:
        torch.manual_seed(0)
        found = torch.tensor(peer(model, nn.CrossEntropyLoss(), data=whole, cuda=False).trace(maxIter=plain, tol=0.0))
        return None, float(found.mean()), float(found.std() / plain**0.5)

    near = (t for t in (1e-2, 1e-3, 1e-4, 1e-5) if abs((largest(t)[0] or 0) / reference - 1) <= WITHIN)
    tolerance = next(near)
    print(f"PyHessian: tolerance {tolerance:g}")
    return {"λmax": lambda: largest(tolerance), "trace": trace}  # its density calls torch.eig, which torch no longer has


def math_attention() -> Any:
    return sdpa_kernel(SDPBackend.MATH)


def compare(kind: str, folder: Path, rounds: int, plain: int) -> dict[str, Any]:
    model, batches = prepare(kind, folder)
    probe = Perturbable(model, loss, batches, rms(model))
    exact = hessian.lanczos(probe, 30, hvp="autograd")
    reference = exact.largest.value
    target = hessian.trace(probe, PROBES).summary()["stderr"] * math.sqrt(PROBES / plain)
    print(f"{kind}: λmax {reference:.5g} ± {exact.largest.residual:.1g} by double backward; standard error {target:.3g}")
    contenders: dict[str, tuple[Any, dict[str, Job]]] = {"emomerge": (nullcontext, ours(model, batches, target))}
    needs = budget(model, batches, exact, target, plain)
    print(f"hessian-eigenthings: {needs}")
    for method, context in (("finite_difference", nullcontext), ("autograd", math_attention)):
        name = f"hessian-eigenthings, {method.replace('_', ' ')}"
        jobs, by_hand, by_residual = eigenthings(model, batches, needs, method)
        contenders[name] = (context, jobs)
        contenders[f"{name}, by hand"] = (context, {"all": by_hand})
        contenders[f"{name}, by residual"] = (context, {"λmax": by_residual})
    with math_attention():
        contenders["curvlinops"] = (math_attention, curvlinops(model, batches, reference, plain))
        contenders["PyHessian"] = (math_attention, pyhessian(model, batches, reference, plain))
    times: dict[tuple[str, str], list[float]] = {}
    found: dict[tuple[str, str], Found] = {}
    for _ in range(rounds):
        for name, (context, jobs) in contenders.items():
            for job, work in jobs.items():
                with context():
                    start = time.process_time()
                    found[name, job] = work()
                times.setdefault((name, job), []).append(time.process_time() - start)
                model.zero_grad(set_to_none=True)
    show(kind, contenders, times, found, reference)
    rows = [
        {"name": name, "job": job, "cpu": statistics.median(seconds), "largest": value, "trace": trace, "error": error}
        for (name, job), seconds in times.items()
        for value, trace, error in (found[name, job],)
    ]
    return {"largest": reference, "error": target, "within": WITHIN, "probes": plain, "rounds": rounds, "rows": rows}


def store(file: Path, part: str, kind: str, found: dict[str, Any]) -> None:
    """Keep what was found for a model (`part`: times or memory) in a JSON file, beside what else is in it."""
    stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    found["torch"], found["peers"] = torch.__version__, {name: version(name) for name in PEERS}
    found |= {"machine": machine(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    stored[part] = dict(sorted({**stored.get(part, {}), kind: found}.items()))
    file.write_text(json.dumps(stored, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def show(kind: str, contenders: dict[str, Any], times: Any, found: dict[tuple[str, str], Found], reference: float) -> None:
    table = Table(title=f"{kind}: CPU seconds (times emomerge's)")
    for column in ("", "λmax", "trace", "all", "error of λmax", "trace ± standard error"):
        table.add_column(column, justify="left" if not column else "right")
    for name, (_, jobs) in contenders.items():
        cells = []
        for job in ("λmax", "trace", "all"):
            seconds = statistics.median(times[name, job]) if job in jobs else None
            ratio = seconds / statistics.median(times["emomerge", job]) if seconds else 0
            cells.append(f"{seconds:.2f} ({ratio:.2f})" if seconds else "—")
        value = found[name, "λmax" if "λmax" in jobs else "all"][0]
        _, mean, error = found[name, "all" if "all" in jobs else [*jobs][-1]]
        cells += [f"{value / reference - 1:+.2%}" if value else "—", f"{mean:.4g} ± {error:.2g}" if mean else "—"]
        table.add_row(name, *cells)
    Console(width=150).print(table)


def peak(kind: str, folder: Path, what: str) -> None:
    """Prints how many MiB the process's memory was before the work and at its peak, as JSON."""
    model, batches = prepare(kind, folder)
    probe = Perturbable(model, loss, batches, rms(model))
    status = Path("/proc/self/status")
    before = int(re.findall(r"VmRSS:\s+(\d+)", status.read_text())[0])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    if what == "training step":
        optimizer = torch.optim.AdamW(model.train().parameters(), 1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            loss(model, batches[0])[0].backward()
            optimizer.step()
    elif what == "λmax":
        hessian.lanczos(probe, tolerance=WITHIN, ends="largest")
    else:
        hessian.trace(probe, 4, lanczos=hessian.lanczos(probe, 30, hvp=what), hvp=what)  # type: ignore[arg-type]
    during = int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0])
    print(json.dumps({"what": what, "before": before / 1024, "peak": during / 1024}))


def memory(kind: str, folder: Path) -> dict[str, Any]:
    """Measures every peak in a process of its own."""
    rows = []
    for what in PEAKS:
        command = [sys.executable, __file__, kind, "--data", str(folder), "--peak", what]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(said.splitlines()[-1]))
        print(f"{what:18} {rows[-1]['before']:6.0f} MiB before, {rows[-1]['peak']:6.0f} at the peak", flush=True)
    return {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["cnn", "vit"])
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--probes", type=int, default=PROBES, help="of Hutchinson's method; sets the trace's accuracy")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--out", type=Path, help="JSON file that keeps the figures of this model")
    parser.add_argument("--peak", choices=PEAKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch")
    torch.set_num_threads(1)
    if options.peak:
        peak(options.kind, options.data, options.peak)
        return
    if options.memory:
        part, found = "memory", memory(options.kind, options.data)
    else:
        part, found = "times", compare(options.kind, options.data, options.rounds, options.probes)
    if options.out:
        store(options.out, part, options.kind, found)


if __name__ == "__main__":
    main()
