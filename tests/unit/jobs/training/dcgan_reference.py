"""
The tutorial as a plain loop, and the bits it ends with, by layout and optimiser.

Of ganq this takes the draws alone: which noise, which order, which first weights. The
networks are those of the benchmarks' plain script, the loop is RECIPES written down.

    PYTHONPATH=tests python -m unit.jobs.training.dcgan_reference           what this build gives
    PYTHONPATH=tests python -m unit.jobs.training.dcgan_reference --write   keep it for this build
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from unit.jobs.local_context import noise_images

from benchmarks.plain_dcgan import NetD, NetG
from jobs import device as devices
from jobs import rng
from jobs.context import Images
from jobs.specs import TrainSpec

STORED = Path(__file__).with_name("dcgan_bits.json")
LAYOUTS = {"plain": torch.contiguous_format, "channels last": torch.channels_last}
OPTIMISERS = {"default": {}, "fused": {"fused": True}}
OURS = "channels last, fused"
SPEC = TrainSpec.create(
    data="/faces", recipe="dcgan", size=96, nz=6, ngf=4, ndf=4, batch=4, epochs=4, save_every=2, seed=5
)
IMAGES = noise_images(27, 96)


def build() -> str:
    """All that the bits depend on; one thread, so their number is none of it."""
    fingerprint = devices.build_fingerprint(torch.device("cpu"), deterministic=True)
    return f"torch {fingerprint['torch']}, {fingerprint['device']}"


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def the_tutorial(layout: str, optimiser: str, spec: TrainSpec = SPEC, images: Images = IMAGES) -> Any:
    """Weights and statistics of both networks after the last epoch."""
    memory = LAYOUTS[layout]
    torch.manual_seed(rng.derive(spec.seed, "init-g"))
    netg = NetG(spec.nz, spec.ngf).to(memory_format=memory)
    torch.manual_seed(rng.derive(spec.seed, "init-d"))
    netd = NetD(spec.ndf).to(memory_format=memory)
    how: dict[str, Any] = {"betas": (0.5, 0.999), **OPTIMISERS[optimiser]}
    opt_g = torch.optim.Adam(netg.parameters(), 2e-4, **how)
    opt_d = torch.optim.Adam(netd.parameters(), 2e-4, **how)
    bce, ones, zeros = nn.BCELoss(), torch.ones(spec.batch), torch.zeros(spec.batch)
    shape = (spec.batch, spec.nz, 1, 1)
    fixed, draws = rng.noise(spec.seed, "fixed", shape=shape), 0
    noises = rng.noise(spec.seed, "noise", draws, shape=shape)
    for epoch in range(spec.epochs):
        order = rng.permutation(spec.seed, epoch, len(images))
        for place in range(len(images) // spec.batch):
            chosen = order[place * spec.batch : (place + 1) * spec.batch]
            real = torch.from_numpy(images.images_N3HW[chosen.numpy()]).to(memory_format=memory)
            real = ((real.float() / 255) - 0.5) / 0.5  # ToTensor, Normalize(0.5, 0.5)
            opt_d.zero_grad()
            bce(netd(real), ones).backward()
            bce(netd(netg(noises).detach()), zeros).backward()
            opt_d.step()
            if place % spec.g_every == 0:
                opt_g.zero_grad()
                draws += 1
                noises = rng.noise(spec.seed, "noise", draws, shape=shape)
                bce(netd(netg(noises)), ones).backward()
                opt_g.step()
        if (epoch + 1) % spec.save_every == 0:
            with torch.no_grad():
                netg(fixed)
    return {
        **{f"g.{key}": value for key, value in netg.state_dict().items()},
        **{f"d.{key}": value for key, value in netd.state_dict().items()},
    }


def sha256(tensors: Any) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode() + tensors[key].detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def all_hashes() -> dict[str, str]:
    """By layout and optimiser, in this build."""
    with one_thread():
        return {f"{one}, {two}": sha256(the_tutorial(one, two)) for one, two in product(LAYOUTS, OPTIMISERS)}


def main() -> None:
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    stored[build()] = all_hashes()
    print(json.dumps({build(): stored[build()]}, indent=1))
    if "--write" in sys.argv:
        STORED.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
