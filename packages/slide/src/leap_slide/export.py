"""Models for other runtimes, in their standard operations: ONNX, and packages of Core ML.

`deployable` is what both export: `torch.export.export(deployable(model), (images,), strict=False)` has no operation of
this package either, and on Apple's GPUs (MPS) layers with backend "auto" take the same convolutions by themselves.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leap_shared.errors import UserError, did_you_mean
from leap_shared.files import atomic_writer, ensure_folder
from leap_shared.vision.bodies.grids import Size
from leap_slide.checkpoints import merge_paths, slide_layers
from leap_slide.models import NeighborhoodAttention

__all__ = ["BACKENDS", "OPSET", "TOLERANCE", "Exported", "deployable", "export_coreml", "export_onnx"]

BACKENDS = ("conv", "gemm")
OPSET = 18
"""The first version of ONNX's operators that PyTorch's exporter writes."""
TOLERANCE = 1e-4
"""Of the largest output: how far the exported model may be from the given one, both in float32."""


@dataclass(frozen=True)
class Exported:
    """A model that was written.

    Attributes:
        path: the file, or Core ML's folder.
        opset: version of ONNX's operators, or of Core ML's specification.
        operators: how often each is used; those that are not of the standard have their domain before the name.
        difference: largest difference of an output from the given model's, None where that was not checked.
    """

    path: Path
    opset: int
    operators: Mapping[str, int]
    difference: float | None


def deployable(
    model: nn.Module, backend: str = "conv", img_size: int | Sequence[int] | None = None, reparameterize: bool = True
) -> nn.Module:
    """Copy of a model in eval mode, in float32 on the CPU, whose slide attention runs by one backend.

    Args:
        model: one of this package's, or any with `SlideAttention` in it.
        backend: "conv", depthwise convolutions with k * k copies of keys and values; or "gemm", one tap at a time.
        img_size: pixels of a side, or height and width; the model's own where None.
        reparameterize: make one path of the two.

    Raises:
        UserError: the backend is none of these.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend {backend!r} is none to export with: {did_you_mean(backend, BACKENDS)}")
    network = _copied(model, img_size)
    for _, layer in slide_layers(network):
        layer.backend = backend
    for module in network.modules():
        if isinstance(module, NeighborhoodAttention):
            module.implementation = "masked"
    if reparameterize:
        merge_paths(network)
    return network.requires_grad_(False)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    backend: str = "conv",
    img_size: int | Sequence[int] | None = None,
    opset: int = OPSET,
    dynamic_batch: bool = True,
    check: bool = True,
    reparameterize: bool = True,
) -> Exported:
    """Write a model as .onnx, in float32: images (batch, channels, height, width) to what the model gives.

    Args:
        model: one of this package's, or any with `SlideAttention` in it; it stays as it is.
        path: file to write, whole or not at all.
        backend: see `deployable`.
        img_size: see `deployable`; needed for a model without `img_size` of its own.
        opset: version of ONNX's operators, 18 or later.
        dynamic_batch: take batches of any size, else of one image.
        check: let onnx check the file and, where onnxruntime is installed, compare its outputs with the model's, which
            may differ by `TOLERANCE` of the largest.
        reparameterize: make one path of the two.

    Raises:
        UserError: onnx or onnxscript is missing, an option is impossible, or the file cannot be written.
        RuntimeError: the exported model computes something else.
    """
    for name in ("onnx", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"an export to ONNX needs {name}: pip install 'leap-slide[onnx]'")
    import onnx

    if opset < OPSET or opset > onnx.defs.onnx_opset_version():
        known = f"{OPSET} to {onnx.defs.onnx_opset_version()}"
        raise UserError(f"opset {opset}: the exporter and the onnx that is installed know {known}")
    network, path = deployable(model, backend, img_size, reparameterize), _target(path, ".onnx")
    images = _images(network, img_size, 2 if dynamic_batch else 1)
    options: dict[str, Any] = {"opset_version": opset, "input_names": ["images"], "verbose": False, "dynamo": True}
    if dynamic_batch:
        options["dynamic_shapes"] = ({0: torch.export.Dim("batch", min=1, max=1 << 15)},)
    program: Any = torch.onnx.export(network, (images,), **options)
    program.save(buffer := io.BytesIO())
    proto = onnx.load_from_string(buffer.getvalue())
    difference = None
    if check:
        onnx.checker.check_model(proto, full_check=True)
        if importlib.util.find_spec("onnxruntime") is not None:
            own = _copied(model, img_size)
            for _, layer in slide_layers(own):
                layer.backend = "auto"
            difference = _difference(own, buffer.getvalue(), _images(network, img_size, 3 if dynamic_batch else 1))
    with atomic_writer(path) as file:
        file.write(buffer.getvalue())
    used = Counter(f"{node.domain}::{node.op_type}".removeprefix("::") for node in proto.graph.node)
    version = next(found.version for found in proto.opset_import if found.domain == "")
    return Exported(path, version, dict(used.most_common()), difference)


def export_coreml(
    model: nn.Module,
    path: str | Path,
    img_size: int | Sequence[int] | None = None,
    batch: int = 1,
    half: bool = True,
    reparameterize: bool = True,
) -> Exported:
    """Convert a model, with its attention as depthwise convolutions, to an .mlpackage for iOS 16 and macOS 13 on.

    The conversion was run on Linux, where nothing can run what it writes: compare its outputs on a Mac.

    Args:
        model: one of this package's, or any with `SlideAttention` in it; it stays as it is.
        path: folder to write, which must not exist.
        img_size: see `export_onnx`.
        batch: images that the package takes at a time.
        half: let it compute in float16.
        reparameterize: make one path of the two.

    Raises:
        UserError: coremltools is missing, an option is impossible, or there is such a folder already.
    """
    if importlib.util.find_spec("coremltools") is None:
        raise UserError("an export to Core ML needs coremltools: pip install 'leap-slide[coreml]'")
    import coremltools  # type: ignore[import-not-found, unused-ignore] # it is optional

    if batch < 1:
        raise UserError(f"batch {batch}: expected 1 or more")
    path = _target(path, ".mlpackage")
    if path.exists():
        raise UserError(f"{path} exists already: remove it, or give another path")
    network = deployable(model, "conv", img_size, reparameterize)
    images = _images(network, img_size, batch)
    with torch.no_grad():
        jit: Any = torch.jit  # whose functions have no types
        traced = jit.trace(_plain_graph(network, images), images)
    package = coremltools.convert(
        traced,
        inputs=[coremltools.TensorType(name="images", shape=tuple(images.shape))],
        convert_to="mlprogram",
        minimum_deployment_target=coremltools.target.iOS16,
        compute_precision=coremltools.precision.FLOAT16 if half else coremltools.precision.FLOAT32,
    )
    with tempfile.TemporaryDirectory(dir=ensure_folder(path.parent)) as folder:
        package.save(str(part := Path(folder) / path.name))
        part.replace(path)
    program = package.get_spec()
    blocks = program.mlProgram.functions["main"].block_specializations.values()
    used = Counter(operation.type for block in blocks for operation in block.operations)
    del used["const"]
    return Exported(path, program.specificationVersion, dict(used.most_common()), None)


def _copied(model: nn.Module, img_size: int | Sequence[int] | None) -> nn.Module:
    """Copy in eval mode, in float32 on the CPU, of the size."""
    network: Any = copy.deepcopy(model).cpu().float().eval()
    if img_size is not None and hasattr(network, "set_input_size"):
        network.set_input_size(img_size)
    copied: nn.Module = network
    return copied


def _target(path: str | Path, suffix: str) -> Path:
    path = Path(path)
    if path.suffix != suffix:
        raise UserError(f"{path}: expected a name that ends in {suffix}")
    return path


def _images(network: nn.Module, img_size: int | Sequence[int] | None, batch: int) -> Tensor:
    """Random images of the model's size, the same every time."""
    found: Any = getattr(network, "img_size", None) if img_size is None else img_size
    if found is None:
        raise UserError(f"{type(network).__name__} has no img_size: give img_size=(height, width)")
    size: Size = (found, found) if isinstance(found, int) else tuple(found)
    channels: int = getattr(network, "in_chans", 3)
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0))


def _difference(model: nn.Module, file: bytes, images: Tensor) -> float:
    """Largest difference between a model's outputs and those of its .onnx.

    Raises:
        RuntimeError: it is more than `TOLERANCE` of the largest output.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        wanted = model(images)
    worst = 0.0
    outputs = [wanted] if isinstance(wanted, Tensor) else wanted
    for output, found in zip(outputs, session.run(None, {"images": images.numpy()}), strict=True):
        apart = float((torch.from_numpy(found) - output).abs().max())
        if not apart <= TOLERANCE * float(output.abs().max()):
            largest = f"{float(output.abs().max()):.3g}"
            raise RuntimeError(f"the .onnx is {apart:.3g} away from the model, whose largest output is {largest}")
        worst = max(worst, apart)
    return worst


def _plain_graph(network: nn.Module, images: Tensor) -> nn.Module:
    """A model as one graph of a fixed size, without the steps that Core ML's converter does not know."""
    graph: Any = torch.export.export(network, (images,), strict=False).run_decompositions({}).module()
    names = ("alias", "detach", "detach_", "lift_fresh_copy")
    copies = {getattr(torch.ops.aten, name).default for name in names}
    for node in list(graph.graph.nodes):
        if node.target in copies:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.op == "call_module" and not node.users:  # a check of the input's shape
            graph.graph.erase_node(node)
    graph.recompile()
    plain: nn.Module = graph
    return plain
