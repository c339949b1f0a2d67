"""A frozen model with the trained weights of several runs: the i-th block of rows of a batch goes through run i's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from emomerge.errors import EmomergeError


class Unstackable(EmomergeError):
    """The runs cannot share their forward and backward passes."""


class StackedModel:
    """An adapted model whose trained layers hold the weights of all runs.

    `model` takes the rows of all runs, concatenated on dimension 0. Frozen layers see one large batch; a trained layer
    multiplies each run's rows by that run's weights in one batched product.

    Args:
        model: an adapted model, changed in place.
        starts: each run's initial trained weights, by their names in the model.

    Raises:
        Unstackable: a layer mixes rows, or trained weights do not form a layer of their own.
    """

    def __init__(self, model: nn.Module, starts: Sequence[Mapping[str, Tensor]]) -> None:
        check_layers(model)
        self.model, self.runs, self.window = model, len(starts), Window(0, len(starts))
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.stacks = {name: nn.Parameter(torch.stack([start[name].to(p) for start in starts])) for name, p in trained.items()}
        """The trained weights (runs, *shape) by their names in the adapted model."""
        self._parameters = [
            {name: nn.Parameter(stack.data[run]) for name, stack in self.stacks.items()} for run in range(self.runs)
        ]
        self._gradients = {name: Gradient(stack) for name, stack in self.stacks.items()}
        self._replaced: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
        for path, names in trained_layers(model).items():
            self._replace(path, {own: name for name, own in names.items()})

    def parameters_of(self, run: int) -> dict[str, nn.Parameter]:
        """Return the weights of one run by name: views of the stacks, for its optimizer."""
        return self._parameters[run]

    @contextmanager
    def only(self, runs: range) -> Iterator[None]:
        """Within the block, forward passes take the rows of some consecutive runs only."""
        whole = self.window.first, self.window.end
        self.window.first, self.window.end = runs.start, runs.stop
        try:
            yield
        finally:
            self.window.first, self.window.end = whole

    @property
    def layers(self) -> int:
        """Number of trained layers."""
        return len(self._replaced)

    def share_gradients(self) -> None:
        """Set the gradients of every run's parameters to views of the stacks' gradients, or None if not computed."""
        for name, gradient in self._gradients.items():
            if gradient.computed != (self._parameters[0][name].grad is not None):
                parts = gradient.total.unbind() if gradient.computed else [None] * self.runs
                for parameters, part in zip(self._parameters, parts, strict=True):
                    parameters[name].grad = part

    def drop_gradients(self) -> None:
        """Zero the gradients for the next step, keeping their memory and the views of it."""
        torch._foreach_zero_([gradient.total for gradient in self._gradients.values()])
        for gradient in self._gradients.values():
            gradient.computed = False

    @contextmanager
    def as_run(self, run: int) -> Iterator[None]:
        """Within the block, the model has its original layers with the weights of one run."""
        for parent, name, layer, _ in self._replaced:
            parent._modules[name] = layer
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, p in self.parameters_of(run).items():
                own[name].copy_(p)
        try:
            yield
        finally:
            for parent, name, _, stacked in self._replaced:
                parent._modules[name] = stacked

    @contextmanager
    def shaken(self) -> Iterator[None]:
        """Within the block, random numbers are added to all trained weights."""
        kept = [stack.detach().clone() for stack in self.stacks.values()]
        generator = torch.Generator().manual_seed(0)
        for stack in self.stacks.values():
            stack.data += 0.05 * torch.randn(stack.shape, generator=generator).to(stack)
        try:
            yield
        finally:
            for stack, before in zip(self.stacks.values(), kept, strict=True):
                stack.data.copy_(before)

    def _replace(self, path: str, names: Mapping[str, str]) -> None:
        layer, stacks = self.model.get_submodule(path), {own: self.stacks[name] for own, name in names.items()}
        stacked: nn.Module
        if set(stacks) == {A, B} and is_plain(layer):
            gradients = self._gradients[names[A]], self._gradients[names[B]]
            stacked = StackedLora(layer, stacks[A], stacks[B], gradients, self.window)
        elif type(layer) is nn.Linear:
            stacked = StackedLinear(**stacks, window=self.window)
        elif any(isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0 for part in layer.modules()):
            raise Unstackable(f"{path} ({type(layer).__name__}) has dropout within a layer that is trained run by run")
        else:
            stacked = StackedLayer(layer, stacks, self.window)
        path, _, name = path.rpartition(".")
        parent = self.model.get_submodule(path)
        self._replaced.append((parent, name, layer, stacked))
        parent._modules[name] = stacked


class Window:
    """The runs whose rows a forward pass takes: `first` up to, not including, `end`."""

    def __init__(self, first: int, end: int) -> None:
        self.first, self.end = first, end

    def of(self, stack: Tensor) -> Tensor:
        """Return the part (end − first, *shape) of a stack (runs, *shape)."""
        return stack if self.end - self.first == len(stack) else stack[self.first : self.end]


A, B = "lora_A.default.weight", "lora_B.default.weight"


def is_plain(layer: nn.Module) -> bool:
    """Return whether a layer is x Wᵀ + b plus LoRA factors, with W frozen and not quantized."""
    from peft.tuners import lora
    from transformers.pytorch_utils import Conv1D

    if not isinstance(layer, lora.Linear):
        return False
    return type(layer.base_layer) is Conv1D or type(layer.base_layer).forward is nn.Linear.forward


class Gradient:
    """The gradient of a stack, accumulated in place: products are added to it without a temporary tensor.

    Args:
        stack: the stacked parameter, whose `.grad` becomes `total`.
    """

    def __init__(self, stack: nn.Parameter) -> None:
        self.total = stack.grad = torch.zeros_like(stack)
        self.computed = False
        """Whether a backward pass has added to it."""
        stack.register_post_accumulate_grad_hook(self._note)

    def add_product(self, first: int, x: Tensor, y: Tensor, scale: float) -> None:
        """Add s·x_i y_i for each of some runs from the `first` on: (runs, m, k), (runs, k, n)."""
        self.computed = True
        total = self.total if len(x) == len(self.total) else self.total[first : first + len(x)]
        if x.dtype == total.dtype:
            total.baddbmm_(x, y, alpha=scale)
        else:
            total.add_(torch.bmm(x, y), alpha=scale)

    def _note(self, stack: Tensor) -> None:
        self.computed = True


class StackedLora(nn.Module):
    """A linear layer with LoRA: one frozen product for all rows, and each run's own two factors.

    Args:
        layer: the adapted layer.
        a: (runs, r, in).
        b: (runs, out, r).
        gradients: those of `a` and `b`.
        window: the runs that take part.
    """

    def __init__(
        self, layer: Any, a: nn.Parameter, b: nn.Parameter, gradients: tuple[Gradient, Gradient], window: Window
    ) -> None:
        super().__init__()
        self.base_layer, self.dropout = layer.base_layer, layer.lora_dropout["default"]
        self.a, self.b = a, b
        weight, bias = layer.base_layer.weight, layer.base_layer.bias
        self._tensors = weight, bias, a.detach(), b  # reading a tuple is faster than reading a module's parameters
        self._transposed = not isinstance(layer.base_layer, nn.Linear)  # Conv1D of GPT-2: (in, out)
        self._drops = not isinstance(self.dropout, nn.Identity)
        self._gradients, self._scale, self._window = gradients, layer.scaling["default"], window

    @property
    def weight(self) -> Tensor:
        """The frozen weight, which some models read."""
        weight: Tensor = self.base_layer.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """(runs·rows, …, in) → (runs·rows, …, out)."""
        weight, bias, a, b = self._tensors
        check_rows(x, self._window.end - self._window.first)
        if self._transposed:
            weight = weight.t()
        tensors: tuple[Tensor | None, ...] = (x, self.dropout(x) if self._drops else None, b, weight, bias, a)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            tensors = tuple(None if t is None else t.to(dtype) for t in tensors)
        others = (*tensors[3:], self._scale, self._window)
        y: Tensor
        if self._merges(x):
            y = MergedProduct.apply(tensors[0], b, others, self._gradients)  # type: ignore[no-untyped-call]
        else:
            y = LoraProduct.apply(*tensors[:3], others, self._gradients)  # type: ignore[no-untyped-call]
        return y

    def _merges(self, x: Tensor) -> bool:
        if self._drops or x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type):
            return False  # W and its change would be rounded together
        out, rank = self.b.shape[1:]
        rows = x.numel() // x.shape[-1] // (self._window.end - self._window.first)
        return pays_to_merge(rows, x.shape[-1], out, rank)


class LoraProduct(torch.autograd.Function):
    """y_i = x_i Wᵀ + b + s·x̃_i A_iᵀ B_iᵀ for each run i, where x̃ is x after LoRA's dropout, or None for x itself.

    The gradients of A and B are accumulated directly rather than through autograd. B is a differentiable input only so that
    the output requires a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, b: Tensor,
        others: tuple[Tensor, Tensor | None, Tensor, float, Window], gradients: tuple[Gradient, Gradient],
    ) -> Tensor:  # fmt: skip
        """(runs·rows, …, in) → (runs·rows, …, out). `others` are W, the bias, A, s and the runs that take part."""
        weight, bias, a, scale, window = others
        a, b = window.of(a), window.of(b)
        runs, _, width = a.shape
        flat = x.reshape(-1, width)
        rows = (flat if dropped is None else dropped.reshape(-1, width)).view(runs, -1, width)
        y = F.linear(flat, weight, bias)
        down = torch.bmm(rows, a.mT)
        y.view(runs, -1, y.shape[1]).baddbmm_(down, b.mT, alpha=scale)
        ctx.save_for_backward(rows, down, weight, a, b)
        ctx.gradients, ctx.scale, ctx.apart, ctx.shape, ctx.first = gradients, scale, dropped is not None, x.shape, window.first
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and x̃, and accumulate those of A and B."""
        rows, down, weight, a, b = ctx.saved_tensors
        gradient_a, gradient_b = ctx.gradients
        width = weight.shape[0]
        by_run = grads[0].reshape(a.shape[0], -1, width)
        of_down = torch.bmm(by_run, b)
        gradient_b.add_product(ctx.first, by_run.mT, down, ctx.scale)
        gradient_a.add_product(ctx.first, of_down.mT, rows, ctx.scale)
        of_x = of_dropped = None
        if ctx.needs_input_grad[0]:
            of_x = by_run.view(-1, width) @ weight
            if not ctx.apart:
                of_x.view_as(rows).baddbmm_(of_down, a, alpha=ctx.scale)
            of_x = of_x.view(ctx.shape)
        if ctx.apart and ctx.needs_input_grad[1]:
            of_dropped = torch.bmm(of_down.mul_(ctx.scale), a).view(ctx.shape)
        return of_x, of_dropped, None, None, None


class MergedProduct(torch.autograd.Function):
    """y_i = x_i (W + s·B_i A_i)ᵀ + b for each run i: what `LoraProduct` computes, with the factors multiplied first.

    Where matrices are small and rows many, a few large products take less time than many thin ones.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, b: Tensor, others: tuple[Tensor, Tensor | None, Tensor, float, Window],
        gradients: tuple[Gradient, Gradient],
    ) -> Tensor:  # fmt: skip
        """(runs·rows, …, in) → (runs·rows, …, out). `others` are W, the bias, A, s and the runs that take part."""
        weight, bias, a, scale, window = others
        a, b = window.of(a), window.of(b)
        runs, _, width = a.shape
        rows = x.reshape(runs, -1, width)
        merged = torch.baddbmm(weight.expand(runs, -1, -1), b, a, alpha=scale)
        y = torch.bmm(rows, merged.mT) if bias is None else torch.baddbmm(bias, rows, merged.mT)
        ctx.save_for_backward(rows, merged, a, b)
        ctx.gradients, ctx.scale, ctx.shape, ctx.first = gradients, scale, x.shape, window.first
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x, and accumulate those of A and B."""
        rows, merged, a, b = ctx.saved_tensors
        gradient_a, gradient_b = ctx.gradients
        by_run = grads[0].reshape(len(a), -1, merged.shape[1])
        of_merged = torch.bmm(by_run.mT, rows)
        gradient_b.add_product(ctx.first, of_merged, a.mT, ctx.scale)
        gradient_a.add_product(ctx.first, b.mT, of_merged, ctx.scale)
        of_x = torch.bmm(by_run, merged).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return of_x, None, None, None


def pays_to_merge(rows: int, wide: int, out: int, rank: int) -> bool:
    """Return whether W + s·B A is worth its product, for the rows of a run and a layer from `wide` to `out` features.

    The gradient of W, from which those of A and B follow, costs wide·out multiplications a row; what it saves, thin products of
    rank·(wide + out) a row, run at a fraction of the speed. The bound is from measurements on the CPU at widths of 48 to 512.
    """
    return rows >= max(wide, out) and wide * out <= 6 * rank * (wide + out)


class StackedLinear(nn.Module):
    """x_i W_iᵀ + b_i for each run i.

    Args:
        weight: (runs, out, in).
        bias: (runs, out).
        window: the runs that take part.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None, *, window: Window) -> None:
        super().__init__()
        self.weight, self.bias, self._window = weight, bias, window

    def forward(self, x: Tensor) -> Tensor:
        """(runs·rows, …, in) → (runs·rows, …, out)."""
        weight = self._window.of(self.weight)
        runs, out, width = weight.shape
        check_rows(x, runs)
        rows, w = x.reshape(runs, -1, width), weight.transpose(1, 2)
        y = torch.bmm(rows, w) if self.bias is None else torch.baddbmm(self._window.of(self.bias)[:, None], rows, w)
        return y.view(*x.shape[:-1], out)


class StackedLayer(nn.Module):
    """Any other layer, applied once for each run.

    Args:
        layer: takes one tensor whose dimension 0 counts rows.
        stacks: the layer's trained parameters (runs, *shape) by their names in the layer.
        window: the runs that take part.
    """

    def __init__(self, layer: nn.Module, stacks: Mapping[str, nn.Parameter], window: Window) -> None:
        super().__init__()
        self.layer, self._window = layer, window
        self.names, self.stacks = tuple(stacks), nn.ParameterList(stacks.values())

    def forward(self, x: Tensor) -> Tensor:
        """The layer, run by run."""
        weights = list(zip(*(self._window.of(stack).unbind() for stack in self.stacks), strict=True))
        check_rows(x, len(weights))
        parts = zip(x.chunk(len(weights)), weights, strict=True)
        return torch.cat([functional_call(self.layer, dict(zip(self.names, own, strict=True)), rows) for rows, own in parts])


def check_rows(x: Tensor, runs: int) -> None:
    """Raise Unstackable unless the rows divide evenly among the runs."""
    if x.shape[0] % runs:
        raise Unstackable(f"a trained layer sees {x.shape[0]} rows, which do not divide among {runs} runs")


def trained_layers(model: nn.Module) -> dict[str, dict[str, str]]:
    """Return, for each layer with trained parameters, its path → {parameter name in the model: name in the layer}.

    Raises:
        Unstackable: a module has trained parameters of its own beside sub-layers.
    """
    found: dict[str, dict[str, str]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            path, own = _owner(model, name)
            found.setdefault(path, {})[name] = own
    trained = {name for names in found.values() for name in names}
    for path, names in found.items():
        if not path or any(name.startswith(f"{path}.") for name in trained - set(names)):
            raise Unstackable(f"{path or 'the model'} has trained weights of its own beside sub-layers")
    return found


def _owner(model: nn.Module, name: str) -> tuple[str, str]:
    """Return the layer that a parameter belongs to and its name there. LoRA factors belong to the adapted layer."""
    path = name.removesuffix(f".{A}").removesuffix(f".{B}")
    if path == name:
        path = name.rpartition(".")[0]
        while isinstance(model.get_submodule(path), nn.ParameterDict):
            path = path.rpartition(".")[0]
    return path, name.removeprefix(f"{path}.")


def check_layers(model: nn.Module) -> None:
    """Check that no layer mixes rows and that every adapter is a plain pair of factors.

    Raises:
        Unstackable: names the layer.
    """
    from peft.tuners import lora

    for path, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) or getattr(layer, "track_running_stats", False):
            raise Unstackable(f"{path} ({type(layer).__name__}) mixes the rows of a batch")
        if isinstance(layer, lora.LoraLayer):
            if layer.lora_variant:
                raise Unstackable(f"{path} is not plain LoRA")
            if not isinstance(layer, lora.Linear | lora.Embedding):
                raise Unstackable(f"{path} is an adapted {type(layer.get_base_layer()).__name__}")
