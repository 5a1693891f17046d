"""Published LoRA-Flow gates (arXiv:2402.11455): read, held against their adapters, written.

Their file has ``encoder.layers.{i}.lora_fusion_gate.weight`` [E, width] and, but for an older form
in which biases are zero, ``encoder.layers.{i}.weight_bias`` [1, E], for every decoder layer i. The
gate's lines are in the order of its adapters: the language first, then the task.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from lorahub_registry.adapters.compat import Member
from lorahub_registry.adapters.dynamic import FOLDER, Dynamic, LoraFlow
from lorahub_registry.adapters.tensors import read_header
from lorahub_registry.errors import BrokenAdapter, IncompatibleAdapters, UnknownRef
from lorahub_registry.weights.convert import unpickled
from lorahub_registry.weights.dynamic import Origin, save_dynamic
from lorahub_registry.weights.files import DTYPES, save_adapter
from lorahub_registry.weights.lowrank import Deltas, LowRank, weighted_sum

_KEY = re.compile(r"encoder\.layers\.(\d{1,4})\.(lora_fusion_gate\.weight|weight_bias)\Z")
_LAYER = re.compile(r"(?P<list>.+?)\.(?P<layer>\d+)\.")
_SAFE_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Gates:
    """The gates of a model's layers.

    Attributes:
        weights: [layers, E, width], float32 on the CPU.
        biases: [layers, E], float32; zero in the older form.
        biased: whether the file has biases.
    """

    weights: torch.Tensor
    biases: torch.Tensor
    biased: bool

    @property
    def layers(self) -> int:
        """How many layers have a gate."""
        return int(self.weights.shape[0])

    @property
    def experts(self) -> int:
        """How many adapters a gate chooses among."""
        return int(self.weights.shape[1])

    @property
    def width(self) -> int:
        """Of the residual stream that they look at."""
        return int(self.weights.shape[2])


def read_gates(path: Path, *, timeout_s: float = 600.0) -> Gates:
    """The gates in ``path``: a ``.safetensors``, or else a pickle, read in a child process.

    Args:
        timeout_s: see :func:`lorahub_registry.weights.convert.convert`.

    Raises:
        UnknownRef: there is no such file.
        BrokenAdapter: it is damaged, holds more than tensors, or these are no gates: of other
            names, other shapes from layer to layer, NaN.
    """
    if not path.is_file():
        raise UnknownRef(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _gates(_load(path), str(path))
    with (
        tempfile.TemporaryDirectory(prefix="lorareg-") as place,
        unpickled(path, beside=Path(place), timeout_s=timeout_s) as part,
    ):
        return _gates(_load(part), str(path))


def _load(path: Path) -> dict[str, torch.Tensor]:
    read_header(path)
    return load_file(path)


def _gates(tensors: Mapping[str, torch.Tensor], where: str) -> Gates:
    found: dict[str, dict[int, torch.Tensor]] = {"lora_fusion_gate.weight": {}, "weight_bias": {}}
    for name, tensor in tensors.items():
        match = _KEY.match(name)
        if not match:
            raise BrokenAdapter(
                f"{where}: holds {name!r}, which is no part of a gate",
                hint="a gate's file has encoder.layers.N.lora_fusion_gate.weight and .weight_bias",
            )
        if not torch.isfinite(tensor).all():
            raise BrokenAdapter(
                f"{where}: {name} holds NaN or infinity",
                hint="its training diverged or the file is damaged; take other gates",
            )
        found[match[2]][int(match[1])] = tensor.float()
    weights, biases = found["lora_fusion_gate.weight"], found["weight_bias"]
    if not weights or sorted(weights) != list(range(len(weights))):
        raise BrokenAdapter(
            f"{where}: has gates of {len(weights)} layers, and they are not the first of a model",
            hint="a layer's gate is missing; is the file whole?",
        )
    if biases and biases.keys() != weights.keys():
        odd = min(biases.keys() ^ weights.keys())
        raise BrokenAdapter(f"{where}: layer {odd} has no gate or no bias, and others have both")
    shape = weights[0].shape
    for layer in range(len(weights)):
        if len(shape) != 2 or not all(shape) or weights[layer].shape != shape:
            raise BrokenAdapter(
                f"{where}: the gate of layer {layer} is {_shape(weights[layer])}, and that of "
                f"layer 0 is {_shape(weights[0])}; each is to be adapters x width"
            )
        if biases and biases[layer].shape not in {(1, shape[0]), (shape[0],)}:
            raise BrokenAdapter(
                f"{where}: the bias of layer {layer} is {_shape(biases[layer])} beside a gate for "
                f"{shape[0]} adapters"
            )
    stacked = torch.stack([weights[layer] for layer in range(len(weights))])
    offsets = [biases[layer].flatten() for layer in range(len(biases))]
    zero = stacked.new_zeros(stacked.shape[:2])
    return Gates(stacked, torch.stack(offsets) if offsets else zero, bool(biases))


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"


def check_count(gates: Gates, adapters: int, *, where: str) -> None:
    """Whether there are as many adapters as the gates choose among.

    Raises:
        IncompatibleAdapters: there are not.
    """
    if gates.experts != adapters:
        raise IncompatibleAdapters(
            f"{where}: its gates choose among {gates.experts} adapters, and {adapters} are named",
            hint="name them in the gate's order, the language first: --adapters LANGUAGE TASK",
        )


def list_of_layers(members: Sequence[Member], gates: Gates, *, where: str) -> str:
    """The list of decoder layers that the adapters sit in (``model.layers``), if the gates fit it.

    Args:
        where: the gates' file, for messages.

    Raises:
        IncompatibleAdapters: an adapter sits on something outside the layers, or in two lists of
            them; or there are gates of more, fewer or otherwise wide layers.
    """
    lists: dict[str, tuple[Member, set[int]]] = {}
    for member in members:
        for module in member.facts.modules:
            match = _LAYER.match(module.name)
            if not match:
                raise IncompatibleAdapters(
                    f"{member.name}: {module.name} is in no layer, so no layer's gate decides "
                    "for it",
                    hint="take adapters of the layers' modules alone",
                )
            _, seen = lists.setdefault(match["list"], (member, set()))
            seen.add(int(match["layer"]))
            _check_width(member, module.name, (module.fan_in, module.fan_out), gates, where)
    if len(lists) > 1:
        (one, (first, _)), (other, (second, _)) = list(lists.items())[:2]
        raise IncompatibleAdapters(
            f"gates are of one list of layers, and {first.name} sits in {one}, {second.name} in "
            f"{other}"
        )
    [(prefix, (_, layers))] = lists.items()
    if layers != set(range(gates.layers)):
        raise IncompatibleAdapters(
            f"{where}: has gates of {gates.layers} layers, and the adapters sit in "
            f"{len(layers)}, up to {prefix}.{max(layers)}",
            hint="the gates were trained with other adapters, or on another base",
        )
    return prefix


def _check_width(
    member: Member, module: str, shape: tuple[int, int], gates: Gates, where: str
) -> None:
    # The query reads the residual stream; every other module reads it or writes to it.
    stream = shape[:1] if module.endswith(".q_proj") else shape
    if gates.width not in stream:
        raise IncompatibleAdapters(
            f"{where}: its gates look at a residual stream of width {gates.width}, and in "
            f"{member.name} {module} is {shape[1]}x{shape[0]}",
            hint="the gates were trained on another base",
        )


def write_gated(
    folder: Path,
    gates: Gates,
    layers: str,
    experts: Sequence[Deltas],
    origins: Sequence[Origin],
    *,
    base: str,
    base_revision: str | None,
    task_type: str,
    temperature: float = 1.0,
    dtype: str = "float32",
    all_modules: Collection[str] = (),
) -> Dynamic:
    """Write the adapters with their gates: a dynamic mixture, and its plain LoRA above it.

    The plain one has the coefficients that each gate gives where it sees nothing, 1/k + b: there
    are no rows to take a mean over.

    Args:
        folder: exists already; the mixture goes into its folder ``dynamic``.
        layers: from :func:`list_of_layers`.
        experts: each adapter's deltas, in the gates' order.
        dtype: see :func:`exact_dtype`; gates stay float32.
        temperature: what the gates' logits are divided by.
    """
    tensors = {}
    for layer in range(gates.layers):
        tensors[f"{layers}.{layer}.mixture.lora_gate"] = gates.weights[layer]
        tensors[f"{layers}.{layer}.mixture.lora_gate_bias"] = gates.biases[layer]
    plain: dict[str, LowRank] = {}
    coefficients = plain_coefficients(gates, layers)
    for name in sorted({name for deltas in experts for name in deltas}):
        number = name.removeprefix(f"{layers}.").split(".")[0]
        own = [{name: deltas[name]} if name in deltas else {} for deltas in experts]
        plain |= weighted_sum(own, coefficients[f"{layers}.{number}"])
    save_adapter(
        folder,
        plain,
        base=base,
        base_revision=base_revision,
        task_type=task_type,
        dtype=dtype,
        all_modules=all_modules,
    )
    inner = folder / FOLDER
    inner.mkdir()
    return save_dynamic(
        inner,
        experts,
        origins,
        LoraFlow("layer", temperature),
        tensors,
        base=base,
        base_revision=base_revision,
        task_type=task_type,
        dtype=dtype,
        all_modules=all_modules,
    )


def plain_coefficients(gates: Gates, layers: str) -> dict[str, list[float]]:
    """Layer → each adapter's coefficient where its gate sees nothing: 1/k + b."""
    each = gates.biases.double() + 1 / gates.experts
    return {f"{layers}.{layer}": found for layer, found in enumerate(each.tolist())}


def exact_dtype(members: Sequence[Member], experts: Sequence[Deltas]) -> str:
    """The adapters' own dtype where it holds their scaled factors without loss, else ``float32``.

    A scaling of 16/64 only moves the exponent; most others need more digits than half precision
    has.
    """
    own = {_SAFE_DTYPES.get(member.facts.dtype or "", "float32") for member in members}
    if len(own) > 1:
        return "float32"
    name = own.pop()
    factors = (factor for deltas in experts for d in deltas.values() for factor in (d.a, d.b))
    if all(torch.equal(f.to(DTYPES[name]).float(), f) for f in factors):
        return name
    return "float32"
