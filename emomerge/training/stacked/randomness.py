"""Dropout for several runs in one forward pass: each run draws the numbers it would draw on its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]
Noise = dict[tuple[int, int], Tensor]
"""(stream, number of the draw) → what was drawn for the whole batch of a stream."""


class Streams:
    """The random number streams of all runs, which take turns in using the device's default generator.

    Args:
        keys: one for each run; runs with equal keys share a stream.
        device: the device whose default generator is used.
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
        """Seed every stream by calling `begin` with its leader, which may already draw numbers."""
        states = []
        for run in self.leaders:
            begin(run)
            states.append(self._generator.get_rng_state())
        self._passed.clear()
        self._go(0, states)

    def draw(self, runs: Sequence[int], sample: Callable[[int, int], Tensor]) -> list[Tensor]:
        """Return `sample(run, position)` of the given runs, each drawn from its own stream, and advance all streams.

        Args:
            runs: at least one run of each stream.
            sample: draws from the default generator; `position` counts the draws since the start.
        """
        if len(runs) == len(self.leaders) == 1:
            return [sample(runs[0], 0)]
        position, before = self._now()
        after, found = list(before), []
        for run in runs:
            self._generator.set_rng_state(before[self.of_run[run]])
            found.append(sample(run, position))
            after[self.of_run[run]] = self._generator.get_rng_state()
        self._go(position + 1, after)
        return found

    def _now(self) -> tuple[int, list[Tensor]]:
        """Return position and states, also after gradient checkpointing has reset the generator to an earlier state."""
        now = self._generator.get_rng_state()
        if len(self.leaders) == 1:
            return 0, [now]
        position, states = self._last  # of the other streams, if a function that is not covered has drawn numbers
        return self._passed.get(now.numpy().tobytes(), (position, [now, *states[1:]]))

    def _go(self, position: int, states: list[Tensor]) -> None:
        self._generator.set_rng_state(states[0])
        self._last = self._passed[states[0].numpy().tobytes()] = position, states


@dataclass
class Widths:
    """How much narrower each stream's batch would be on its own than padded for all, and the effect on its draws.

    Attributes:
        narrower: columns, for each stream.
        slopes: for each draw since the start, the change of each dimension of the drawn shape per column.
        picks: if the batch is a part of a whole one, the numbers of its rows there, for each stream.
        whole: number of rows of the whole batch.
        noise: what has been drawn for the whole batch; further parts use it again.
        strided: whether some numbers were drawn in the order of another layout than that of their shape.
    """

    narrower: Sequence[int]
    slopes: Sequence[Sequence[Shape]] = ()
    picks: Sequence[Tensor] | None = None
    whole: int = 0
    noise: Noise = field(default_factory=dict)
    strided: bool = False

    def of_part(self, stream: int, position: int, shape: Shape, draw: Callable[[Shape], Tensor]) -> Tensor:
        """Return the numbers of this part of a batch, drawn for the whole batch if they have not been.

        Args:
            stream: whose batch it is.
            position: number of the draw since the start of the pass.
            shape: of the part, with its rows on dimension 0.
            draw: returns numbers of a shape.
        """
        assert self.picks is not None
        (slopes,), cut = self.slopes[position], self.narrower[stream]
        if (stream, position) not in self.noise:
            sizes = (size - slope * cut for size, slope in zip(shape[1:], slopes[1:], strict=True))
            self.noise[stream, position] = draw((self.whole, *sizes))
        found = self.noise[stream, position]
        kept = tuple(min(size, drawn) for size, drawn in zip(shape[1:], found.shape[1:], strict=True))
        part = corner(found, (self.whole, *kept))[self.picks[stream]]
        return padded(part, shape)

    def alone(self, stream: int, position: int, which: int, shape: Shape) -> Shape:
        """Return the shape that a draw would have if the run were trained on its own."""
        cut = self.narrower[stream]
        if not cut or position >= len(self.slopes):
            return shape
        slopes = self.slopes[position][which]
        if slopes[0]:  # one dimension mixes rows and columns
            return shape
        return tuple(size - slope * cut for size, slope in zip(shape, slopes, strict=True))


def slopes(wide: Sequence[Sequence[Shape]], narrow: Sequence[Sequence[Shape]]) -> list[list[Shape]]:
    """Return slopes from the shapes of two passes whose batches differ by one column; empty if the draws do not match."""
    if len(wide) != len(narrow):
        return []
    return [
        [tuple(a - b for a, b in zip(*shapes, strict=True)) for shapes in zip(*draw, strict=True)]
        for draw in zip(wide, narrow, strict=True)
    ]


@contextmanager
def runwise_dropout(streams: Streams, rows: int, widths: Widths) -> Iterator[list[Sequence[Shape]]]:
    """Within the block, dropout draws its numbers run by run. Checkpointed layers need it in the backward pass as well.

    The functions below are covered, whichever layer calls them; others draw for the batch as a whole. They are replaced in
    torch's modules: a TorchFunctionMode costs as much as a small layer's arithmetic and does not reach into `backward`.

    Args:
        streams: those of all runs.
        rows: rows of one run.
        widths: the widths of the batch.

    Yields:
        The shapes of one run's part of each draw, in order.
    """
    drawing = _Drawing(streams, rows, widths)
    patches: list[tuple[Any, str, Callable[..., Tensor]]] = [
        *((F, name, partial(drawing.dropout, getattr(F, name))) for name in ("dropout", "dropout1d", "dropout2d", "dropout3d")),
        (F, "scaled_dot_product_attention", partial(drawing.attention, F.scaled_dot_product_attention)),
        (torch, "rand", partial(drawing.rand, torch.rand)),  # stochastic depth
    ]
    original = [getattr(module, name) for module, name, _ in patches]
    try:
        for module, name, function in patches:
            setattr(module, name, function)
        yield drawing.shapes
    finally:
        for (module, name, _), function in zip(patches, original, strict=True):
            setattr(module, name, function)


class _Drawing:
    """Replacements for torch's random functions. `function` is the original, and the other arguments are those passed to it."""

    def __init__(self, streams: Streams, rows: int, widths: Widths) -> None:
        self.streams, self.rows, self.widths = streams, rows, widths
        self.runs = len(streams.of_run)
        self.shapes: list[Sequence[Shape]] = []
        self._dropout = F.dropout

    def dropout(self, function: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Multiply x by noise, which depends on the shape of x alone, so that runs of one stream share it."""
        if not training or p == 0.0:
            return input
        if not self._is_stacked(input):
            return self._leading(lambda: function(input, p))
        by_run = input.view(self.runs, -1, *input.shape[1:])
        shape = by_run.shape[1:]
        self.shapes.append([shape])
        self.widths.strided |= not input.is_contiguous() and not torch.empty_like(input, device="meta").is_contiguous()

        number = len(self.shapes) - 1

        def noise(run: int, position: int) -> Tensor:
            if self.widths.picks is not None:
                draw = partial(_dropped, function, input, p)
                return self.widths.of_part(self.streams.of_run[run], number, shape, draw)
            alone = self.widths.alone(self.streams.of_run[run], position, 0, shape)
            ones = input.new_ones(alone) if input.is_contiguous() else torch.ones_like(corner(by_run[run], alone))
            return padded(function(ones, p), shape)

        return (by_run * self._of_runs(self.streams.draw(self.streams.leaders, noise))).view(input.shape)

    def attention(
        self, function: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """Call fused kernels, which draw internally, once per run; on the CPU, compute all runs at once."""
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
        """Compute what torch computes on the CPU, with ordinary dropout of the attention weights."""
        shape = (len(query) // self.runs, query.shape[1], query.shape[2], key.shape[2])
        self.shapes.append([shape])

        number = len(self.shapes) - 1

        def noise(run: int, position: int) -> Tensor:
            if self.widths.picks is not None:
                draw = partial(_dropped, self._dropout, query, p)
                return self.widths.of_part(self.streams.of_run[run], number, shape, draw)
            alone = self.widths.alone(self.streams.of_run[run], position, 0, shape)
            return padded(self._dropout(query.new_ones(alone), p), shape)

        factors = self._of_runs(self.streams.draw(self.streams.leaders, noise))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out: Tensor = NoisyAttention.apply(query, key, value, factors, (mask, scale))  # type: ignore[no-untyped-call]
        return out

    def rand(self, function: Any, *size: Any, **kwargs: Any) -> Tensor:
        """Draw one number per row, as stochastic depth does; other shapes are drawn for the batch as a whole."""
        shape = tuple(size[0]) if len(size) == 1 and isinstance(size[0], Sequence) else size
        if shape[:1] != (self.runs * self.rows,):
            return self._leading(lambda: function(*size, **kwargs))
        self.shapes.append([])
        return self._of_runs(
            self.streams.draw(self.streams.leaders, lambda *_: function((self.rows, *shape[1:]), **kwargs)), expand=True
        ).flatten(0, 1)

    def _leading(self, draw: Callable[[], Tensor]) -> Tensor:
        """Draw a tensor without rows as the first run would draw it."""
        self.shapes.append([])
        return self.streams.draw(self.streams.leaders, lambda *_: draw())[0]

    def _of_runs(self, of_streams: Sequence[Tensor], expand: bool = False) -> Tensor:
        """Return (runs, …) from one tensor (…) per stream, or (…) if there is only one stream."""
        if len(of_streams) == 1 and not expand:
            return of_streams[0]
        return torch.stack([of_streams[stream] for stream in self.streams.of_run])

    def _is_stacked(self, x: Tensor) -> bool:
        """Return whether dimension 0 counts the rows of all runs."""
        return x.dim() > 0 and x.shape[0] % (self.runs * self.rows) == 0


class NoisyAttention(torch.autograd.Function):
    """(softmax(s·QKᵀ + mask) ⊙ noise) V, with as few passes over the attention weights as possible."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, noise: Tensor, options: tuple[Tensor | None, float]
    ) -> Tensor:
        """(rows, heads, to, d), (rows, heads, of, d), (rows, heads, of, e) → (rows, heads, to, e).

        The noise has the shape of the weights, (rows, heads, to, of), or is that of one run for all; `options` are mask and s.
        """
        mask, scale = options
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
        """Return the gradients of Q, K and V."""
        q, k, v, p, noise = ctx.saved_tensors
        g = grads[0].reshape(-1, *grads[0].shape[2:])
        of_v = torch.bmm(times(p, noise).view(-1, *p.shape[2:]).mT, g)
        of_p = times(torch.bmm(g, v.mT).view_as(p), noise)
        of_scores = torch._softmax_backward_data(of_p, p, -1, p.dtype).view(-1, *p.shape[2:]).mul_(ctx.scale)
        shape = grads[0].shape[:2]
        return (
            torch.bmm(of_scores, k).unflatten(0, shape), torch.bmm(of_scores.mT, q).unflatten(0, shape),
            of_v.unflatten(0, shape), None, None,
        )  # fmt: skip


def is_plain_attention(query: Tensor, mask: Tensor | None, scale: float | None = None, **options: Any) -> bool:
    """Return whether torch would compute attention with dropout step by step, as in its documentation."""
    plain = query.is_cpu and query.dim() == 4 and query.dtype in (torch.float32, torch.float64)
    learnt = mask is not None and mask.requires_grad
    return plain and not learnt and not any(options.values()) and not torch.is_autocast_enabled("cpu")


def times(x: Tensor, noise: Tensor) -> Tensor:
    """Multiply x by noise given for one block of its rows and shared by the others."""
    return (x.view(-1, *noise.shape[-4:]) * noise).view_as(x)


def _dropped(dropout: Any, like: Tensor, p: float, shape: Shape) -> Tensor:
    """Return dropout's factors of a shape."""
    factors: Tensor = dropout(like.new_ones(shape), p)
    return factors


def corner(x: Tensor, shape: Shape) -> Tensor:
    """Return the first elements of x along every dimension."""
    for dim, size in enumerate(shape):
        x = x.narrow(dim, 0, size)
    return x


def padded(x: Tensor, shape: Shape) -> Tensor:
    """Pad x with ones at the end of every dimension to the given shape; padded positions have no effect."""
    missing = [wanted - size for wanted, size in zip(shape, x.shape, strict=True)]
    return F.pad(x, [end for size in reversed(missing) for end in (0, size)], value=1.0) if any(missing) else x
