"""Merge runs over one base with a method, lazily: a tensor is computed when it is read."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from emomerge.adapters import open_dense, open_run
from emomerge.adapters.aligned import distinct
from emomerge.checkpoints import Checkpoint, OnDevice, RoundingLoss
from emomerge.errors import BadInput, EmomergeError
from emomerge.merging import vectors
from emomerge.merging.buffers import is_statistic
from emomerge.merging.buffers import notes as buffer_notes
from emomerge.merging.diagnostics import Figures, describe
from emomerge.merging.native import KINDS, RoundedOutput
from emomerge.merging.registry import DEFAULT_METHOD, MergeMethod, arguments_of, check_params, find_method, select
from emomerge.merging.settings import Setting, constant, resolve
from emomerge.merging.vectors import BasePlusDelta, Candidate, Loss, TaskVectors, blocks, finite_or_inf, merges
from emomerge.numerics.sums import exact_sum

SCALES = tuple(step / 10 for step in range(1, 16))
"""The candidates for `scale: auto`."""
COARSE = 3
"""Of the candidates, every third is tried before the neighbours of the best."""

Weights = Sequence[Setting] | Literal["equal", "auto"]


def lowest_place(measure: Callable[[int], float], count: int, coarse: int) -> int:
    """Return the place of the lowest of `count` values, the first one in case of ties, if they have one minimum.

    Args:
        measure: returns the value at a place.
        count: number of places.
        coarse: distance of the places that are measured first.
    """
    best = min(range(0, count, coarse), key=measure)
    for step in (-1, 1):
        while 0 <= best + step < count and (measure(best + step), step) < (measure(best), 0):
            best += step
    return best


def merge(
    base: Checkpoint | str | Path,
    runs: Sequence[Checkpoint | str | Path],
    *,
    method: str = DEFAULT_METHOD,
    weights: Weights | None = None,
    scale: Setting | Literal["auto"] | None = None,
    held_out_loss: Loss | None = None,
    run_losses: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    **params: Any,
) -> MergedCheckpoint:
    """Merge runs that started from one base: θ₀ + scale·τ_m, lazily.

    Args:
        base: θ₀.
        runs: the θ_t, dense checkpoints or adapters, each with the base's floating tensors.
        method: one of `METHODS`.
        weights: one number per run (or a setting: see `emomerge.merging.settings`), "equal", or "auto": the softmax of
            the runs' z-scored negative held-out losses. Averaging methods rescale them to a mean of 1; the others, such
            as task-arithmetic, use them as given, by default 1.
        scale: the factor on τ_m (or a setting), by default 1, or "auto": the one of 0.1, 0.2, …, 1.5 with the lowest
            held-out loss.
        held_out_loss: function that measures the loss of a checkpoint on held-out data. If given, weights and scale of
            `tuned` methods default to "auto".
        run_losses: the held-out loss of each run, if already known.
        names: names of the runs in messages and diagnostics.
        device: device to merge on; each tensor is moved there to be merged. Some methods have compiled CPU kernels.
        **params: the method's own parameters (see `check_params` and `emomerge methods`).

    Returns:
        MergedCheckpoint: the merge; a tensor is computed when it is read.

    Raises:
        BadInput: unknown method or parameter, a run that does not fit the base, too many or too few runs, or a choice that
            needs a held-out loss without one. A non-finite task vector raises it when its tensor is read.
    """
    definition = find_method(method)
    given: dict[str, Any] = {"scale": scale, "weights": weights if isinstance(weights, str | None) else list(weights)}
    options = check_params(method, params | {key: value for key, value in given.items() if value is not None})
    base = distinct(base if isinstance(base, Checkpoint) else open_dense(base))
    _check_lengths(len(runs), weights=options.get("weights"), run_losses=run_losses, names=names)
    opened = [open_run(base, run) for run in runs]
    if definition.exact_runs not in (None, len(runs)):
        raise BadInput(f"{method} merges exactly {definition.exact_runs} runs", found=len(runs))
    if (device := torch.device(device)).type != "cpu":
        base, opened = OnDevice(base, device), [OnDevice(run, device) for run in opened]
    task = TaskVectors(base, opened, labels=names or _labels(runs), held_out_loss=held_out_loss, run_losses=run_losses)
    weights, scale = options.pop("weights", None), options.pop("scale")
    if definition.needs_loss:
        task.require_loss(method)
    task.weights = _resolve_weights(task, definition, weights)
    merged = MergedCheckpoint(task, definition, options, weights)
    if scale == "auto" or (scale is None and definition.tuned and held_out_loss is not None):
        merged.choose_scale()
    elif scale is not None:
        merged.scale_by(scale)
    return merged


class MergedCheckpoint(BasePlusDelta):
    """A lazy merge, returned by `merge`: the base's names, dtypes and shapes; `merged[name]` is not yet rounded to the dtype.

    Attributes:
        method: the merge method.
        options: the method's own parameters, checked.
    """

    def __init__(self, task: TaskVectors, method: MergeMethod, options: dict[str, Any], weights: Weights | None) -> None:
        super().__init__(task.base, source=f"{method.name} of {len(task)} runs over {task.base.source}")
        self._task = task
        self.method = method
        self.options = options
        self._weights = weights
        self._scales: dict[str, tuple[float, ...]] = {}
        self._scale_setting: Setting = None
        self._numbers = {
            key: resolve(options[key], task.names, task.labels if s.each_run else ("",), default=s.default, what=f"`{key}`")
            for key, s in method.per_tensor.items()
        }
        given = options | self._numbers
        self._found = method.first_pass(task, **select(method.first_pass, given)) if method.first_pass else {}
        self._masking = False
        self._figures: dict[str, Figures] = {}
        self._scale_losses: dict[float, float] = {}
        self._merged_loss: float | None = None

    @property
    def tokenizers_from(self) -> tuple[Path, ...]:
        """The folders of all runs."""
        return tuple(folder for run in self._task.runs for folder in run.tokenizers_from)

    def tau(self, name: str) -> Tensor | None:
        """Return τ_m of a tensor, before scaling; None if no run moved it."""
        if not merges(self.info(name)):
            self._task.check_equal(name)
            return None
        if is_statistic(name):
            return self._task.statistic(name)
        if (compiled := self._by_kernel(name)) is not None:
            return compiled
        figures = Figures(len(self._task))
        parts: list[Tensor] = []
        rows = self._task.rows(name)
        if rows is not None:
            given = self._given(name, rows)
            size = vectors.CHUNK if self.method.elementwise else len(rows[0])
            for offset, piece in blocks(rows, size):
                deltas = piece if self.method.elementwise else piece.view(-1, *self.info(name).shape)
                inputs = given | {"deltas": deltas, "offset": offset}
                if "base" in given:
                    inputs["base"] = given["base"][offset : offset + size].view(deltas.shape[1:])
                result = self.method.function(**select(self.method.function, inputs))
                tau, masks = result if isinstance(result, tuple) else (result, None)
                parts.append(tau.flatten())
                if name not in self._figures:
                    self._masking |= masks is not None
                    figures.add(deltas, tau, masks)
        self._figures.setdefault(name, figures)
        return torch.cat(parts).view(self.info(name).shape) if parts else None

    def with_base(self, name: str, base: Checkpoint) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return θ₀ + scale·τ, θ₀ and scale·τ; of a counter, its merged value."""
        counter = self._task.counter(name)
        return super().with_base(name, base) if counter is None else (counter, base[name], None)

    def rounded(self, name: str, dtype: torch.dtype, loss: RoundingLoss | None, out: Tensor | None = None) -> Tensor | None:
        """Return θ₀ + scale·τ_m, rounded once, from compiled kernels in a single pass; None if they do not support it."""
        if (
            is_statistic(name)
            or not merges(self.info(name))
            or dtype not in KINDS
            or (loss is not None and loss.base is not self.base)
        ):
            return None
        written = RoundedOutput(dtype, self.scale_of(name), out)
        tensor = self._by_kernel(name, written)
        if tensor is None or not written.finite:
            return None
        if loss is not None:
            loss.add_sums(written.stepped, written.unchanged, written.squared_errors, written.squared_lengths)
        return tensor

    def _by_kernel(self, name: str, written: RoundedOutput | None = None) -> Tensor | None:
        """Return τ_m, or the rounded output, from compiled kernels; None if they do not support the method or the tensor."""
        native, stored = self.method.native, self._task.stored(name) if self.method.native else None
        if native is None or stored is None or not stored.moves or not stored.numel:
            return None
        figures = Figures(len(self._task))
        inputs = self._parameters(name) | {"stored": replace(stored, written=written), "figures": figures}
        inputs["weights"] = self._task.weights_for(name, torch.empty(0))
        result = native(**select(native, inputs))
        if result is None:
            return None
        merged, masking = result
        self._masking |= masking
        self._figures.setdefault(name, figures)
        return merged

    def _parameters(self, name: str) -> dict[str, Any]:
        """Return the method's parameters for a tensor, and the arguments that its first pass provides."""
        numbers = {
            key: setting[name] if self.method.per_tensor[key].each_run else setting[name][0]
            for key, setting in self._numbers.items()
        }
        return {**self.options, **self._found, **numbers}

    def _given(self, name: str, rows: list[Tensor]) -> dict[str, Any]:
        """Return the method's arguments that are the same for every piece of a tensor, including those from its passes."""
        given = self._parameters(name) | {"name": name, "shape": self.info(name).shape}
        given["weights"] = self._task.weights_for(name, rows[0])
        if any("base" in arguments_of(each) for each in (self.method.function, self.method.tensor_pass) if each):
            given["base"] = self._base_of(name, rows[0])
        if self.method.tensor_pass:
            given |= self.method.tensor_pass(**select(self.method.tensor_pass, given | {"rows": rows}))
        return given

    def _base_of(self, name: str, like: Tensor) -> Tensor:
        """Return θ₀ of a tensor, flat, in the dtype and on the device of the deltas."""
        return self.base[name].flatten().to(like)

    @property
    def runs(self) -> tuple[str, ...]:
        """The runs' names."""
        return self._task.labels

    def moves(self, name: str) -> bool:
        """Return whether any run moves a tensor."""
        if is_statistic(name):
            return self._task.statistic(name) is not None
        if merges(self.info(name)) and name not in self._figures:
            self.tau(name)
        return name in self._figures and self._figures[name].moved > 0

    def figures_of(self, names: Iterable[str]) -> tuple[dict[str, Figures], bool]:
        """Return the figures of the tensors that have been computed so far, and whether the method masks."""
        return {name: self._figures[name] for name in names if name in self._figures}, self._masking

    def add_figures(self, figures: Mapping[str, Figures], *, masking: bool) -> None:
        """Add the figures computed by a copy of this merge in a worker (see `figures_of`)."""
        self._figures |= figures
        self._masking |= masking

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle for a worker: all choices that have been made, without the held-out loss."""
        task = copy.copy(self._task)
        task.held_out_loss = None
        return {**self.__dict__, "_task": task, "method": self.method.name, "_figures": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {**state, "method": find_method(state["method"])}

    def arguments(self, name: str) -> dict[str, Any]:
        """Return the method's arguments for a tensor that some run moved, as one flat piece: `deltas` (runs, n) and others."""
        rows = self._task.rows(name) or []
        return self._given(name, rows) | {"deltas": torch.stack(rows), "offset": 0}

    def scale_by(self, setting: Setting) -> None:
        """Set the factor on τ_m: a number, or a setting that varies between tensors."""
        if isinstance(setting, int | float):
            self.scale = float(setting)
        else:
            self._scales, self._scale_setting = resolve(setting, self._task.names, default=1.0, what="`scale`"), setting

    def scale_of(self, name: str) -> float:
        """Return the factor on a tensor's τ_m."""
        return self._scales[name][0] if name in self._scales else super().scale_of(name)

    def set_statistics(self, estimated: Mapping[str, Tensor]) -> None:
        """Replace running statistics of batch norm by those estimated for the merged weights; tensors by name."""
        self._task.estimated = {name: tensor for name, tensor in estimated.items() if name in self._task.statistics}

    def choose_scale(self) -> None:
        """Set the scale to that with the lowest held-out loss, the smallest one in case of ties; spools τ_m to disk.

        Loss along a line has one minimum, or is not worth choosing by: about half of the candidates are measured.
        """
        loss = self._task.require_loss("scale: auto")
        with tempfile.TemporaryDirectory(prefix="emomerge-") as folder:
            files = {}
            for number, name in enumerate(self._task.floating):
                if (tau := self.tau(name)) is not None:
                    files[name] = Path(folder) / f"{number}.safetensors"
                    save_file({"tau": tau.contiguous()}, files[name])

            def spooled(name: str) -> Tensor | None:
                return load_file(files[name])["tau"] if name in files else None

            def measure(place: int) -> float:
                scale = SCALES[place]
                if scale not in self._scale_losses:
                    self._scale_losses[scale] = finite_or_inf(loss(Candidate(self.base, spooled, scale=scale)))
                return self._scale_losses[scale]

            best = lowest_place(measure, len(SCALES), COARSE)
        self.scale, self._scale_losses = SCALES[best], dict(sorted(self._scale_losses.items()))
        if math.isinf(self._scale_losses[self.scale]):
            raise EmomergeError(f"{self.source}: the held-out loss is not finite at any scale from {SCALES[0]} to {SCALES[-1]}")

    def diagnostics(self) -> dict[str, Any]:
        """Return diagnostics of the merge as JSON-compatible data; computes the tensors that have not been read yet.

        For N runs with task vectors τ_t and their plain mean τ̄:

        - `method`, `runs`, `params`: resolved parameters, including `scale` and `weights`; `lambda_crit`: 1/(N−1).
        - `elements`: number of floating-point weights; as shares of these, `moved_density` (moved by any run),
          `kept_density` (moved by τ_m) and, if the method masks, `mask_density` of each run.
        - `kept_energy`: the share of ‖τ̄‖² at the elements with τ_m ≠ 0; `cosine_to_mean`: of τ_m and τ̄.
        - `merged_norm`, `mean_norm`, `run_norms`: of τ_m, τ̄ and the τ_t.
        - `cosines`, `sign_agreement`: of each pair of τ_t, the latter over the elements where neither is zero.
        - `run_losses`, `scale_losses`: held-out losses, if measured; `warnings`.
        """
        for name in self._task.names:
            if name not in self._figures:
                self.tau(name)
        figures = Figures(len(self._task)).join(self._figures.values())
        report = {
            "method": self.method.name,
            "params": self._resolved(),
            "runs": list(self._task.labels),
            **describe(figures, self._task.labels, self._task.numel, masking=self._masking),
        }
        losses = self._task.known_run_losses
        if losses is not None:
            report["run_losses"] = {label: _json(loss) for label, loss in zip(self._task.labels, losses, strict=True)}
        if self._scale_losses:
            report["scale_losses"] = {f"{scale:g}": _json(loss) for scale, loss in self._scale_losses.items()}
        advice = self.method.advice(report) if self.method.advice and self._figures else []
        overflow = None in (report["merged_norm"], report["mean_norm"], *report["run_norms"].values())
        beyond = ["the weights are so large that sums of their squares overflow: some figures are unknown"] * overflow
        report["warnings"] = advice + beyond + buffer_notes(*self._task.moved_buffers()) + self._compare_with_runs(losses)
        return report

    def _resolved(self) -> dict[str, Any]:
        """Return the parameters as written in a recipe, with the chosen values."""
        params = {key.rstrip("_"): value for key, value in self.options.items()}
        plain = {key: value for key, value in self._found.items() if _is_plain(value)}
        if self.method.takes_weights:
            total = len(self._task) if self.method.relative_weights else 1
            shared = constant(self._task.weights)
            params["weights"] = self._weights if shared is None else [weight / total for weight in shared]
        scale = self.scale if self._scale_setting is None else self._scale_setting
        return {key: _json(value) for key, value in {**params, **plain, "scale": scale}.items()}

    def _compare_with_runs(self, losses: list[float] | None) -> list[str]:
        """Warn about a merge that is worse than its best run."""
        loss = self._task.held_out_loss
        if not losses or loss is None:
            return []
        if self._merged_loss is None:
            self._merged_loss = self._scale_losses.get(self.scale) or finite_or_inf(loss(self))
        best, merged = min(losses), self._merged_loss
        if merged <= best or math.isclose(merged, best, rel_tol=1e-5):  # θ₀ + (θ − θ₀) is θ up to rounding
            return []
        label = self._task.labels[losses.index(best)]
        return [f"the merge's held-out loss {merged:.4g} is worse than {best:.4g} of run {label}; use that run instead"]


def _resolve_weights(task: TaskVectors, method: MergeMethod, given: Weights | None) -> dict[str, tuple[float, ...]]:
    """Return one weight per run for each tensor, rescaled to a mean of 1 if the method averages."""
    runs = len(task)
    measurable = task.known_run_losses is not None or task.held_out_loss is not None
    if given == "auto" or (given is None and method.tuned and measurable):
        given = softmax_weights(task.run_losses("weights: auto"))
    elif given is None or isinstance(given, str):
        given = [1.0] * runs
    settings = [resolve(each, task.floating, what=f"`weights`, {run}") for each, run in zip(given, task.labels, strict=True)]
    weights = {name: tuple(each[name][0] for each in settings) for name in task.floating}
    if not method.relative_weights:
        return weights
    return {name: _mean_one(some, name) for name, some in weights.items()}


def _mean_one(weights: tuple[float, ...], name: str) -> tuple[float, ...]:
    total = exact_sum(weights)
    if not 0 < total < math.inf:
        raise BadInput("weights must have a positive sum", where=name, found=list(weights))
    return tuple(weight * len(weights) / total for weight in weights)


def softmax_weights(losses: Sequence[float]) -> list[float]:
    """Return the softmax of the z-scored negative losses (population standard deviation); equal losses get equal weights."""
    mean, deviation = statistics.fmean(losses), statistics.pstdev(losses)
    powers = [math.exp((mean - loss) / deviation) if deviation else 1.0 for loss in losses]
    return [power / exact_sum(powers) for power in powers]


def _check_lengths(runs: int, **given: Sequence[Any] | None) -> None:
    if runs == 0:
        raise BadInput("no runs to merge", expected="at least one")
    for what, values in given.items():
        if values is not None and not isinstance(values, str) and len(values) != runs:
            raise BadInput(f"`{what}` does not fit the runs", expected=f"{runs}, one for each run", found=len(values))
    if (names := given["names"]) and len(set(names)) < runs:
        raise BadInput("two runs have the same name in `names`", found=", ".join(names))


def _labels(runs: Sequence[Checkpoint | str | Path]) -> list[str]:
    """Name the runs after their sources; number duplicates."""
    sources = [run.source if isinstance(run, Checkpoint) else str(run) for run in runs]
    return [f"{source} #{i}" if sources.count(source) > 1 else source for i, source in enumerate(sources, start=1)]


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, str | int | float)


def _json(value: Any) -> Any:
    """Convert a value to JSON: tuples to lists, infinity to None."""
    if isinstance(value, tuple):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
