"""Dropout of several runs in one forward pass: each run draws what it would draw alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]


class Streams:
    """Where each run stands in its random numbers; all draw from the device's default generator, in turns.

    Args:
        keys: one for each run; runs of equal keys draw the same and share a stream.
        device: whose default generator is used.
    """

    def __init__(self, keys: Sequence[object], device: torch.device) -> None:
        distinct = list(dict.fromkeys(keys))
        self.of_run = [distinct.index(key) for key in keys]
        """The stream of each run."""
        self.leaders = [self.of_run.index(stream) for stream in range(len(distinct))]
        """The first run of each stream."""
        self._generator: Any = torch if device.type == "cpu" else torch.get_device_module(device)
        self._passed: dict[bytes, tuple[int, list[Tensor]]] = {}
        self._last: tuple[int, list[Tensor]] = (0, [])

    def start(self, begin: Callable[[int], None]) -> None:
        """Seed every stream by `begin(run)` of its leader, which may already draw."""
        states = []
        for run in self.leaders:
            begin(run)
            states.append(self._generator.get_rng_state())
        self._passed.clear()
        self._go(0, states)

    def draw(self, runs: Sequence[int], sample: Callable[[int, int], Tensor]) -> list[Tensor]:
        """`sample(run, position)` of these runs, from where their streams stand; then all streams move on.

        Args:
            runs: at least one of each stream.
            sample: draws; is also told how many times has been drawn since the start.
        """
        position, before = self._now()
        if len(runs) == 1:
            return [sample(runs[0], position)]
        after, found = list(before), []
        for run in runs:
            self._generator.set_rng_state(before[self.of_run[run]])
            found.append(sample(run, position))
            after[self.of_run[run]] = self._generator.get_rng_state()
        self._go(position + 1, after)
        return found

    def _now(self) -> tuple[int, list[Tensor]]:
        """Position and states; gradient checkpointing has put the generator back to where the first stream once was."""
        now = self._generator.get_rng_state()
        if len(self.leaders) == 1:
            return 0, [now]
        position, states = self._last  # for the others, if a layer has drawn that is not covered
        return self._passed.get(now.numpy().tobytes(), (position, [now, *states[1:]]))

    def _go(self, position: int, states: list[Tensor]) -> None:
        self._generator.set_rng_state(states[0])
        self._last = self._passed[states[0].numpy().tobytes()] = position, states


@dataclass
class Widths:
    """By how much each run's rows are narrower alone than in a batch padded for all, and what that changes.

    Attributes:
        narrower: columns, for each stream.
        slopes: for each draw since the start, how each size of what is drawn changes with a column.
    """

    narrower: Sequence[int]
    slopes: Sequence[Sequence[Shape]] = ()

    def alone(self, stream: int, position: int, which: int, shape: Shape) -> Shape:
        """The shape that a tensor of this run has when the run is alone."""
        cut = self.narrower[stream]
        if not cut or position >= len(self.slopes):
            return shape
        slopes = self.slopes[position][which]
        if slopes[0]:  # rows and columns in one dimension
            return shape
        return tuple(size - slope * cut for size, slope in zip(shape, slopes, strict=True))


def slopes(wide: Sequence[Sequence[Shape]], narrow: Sequence[Sequence[Shape]]) -> list[list[Shape]]:
    """Of the shapes of two passes, whose batches differ by one column; none if a pass draws now more, now less often."""
    if len(wide) != len(narrow):
        return []
    return [
        [tuple(a - b for a, b in zip(*shapes, strict=True)) for shapes in zip(*draw, strict=True)]
        for draw in zip(wide, narrow, strict=True)
    ]


@contextmanager
def runwise_dropout(streams: Streams, rows: int, widths: Widths) -> Iterator[list[Sequence[Shape]]]:
    """Within it (forward and backward, for checkpointed layers) dropout on the rows of all runs draws by run.

    Covered are the functions below, by whatever layer they are called; others draw for the batch as a whole. They are
    exchanged where torch keeps them: a TorchFunctionMode costs as much as a small layer's arithmetic, and ends at `backward`.

    Args:
        streams: of all runs.
        rows: rows of one run.
        widths: of the batch.

    Returns:
        The shapes of one run's part of what is drawn, draw by draw.
    """
    drawing = _Drawing(streams, rows, widths)
    places: list[tuple[Any, str, Callable[..., Tensor]]] = [
        *((F, name, partial(drawing.dropout, getattr(F, name))) for name in ("dropout", "dropout1d", "dropout2d", "dropout3d")),
        (F, "scaled_dot_product_attention", partial(drawing.attention, F.scaled_dot_product_attention)),
        (torch, "rand", partial(drawing.rand, torch.rand)),  # stochastic depth
    ]
    own = [getattr(module, name) for module, name, _ in places]
    try:
        for module, name, function in places:
            setattr(module, name, function)
        yield drawing.shapes
    finally:
        for (module, name, _), function in zip(places, own, strict=True):
            setattr(module, name, function)


class _Drawing:
    """Random functions of torch for the rows of all runs. `function` is torch's own, the other arguments are its."""

    def __init__(self, streams: Streams, rows: int, widths: Widths) -> None:
        self.streams, self.rows, self.widths = streams, rows, widths
        self.runs = len(streams.of_run)
        self.shapes: list[Sequence[Shape]] = []
        self._dropout = F.dropout

    def dropout(self, function: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """x times noise, which depends on the shape of x alone: runs of one stream share it."""
        if not training or p == 0.0:
            return input
        if not self._is_stacked(input):
            return self._leading(lambda: function(input, p))
        by_run = input.view(self.runs, -1, *input.shape[1:])
        shape = by_run.shape[1:]
        self.shapes.append([shape])

        def noise(run: int, position: int) -> Tensor:
            alone = self.widths.alone(self.streams.of_run[run], position, 0, shape)
            ones = input.new_ones(alone) if input.is_contiguous() else torch.ones_like(corner(by_run[run], alone))
            return padded(function(ones, p), shape)

        return (by_run * self._of_runs(self.streams.draw(self.streams.leaders, noise))).view(input.shape)

    def attention(
        self, function: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """Draws within a fused kernel, so each run is a call of its own; on the CPU there is none, and one call serves all."""
        if not dropout_p:
            together: Tensor = function(query, key, value, attn_mask, dropout_p, *args, **kwargs)
            return together
        if not self._is_stacked(query):
            return self._leading(lambda: function(query, key, value, attn_mask, dropout_p, *args, **kwargs))
        if not args and is_plain_attention(query, attn_mask, **kwargs):
            return self._plain_attention(query, key, value, attn_mask, dropout_p, kwargs.get("scale"))
        q, k, v = (t.chunk(self.runs) for t in (query, key, value))
        by_run = attn_mask is not None and attn_mask.dim() == query.dim() and len(attn_mask) == len(query)
        masks = attn_mask.chunk(self.runs) if attn_mask is not None and by_run else [attn_mask] * self.runs
        self.shapes.append([q[0].shape, k[0].shape])

        def attended(run: int, position: int) -> Tensor:
            stream, mask = self.streams.of_run[run], masks[run]
            to, of = (self.widths.alone(stream, position, which, t.shape)[-2] for which, t in enumerate((q[run], k[run])))
            if mask is not None:
                mask = mask[..., : to if mask.shape[-2] > 1 else 1, : of if mask.shape[-1] > 1 else 1]
            found = function(q[run][..., :to, :], k[run][..., :of, :], v[run][..., :of, :], mask, dropout_p, *args, **kwargs)
            return padded(found, (*found.shape[:-2], q[run].shape[-2], found.shape[-1]))

        return torch.cat(self.streams.draw(range(self.runs), attended))

    def _plain_attention(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, scale: float | None
    ) -> Tensor:
        """What torch computes on the CPU: dropout of the attention weights as of any tensor."""
        shape = (len(query) // self.runs, query.shape[1], query.shape[2], key.shape[2])
        self.shapes.append([shape])

        def noise(run: int, position: int) -> Tensor:
            alone = self.widths.alone(self.streams.of_run[run], position, 0, shape)
            return padded(self._dropout(query.new_ones(alone), p), shape)

        factors = self._of_runs(self.streams.draw(self.streams.leaders, noise))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out: Tensor = NoisyAttention.apply(query, key, value, mask, factors, scale)  # type: ignore[no-untyped-call]
        return out

    def rand(self, function: Any, *size: Any, **kwargs: Any) -> Tensor:
        """One number a row for stochastic depth, or whatever else is asked for."""
        shape = tuple(size[0]) if len(size) == 1 and isinstance(size[0], Sequence) else size
        if shape[:1] != (self.runs * self.rows,):
            return self._leading(lambda: function(*size, **kwargs))
        self.shapes.append([])
        return self._of_runs(
            self.streams.draw(self.streams.leaders, lambda *_: function((self.rows, *shape[1:]), **kwargs)), expand=True
        ).flatten(0, 1)

    def _leading(self, draw: Callable[[], Tensor]) -> Tensor:
        """What has no rows is drawn as the first run draws it."""
        self.shapes.append([])
        return self.streams.draw(self.streams.leaders, lambda *_: draw())[0]

    def _of_runs(self, of_streams: Sequence[Tensor], expand: bool = False) -> Tensor:
        """(runs, …) from a tensor for each stream, or (…) if there is but one."""
        if len(of_streams) == 1 and not expand:
            return of_streams[0]
        return torch.stack([of_streams[stream] for stream in self.streams.of_run])

    def _is_stacked(self, x: Tensor) -> bool:
        """Whether dimension 0 counts the rows of all runs."""
        return x.dim() > 0 and x.shape[0] % (self.runs * self.rows) == 0


class NoisyAttention(torch.autograd.Function):
    """softmax(s·QKᵀ + mask) ⊙ noise times V, in as few passes over the weights as there can be."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, noise: Tensor, scale: float
    ) -> Tensor:
        """(rows, heads, to, d), (rows, heads, of, d), (rows, heads, of, e) → (rows, heads, to, e).

        The noise has the shape of the weights, (rows, heads, to, of), or is that of one run for all.
        """
        q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (query, key, value))
        scores = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=scale).view(*query.shape[:3], -1)
        if mask is None:
            p = torch.softmax(scores, -1)
        else:
            scores = scores.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else scores.add_(mask)
            p = torch._safe_softmax(scores, -1)
        ctx.save_for_backward(q, k, v, p, noise)
        ctx.scale = scale
        return torch.bmm(times(p, noise).view(-1, *p.shape[2:]), v).view(*query.shape[:3], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of Q, K and V."""
        q, k, v, p, noise = ctx.saved_tensors
        g = grads[0].reshape(-1, *grads[0].shape[2:])
        of_v = torch.bmm(times(p, noise).view(-1, *p.shape[2:]).mT, g)
        of_p = times(torch.bmm(g, v.mT).view_as(p), noise)
        of_scores = torch._softmax_backward_data(of_p, p, -1, p.dtype).view(-1, *p.shape[2:]).mul_(ctx.scale)
        shape = grads[0].shape[:2]
        return (
            torch.bmm(of_scores, k).unflatten(0, shape), torch.bmm(of_scores.mT, q).unflatten(0, shape),
            of_v.unflatten(0, shape), None, None, None,
        )  # fmt: skip


def is_plain_attention(query: Tensor, mask: Tensor | None, scale: float | None = None, **options: Any) -> bool:
    """Whether attention with dropout is what torch's documentation says, step by step, with nothing beside."""
    plain = query.is_cpu and query.dim() == 4 and query.dtype in (torch.float32, torch.float64)
    learnt = mask is not None and mask.requires_grad
    return plain and not learnt and not any(options.values()) and not torch.is_autocast_enabled("cpu")


def times(x: Tensor, noise: Tensor) -> Tensor:
    """x times the noise of some of its rows, which all others share."""
    return (x.view(-1, *noise.shape[-4:]) * noise).view_as(x)


def corner(x: Tensor, shape: Shape) -> Tensor:
    """The first elements of x along every dimension."""
    for dim, size in enumerate(shape):
        x = x.narrow(dim, 0, size)
    return x


def padded(x: Tensor, shape: Shape) -> Tensor:
    """x and as many ones behind it, along every dimension, as make up the shape; padding is seen by nobody."""
    missing = [wanted - size for wanted, size in zip(shape, x.shape, strict=True)]
    return F.pad(x, [end for size in reversed(missing) for end in (0, size)], value=1.0) if any(missing) else x
