"""Find the base tensors that a module of an adapter file means.

Adapters name modules in many ways: with dots or with every dot replaced by an underscore, by the names of one layout or the
other, with a prefix for the part of the model. Underscores cannot be taken apart again (`to_q` contains one), so the names of
the base itself are flattened in each layout and looked up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import NamedTuple

from emomerge.adapters.images.families import DENOISERS, TEXT_ENCODERS, family_of
from emomerge.adapters.images.layouts import Family, Place, Shapes, Spelling, alias, native
from emomerge.checkpoints import Checkpoint
from emomerge.checkpoints.parts import parts_of
from emomerge.errors import BadInput

Parameters = Mapping[str, tuple[Place, ...]]
"""Parameter of a module, such as `weight` → its places in the base."""

_DENOISER, _ENCODERS = ("denoiser",), ("text_encoder", "text_encoder_2", "text_encoder_3")
_CONDITIONER = ("text_conditioner",)
_FIRST = ("text_encoder", "text_encoder_3")
"""The first text encoder. In models with T5 alone, such as Chroma, ComfyUI calls it `t5xxl` and diffusers `text_encoder`."""
_WRAPPER = "base_model.model."
PREFIXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("lora_unet__", _DENOISER), ("lora_unet_", _DENOISER), ("oft_unet_", _DENOISER), ("lora_transformer_", _DENOISER),
    ("lora_prior_unet_", _DENOISER), ("lycoris_", _DENOISER), ("model.diffusion_model.", _DENOISER),
    ("diffusion_model.", _DENOISER), ("unet.", _DENOISER), ("transformer.", _DENOISER), ("denoiser.", _DENOISER),
    ("net.", _DENOISER), ("lora_unet_llm_adapter_", _CONDITIONER), ("diffusion_model.llm_adapter.", _CONDITIONER),
    ("llm_adapter.", _CONDITIONER), ("text_conditioner.", _CONDITIONER),
    ("lora_te_", _FIRST), ("lora_te1_", _FIRST), ("lora_te2_", ("text_encoder_2", "text_encoder_3")),
    ("lora_te3_", ("text_encoder_3", "text_encoder_2")), ("text_encoder.", _FIRST),
    ("text_encoder_2.", ("text_encoder_2",)), ("text_encoder_3.", ("text_encoder_3",)),
    ("text_encoders.clip_l.", ("text_encoder",)), ("text_encoders.clip_g.", ("text_encoder_2",)),
    ("text_encoders.t5xxl.", ("text_encoder_3", "text_encoder_2", "text_encoder")), ("clip_l.", ("text_encoder",)),
    ("clip_g.", ("text_encoder_2",)), ("t5.", ("text_encoder_3", "text_encoder_2")), ("lycoris_te1_", ("text_encoder",)),
    ("lycoris_te2_", ("text_encoder_2",)), ("", _DENOISER), ("", ("whole",)),
)  # fmt: skip
"""How the key of a module begins, and the parts that it may then be in; the first part that has the module is taken.

`lora_te2_` is CLIP-G, or in Flux T5, which others call `te3`: the base decides.
"""


class Part(NamedTuple):
    """One part of a base, such as its UNet.

    Args:
        family: name of its family; None if that is unknown.
        modules: flattened module name, in any layout → the places of each parameter, by layout if they differ.
    """

    family: str | None
    modules: Mapping[str, tuple[Parameters, ...]]


class Targets:
    """The modules of a base, by every name that an adapter may have for them."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self.parts = _parts(base)

    @property
    def family(self) -> str | None:
        """The family of the base's denoiser; None if it is unknown."""
        return self.parts["denoiser"].family if "denoiser" in self.parts else None

    def find(self, module: str, *, where: object) -> Parameters | None:
        """Return the parameters of a module; None if the base does not have it.

        Args:
            module: its name in the adapter file.
            where: file and module, for the message.

        Raises:
            BadInput: the name fits several modules.
        """
        found: list[Parameters] = []
        for name in _unwrapped(module):
            for prefix, parts in PREFIXES:
                if name.startswith(prefix):
                    flat = _flat(name.removeprefix(prefix))
                    in_parts = (self.parts[part].modules.get(flat, ()) for part in parts if part in self.parts)
                    found += next((modules for modules in in_parts if modules), ())
        distinct = [parameters for number, parameters in enumerate(found) if parameters not in found[:number]]
        if len(distinct) > 1:
            named = sorted({place.tensor for parameters in distinct for places in parameters.values() for place in places})
            raise BadInput("the name fits several modules of the base", where=where, found=", ".join(named[:4]))
        return distinct[0] if distinct else None


def is_image_model(base: Checkpoint) -> bool:
    """Return whether a base is a model of images as far as its names tell."""
    return bool(parts_of(base)) or Targets(base).family is not None


def _unwrapped(module: str) -> list[str]:
    """Return the name of a module without PEFT's wrapper, before or behind the name of the part; without wrapper, as it is."""
    return [module.replace(_WRAPPER, "")]


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _parts(base: Checkpoint) -> dict[str, Part]:
    """Return the parts of a base that adapters change, and `whole`: the full names of all its tensors."""
    whole = {name: base.info(name).shape for name in base}
    found = {"whole": Part(None, _modules(native(whole)))}
    prefixes = parts_of(base)
    denoiser = denoiser_prefix(base)
    if denoiser is not None:
        found["denoiser"] = _part(whole, denoiser, DENOISERS)
    for part in _ENCODERS:
        if part in prefixes:
            found[part] = _part(whole, prefixes[part], TEXT_ENCODERS)
    conditioner = prefixes.get("text_conditioner", f"{denoiser}llm_adapter." if denoiser is not None else None)
    if conditioner is not None and any(name.startswith(conditioner) for name in whole):
        found["text_conditioner"] = _part(whole, conditioner, ())
    return found


def denoiser_prefix(base: Checkpoint) -> str | None:
    """Return what comes before the names of the UNet or transformer of a base; None if it has none."""
    prefixes = parts_of(base)
    found = next((prefixes[part] for part in ("unet", "transformer", "prior") if part in prefixes), None)
    return _common_prefix(base) if found is None and not prefixes else found


def _common_prefix(names: Collection[str]) -> str:
    """Return what comes before every name of a model of one part, as some tools write it."""
    usual = ("model.diffusion_model.", "diffusion_model.", "net.", "model.")
    return next((prefix for prefix in usual if names and all(name.startswith(prefix) for name in names)), "")


def _part(whole: Shapes, prefix: str, families: tuple[Family, ...]) -> Part:
    shapes = {name.removeprefix(prefix): shape for name, shape in whole.items() if name.startswith(prefix)}
    family = family_of(shapes, families)
    spellings = [native(shapes)]
    if family is not None:
        spellings += [alias(shapes, table(tuple(shapes))) for table in (family.rules, *family.further)]
    full = [
        {name: tuple(place._replace(tensor=prefix + place.tensor) for place in places) for name, places in spelling.items()}
        for spelling in spellings
    ]
    return Part(None if family is None else family.name, _modules(*full))


def _modules(*spellings: Spelling) -> dict[str, tuple[Parameters, ...]]:
    """Return the parameters of each module by its flattened name; several if names of different modules coincide."""
    modules: dict[str, list[Parameters]] = defaultdict(list)
    named: dict[str, dict[str, tuple[Place, ...]]] = {}
    for spelling in spellings:
        by_module: dict[str, dict[str, tuple[Place, ...]]] = defaultdict(dict)
        for name, places in spelling.items():
            module, _, parameter = name.rpartition(".")
            by_module[module][parameter] = places
        for module, parameters in by_module.items():
            known = named.get(module, {})
            if any(known.get(parameter, places) != places for parameter, places in parameters.items()):
                modules[_flat(module)].append(parameters)  # another module of that name
            else:
                named[module] = known | parameters
    for module, parameters in named.items():
        modules[_flat(module)].append(parameters)
    return {flat: tuple(found) for flat, found in modules.items()}
