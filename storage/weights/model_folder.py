"""Read a folder that `ganq push` has written: model.safetensors and config.json."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.errors import ForeignFileError, GanqError

if TYPE_CHECKING:
    from torch import Tensor

MODEL, CONFIG = "model.safetensors", "config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_CLASSES = 10_000


def load_model(folder: Path) -> "tuple[dict[str, Any], dict[str, Tensor]]":
    """
    Return the model of a folder as one checkpoint of ganq.

    Returns:
        ({"arch": …, "classes": …, "epoch": …}, tensors `G.…` and, if there is a discriminator, `D.…`).

    Raises:
        NotFoundError: model.safetensors is missing.
        ForeignFileError: config.json or the weights are malformed, or they do not belong together.
    """
    from jobs.networks.dcgan import Architecture
    from jobs.networks.weights import fit, join, split
    from storage.weights.load import read_tensors

    path = folder / CONFIG
    try:
        with open(path, "rb") as file:
            config: dict[str, Any] = json.loads(file.read(MAX_CONFIG_BYTES))
        arch = Architecture.from_json(config["arch"])
        classes = config.get("classes", [])
        epoch = config.get("epoch", 0)
        if not (
            isinstance(classes, list)
            and len(classes) == arch.classes <= MAX_CLASSES
            and all(isinstance(one, str) for one in classes)
            and type(epoch) is int
            and epoch >= 0
        ):
            raise ValueError("its classes or its epoch are malformed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, GanqError) as exc:
        why = exc.message if isinstance(exc, GanqError) else f"{type(exc).__name__}: {exc}"
        raise ForeignFileError(
            f"{folder} is not a model of ganq: {CONFIG}: {why[:200]}",
            hint=f"give a folder that ganq push has written, with {MODEL} and {CONFIG}",
        ) from exc
    netg, netd = split(read_tensors(folder / MODEL))
    name = str(folder / MODEL)
    tensors = join(fit(netg, arch, "G", name=name), fit(netd, arch, "D", name=name) if netd else None)
    return {"arch": arch.to_json(), "classes": classes, "epoch": epoch}, tensors
