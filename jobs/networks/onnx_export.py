"""
Export of the generator to ONNX, for programs without PyTorch.

Input `z`: float32 (N, nz, 1, 1), any N; of a conditional generator also `labels`: int64 (N,).
Output `images`: float32 (N, 3, size, size) in [-1, 1], RGB; (images + 1) · 127.5 gives pixel
values. BatchNorm uses its running statistics, as ganq's own generation does.
"""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor

from jobs.errors import ConfigError
from jobs.networks.dcgan import AnyGenerator, Architecture
from jobs.networks.weights import state_dicts

OPSET = 18
"""The operator set that PyTorch's exporter writes natively; onnxruntime ≥ 1.14 reads it."""
TOLERANCE = 5e-4
"""
Largest permitted difference from PyTorch; one of 256 pixel values is 7.8e-3.

The largest difference seen was 1.02e-4, with a residual generator.
"""
CHECKED_BATCHES = (1, 5)  # other sizes than the traced one, to detect a fixed batch size


def generator_onnx(arch: Architecture, tensors: Mapping[str, Tensor]) -> tuple[bytes, float]:
    """
    Export the generator and compare it with PyTorch in onnxruntime.

    Args:
        tensors: keys of a checkpoint (`G.Gene.…`).

    Returns:
        (the .onnx file, largest absolute difference of a channel value).

    Raises:
        ConfigError: the onnx packages are not installed, or their result differs.
        ForeignFileError: the tensors are not those of `arch`.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as exc:
        raise ConfigError(
            f"export to ONNX needs the package {exc.name or 'onnx'}", hint="pip install 'ganq[onnx]'"
        ) from exc

    network = arch.build_generator()
    network.load_state_dict(state_dicts(arch, tensors)["netg"])
    network.eval()
    model = _graph(network, arch)

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; its warnings concern the machine, not the file
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    difference = max(_difference(session, network, arch, count) for count in CHECKED_BATCHES)
    if not difference <= TOLERANCE:
        raise ConfigError(
            f"onnxruntime {onnxruntime.__version__} differs from PyTorch by {difference:.1e} "
            f"(at most {TOLERANCE:.0e} is allowed)",
            hint="pip install --upgrade 'ganq[onnx]'",
        )
    return model, difference


def _graph(network: AnyGenerator, arch: Architecture) -> bytes:
    # The exporter treats a batch of 1 as a constant.
    example: tuple[Tensor, ...] = (torch.zeros(2, arch.nz, 1, 1), *_labels(arch, 2))
    N = torch.export.Dim("N")
    with _quiet():
        program: Any = torch.onnx.export(
            network,
            example,
            input_names=["z", "labels"][: len(example)],
            output_names=["images"],
            opset_version=OPSET,
            dynamic_shapes=({0: N},) * len(example),
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto
    model.producer_name = "ganq"
    for key, value in {"range": "-1,1", "order": "RGB", **arch.to_json()}.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, str(value)
    graph: bytes = model.SerializeToString()
    return graph


def _difference(session: Any, network: AnyGenerator, arch: Architecture, count: int) -> float:
    draw = torch.Generator().manual_seed(count)
    latents_BZ11 = torch.randn(count, arch.nz, 1, 1, generator=draw)
    with torch.inference_mode():
        expected_B3HW = network(latents_BZ11, *_labels(arch, count))
    inputs = [latents_BZ11, *_labels(arch, count)]
    given = {name: one.numpy() for name, one in zip(("z", "labels"), inputs, strict=False)}
    (got_B3HW,) = session.run(["images"], given)
    return float((torch.from_numpy(got_B3HW) - expected_B3HW).abs().max())


def _labels(arch: Architecture, count: int) -> list[Tensor]:
    """Return the second input of a conditional generator, labels in turn; [] for any other."""
    return [torch.arange(count) % arch.classes] if arch.classes else []


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's deprecation warnings and progress reports."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
