"""Turn the tensors of one adapter module into formulas, after checking that they belong together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from emomerge.adapters.formulas.dora import Decomposed
from emomerge.adapters.formulas.formula import Additive, Difference, Formula, Replacement
from emomerge.adapters.formulas.glora import GeneralizedLora
from emomerge.adapters.formulas.lora import LowRankProduct
from emomerge.adapters.formulas.products import Hadamard, Kronecker, Matrix
from emomerge.adapters.formulas.rotation import Butterfly, Rotated
from emomerge.adapters.formulas.scaling import Scaled
from emomerge.checkpoints import all_finite
from emomerge.errors import BadInput


@dataclass(frozen=True)
class ModuleChange:
    """What an adapter does to one module of the base."""

    kind: str
    """Such as "LoRA" or "LoKr + DoRA"."""
    rank: int | None
    """r; None if nothing has a rank."""
    alpha: float | None
    """α as stored; None if it is missing, so that the scale is 1."""
    parameters: dict[str, Formula]
    """By the parameter of the module: "weight", "bias" or "modulation"."""


def module_of(tensors: Mapping[str, Tensor], *, where: object, rs_lora: bool = False) -> ModuleChange:
    """Return the formulas of one module.

    Args:
        tensors: by canonical suffix, as `split_key` returns it.
        where: the file and module, for error messages.
        rs_lora: whether the file says that it was trained with rsLoRA. Trainers fold that into α, except for GLoRA.

    Raises:
        BadInput: a factor is missing, ranks disagree, a tensor is not finite, or the tensors are of several kinds or of none.
    """
    parts = _Parts(dict(tensors), where, rs_lora)
    kinds = [kind for kind in _KINDS if any(part in tensors or f"{part}.0" in tensors for part in kind.marks)]
    if len(kinds) > 1:
        raise BadInput("one module has two kinds of adapter", where=where, found=", ".join(sorted(tensors)))
    if not kinds and not parts.left & _PLAIN.keys():
        raise BadInput("these tensors are not an adapter of a known kind", where=where, found=", ".join(sorted(tensors)))
    parameters: dict[str, Formula] = {}
    names = []
    for kind in kinds:
        names.append(kind.name)
        parameters["weight"] = _decomposed(kind.read(parts), parts, names)
        if "lora_up.bias" in parts.left:
            parameters["bias"] = Difference(parts.vector("lora_up.bias").float() * parts.scale)
    for suffix, (parameter, name, formula) in _PLAIN.items():
        if suffix in parts.left:
            if parameter in parameters:
                raise BadInput("two tensors change one parameter", where=f"{where}, {suffix}", found=parameter)
            parameters[parameter] = formula(parts.take(suffix))
            names += [name] if name not in names else []
    if parts.left:
        raise BadInput(f"these tensors do not belong to {names[0]}", where=where, found=", ".join(sorted(parts.left)))
    return ModuleChange(" + ".join(names), parts.rank, parts.alpha, parameters)


@dataclass
class _Parts:
    """The tensors of a module, taken one after the other, with the rank and scale found on the way."""

    tensors: dict[str, Tensor]
    where: object
    rs_lora: bool
    rank: int | None = None
    alpha: float | None = None
    scale: float = 1.0
    left: set[str] = field(init=False)

    def __post_init__(self) -> None:
        for suffix, reason in _REFUSED.items():
            if suffix in self.tensors and not (suffix == "scalar" and _is_one(self.tensors[suffix])):
                raise BadInput(reason, where=f"{self.where}, {suffix}")
        self.left = {suffix for suffix in self.tensors if suffix not in _REFUSED}
        for suffix in sorted(self.left - {"alpha", "on_input"}):
            tensor = self.tensors[suffix]
            if not tensor.is_floating_point():
                raise BadInput("an adapter tensor of a dtype that cannot be added", where=self.at(suffix), found=tensor.dtype)
            if not tensor.numel():
                raise BadInput("an empty tensor in an adapter", where=self.at(suffix), found=tuple(tensor.shape))
            if not all_finite(tensor):
                raise BadInput("NaN or infinity in an adapter", where=self.at(suffix), fix="train it again")

    def at(self, suffix: str) -> str:
        """Name a tensor for an error message."""
        return f"{self.where}, {suffix}"

    def take(self, suffix: str, dimensions: int | None = None) -> Tensor:
        """Take a tensor. Raises BadInput if it is missing or has another number of dimensions."""
        if suffix not in self.left:
            raise BadInput("a tensor of the adapter is missing", where=self.where, expected=suffix, found=sorted(self.tensors))
        self.left.remove(suffix)
        tensor = self.tensors[suffix]
        if dimensions is not None and tensor.ndim != dimensions:
            raise self.misshapen(suffix, f"{dimensions} dimensions")
        return tensor

    def optional(self, suffix: str) -> Tensor | None:
        """Take a tensor, or return None if it is missing."""
        return self.take(suffix) if suffix in self.left else None

    def factor(self, suffix: str, *, right: bool = False) -> Tensor:
        """Take one of two factors; the left one becomes a matrix (n, r), of a convolution too."""
        tensor = self.take(suffix)
        if tensor.ndim < 2:
            raise self.misshapen(suffix, "2 dimensions or more")
        if right:
            return tensor
        if math.prod(tensor.shape[2:]) != 1:
            raise self.misshapen(suffix, "a kernel of 1×1")
        return tensor.flatten(1)

    def vector(self, suffix: str) -> Tensor:
        """Take a tensor that has one dimension, or others of length one."""
        tensor = self.take(suffix)
        if max(tensor.shape, default=1) != tensor.numel():
            raise self.misshapen(suffix, "a vector")
        return tensor.flatten()

    def number(self, suffix: str) -> float | None:
        """Take a tensor of one element, or return None if it is missing. Infinity is allowed here."""
        tensor = self.optional(suffix)
        if tensor is None:
            return None
        if tensor.numel() != 1 or tensor.ndim > 1:
            raise self.misshapen(suffix, "one number")
        return float(tensor)

    def misshapen(self, suffix: str, expected: str) -> BadInput:
        """Return the error about a tensor of a wrong shape."""
        found = tuple(self.tensors[suffix].shape)
        return BadInput("an adapter tensor has the wrong shape", where=self.at(suffix), expected=expected, found=found)

    def ranks(self, **ranks: int) -> int:
        """Return the one rank that all factors must have."""
        if len(set(ranks.values())) != 1:
            raise BadInput(
                "the factors of the adapter disagree about its rank",
                where=self.where,
                found=", ".join(f"{name.replace('_of_', ' of ')} {rank}" for name, rank in ranks.items()),
            )
        return next(iter(ranks.values()))

    def scale_by(self, rank: int | None) -> float:
        """Read α and return α/r; 1 without α, or without a rank: α means nothing then, and may be infinite."""
        self.rank, alpha = rank, self.number("alpha")
        if rank is None or alpha is None:
            return 1.0
        if not math.isfinite(alpha) or alpha == 0:
            fix = "set alpha to the rank for a scale of 1" if alpha == 0 else "train it again, or save it in float32"
            raise BadInput("alpha is not a usable number", where=self.at("alpha"), found=alpha, fix=fix)
        self.alpha, self.scale = alpha, alpha / rank
        return self.scale


def _lora(parts: _Parts) -> LowRankProduct:
    down, up, core = parts.factor("lora_down", right=True), parts.factor("lora_up"), parts.optional("lora_mid")
    if core is None:
        rank = parts.ranks(down=down.shape[0], up=up.shape[1])
    else:
        if core.ndim < 3 or math.prod(down.shape[2:]) != 1:
            raise parts.misshapen("lora_mid", "a kernel, and none in lora_down")
        down = down.flatten(1)
        rank = parts.ranks(down=down.shape[0], second_of_mid=core.shape[1])
        parts.ranks(up=up.shape[1], first_of_mid=core.shape[0])
    return LowRankProduct(up, down, parts.scale_by(rank), core)


def _matrix(parts: _Parts, name: str, core_name: str) -> Matrix:
    """Read a matrix that is stored whole or as a product, as `name` or `name_a` and `name_b`."""
    if name in parts.left:
        if parts.left & {f"{name}_a", f"{name}_b", core_name}:
            raise BadInput("a matrix is there whole and as a product", where=parts.at(name))
        return Matrix(parts.factor(name, right=True))
    core = parts.optional(core_name)
    a, b = parts.take(f"{name}_a", 2), parts.factor(f"{name}_b", right=True)
    if core is None:
        parts.ranks(**{f"{name}_a": a.shape[1], f"{name}_b": b.shape[0]})
    elif core.ndim < 3 or b.ndim != 2:
        raise parts.misshapen(core_name, "a kernel, and none in the factors")
    else:
        parts.ranks(**{f"{name}_a": a.shape[0], f"first_of_{core_name}": core.shape[0]})
        parts.ranks(**{f"{name}_b": b.shape[0], f"second_of_{core_name}": core.shape[1]})
    return Matrix(a, b, core)


def _loha(parts: _Parts) -> Hadamard:
    first, second = _matrix(parts, "hada_w1", "hada_t1"), _matrix(parts, "hada_w2", "hada_t2")
    if first.shape != second.shape:
        raise BadInput("the two matrices differ in shape", where=parts.where, found=f"{first.shape} and {second.shape}")
    rank = parts.ranks(hada_w1_b=first.rank or 0, hada_w2_b=second.rank or 0)
    return Hadamard(first, second, parts.scale_by(rank))


def _lokr(parts: _Parts) -> Kronecker:
    first, second = _matrix(parts, "lokr_w1", "lokr_t1"), _matrix(parts, "lokr_w2", "lokr_t2")
    if math.prod(first.shape[2:]) != 1:
        raise parts.misshapen("lokr_w1", "no kernel")
    ranks = {f"lokr_w{n}_b": matrix.rank for n, matrix in enumerate((first, second), 1) if matrix.rank is not None}
    return Kronecker(first, second, parts.scale_by(parts.ranks(**ranks) if ranks else None))


def _glora(parts: _Parts) -> GeneralizedLora:
    if parts.rs_lora:
        raise BadInput(
            "GLoRA with rs_lora is not supported",
            where=parts.where,
            found="its alpha does not contain the factor √r, unlike that of other kinds",
            fix="multiply alpha by √r and remove rs_lora from ss_network_args",
        )
    core = parts.optional("bm")
    a1, a2, b1 = parts.factor("a1"), parts.factor("a2"), parts.take("b1")
    b2 = parts.factor("b2", right=True)
    if not a1.shape[1] == a2.shape[0] == b1.shape[1] == b2.shape[0]:
        a1, a2, b1, b2 = a2, a1, b2, b1  # the layout of LyCORIS before 2: the factors were named the other way round
    if math.prod(b1.shape[2:]) != 1:
        raise parts.misshapen("b1", "a kernel of 1×1")
    rank = parts.ranks(columns_of_a1=a1.shape[1], rows_of_a2=a2.shape[0], columns_of_b1=b1.shape[1], rows_of_b2=b2.shape[0])
    if a1.shape[0] != a2.shape[1]:
        raise BadInput("a1·a2 is not square", where=parts.where, found=f"{tuple(a1.shape)} and {tuple(a2.shape)}")
    if core is not None and (core.ndim < 3 or core.shape[:2] != (rank, rank) or math.prod(b2.shape[2:]) != 1):
        raise parts.misshapen("bm", f"({rank}, {rank}, kernel)")
    down = b2 if core is None else b2.flatten(1)
    return GeneralizedLora(LowRankProduct(b1.flatten(1), down, parts.scale_by(rank), core), a1, a2)


def _ia3(parts: _Parts) -> Scaled:
    on_input = parts.number("on_input")
    if on_input not in (0, 1):
        raise BadInput("on_input is neither 0 nor 1", where=parts.at("on_input"), found=on_input)
    return Scaled(parts.vector("weight"), int(on_input))


def _oft(parts: _Parts) -> Formula:
    constraint = parts.number("alpha") or 0.0
    if not 0 <= constraint < math.inf:
        raise BadInput("alpha, the constraint of OFT, is not a usable number", where=parts.at("alpha"), found=constraint)
    rescale = parts.vector("rescale") if "rescale" in parts.left else None
    names = ["oft_blocks"] if "oft_blocks" in parts.left else [
        f"oft_blocks.{n}" for n in range(len([suffix for suffix in parts.left if suffix.startswith("oft_blocks.")]))
    ]  # fmt: skip
    groups = tuple(parts.take(name) for name in names)
    for name, blocks in zip(names, groups, strict=True):
        if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
            raise parts.misshapen(name, "square blocks")
    butterfly = groups[0].ndim == 4
    if butterfly and (len(groups) > 1 or not _is_butterfly(*groups[0].shape[:3])):
        raise parts.misshapen(names[0], "the blocks of a butterfly")
    formula = Butterfly(groups[0], constraint, rescale) if butterfly else Rotated(groups, constraint, rescale)
    if rescale is not None and len(rescale) != formula.rows:
        raise parts.misshapen("rescale", f"{formula.rows} rows")
    parts.rank = groups[0].shape[-1]
    return formula


def _is_butterfly(levels: int, number: int, size: int) -> bool:
    """Return whether rows can be interleaved at each level."""
    return size % 2 == 0 and (number * size) % (2**levels * (size // 2)) == 0


def _decomposed(formula: Formula, parts: _Parts, names: list[str]) -> Formula:
    """Return DoRA around a formula if a magnitude is there."""
    given = parts.left & {"dora_scale", "magnitude"}
    if not given:
        return formula
    if not isinstance(formula, Additive) or len(given) > 1:
        raise BadInput(f"{' and '.join(sorted(given))} beside {names[0]}", where=parts.where)
    suffix = given.pop()
    shape = tuple(parts.tensors[suffix].shape)
    # For output rows, PEFT stores (n,) or (1, n, 1, 1), LyCORIS (n, 1, …); for input channels, LyCORIS stores (1, n, …).
    on_input = suffix == "dora_scale" and len(shape) > 1 and shape[0] == 1 != formula.rows
    names.append("DoRA")
    return Decomposed(formula, parts.vector(suffix), int(on_input))


def _is_one(tensor: Tensor) -> bool:
    return bool((tensor == 1).all())


@dataclass(frozen=True)
class _Kind:
    name: str
    marks: tuple[str, ...]
    """Suffixes that only this kind has."""
    read: Callable[[_Parts], Formula]


_KINDS = (
    _Kind("LoRA", ("lora_down", "lora_up", "lora_mid"), _lora),
    _Kind("LoHa", ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _loha),
    _Kind("LoKr", ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"), _lokr),
    _Kind("GLoRA", ("a1", "a2", "b1", "b2"), _glora),
    _Kind("IA3", ("on_input",), _ia3),
    _Kind("OFT", ("oft_blocks",), _oft),
)

_PLAIN: dict[str, tuple[str, str, Callable[[Tensor], Formula]]] = {
    "w_norm": ("weight", "norm", Difference),
    "b_norm": ("bias", "norm", Difference),
    "diff": ("weight", "difference", Difference),
    "diff_b": ("bias", "difference", Difference),
    "diff_m": ("modulation", "difference", Difference),
    "set_weight": ("weight", "replacement", Replacement),
}
"""Suffix → parameter, kind and formula of tensors that are stored as they are."""

_REFUSED = {
    "oft_R": "OFT on the input side (oft_R, of PEFT and OneTrainer) is not supported in single files",
    "oft_diag": "this early form of OFT is not supported",
    "scalar": "a scalar that is not folded into the factors; which factor it scales depends on the trainer's version",
    "reshape_weight": "an adapter that enlarges a tensor of the base cannot be baked",
    "bias_indices": "the sparse residual of early LyCORIS files is not supported",
    "bias_values": "the sparse residual of early LyCORIS files is not supported",
    "bias_size": "the sparse residual of early LyCORIS files is not supported",
}
"""Suffix → why it is refused."""
