"""
The tutorial's DCGAN as a plain PyTorch script: the peer of ganq's training and generation.

A typical script: ImageFolder, a DataLoader with 4 workers (as in the tutorial), transforms, BCE
on a sigmoid, two Adams, save_image for each image. It imports nothing of ganq.

    python -m benchmarks.plain_dcgan train '{"data": "faces", "out": "runs", "epochs": 5}'
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.utils import save_image

LOADER_WORKERS = 4


class NetG(nn.Module):
    def __init__(self, nz: int, ngf: int) -> None:
        super().__init__()
        self.Gene = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 8, 4, 1, 0, bias=False),
            nn.BatchNorm2d(ngf * 8),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 8, ngf * 4, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf * 4),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf, 3, 5, 3, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, noise: Tensor) -> Any:
        return self.Gene(noise)


class NetD(nn.Module):
    def __init__(self, ndf: int) -> None:
        super().__init__()
        self.Discrim = nn.Sequential(
            nn.Conv2d(3, ndf, 5, 3, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 2),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(ndf * 2, ndf * 4, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 4),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(ndf * 4, ndf * 8, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 8),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(ndf * 8, 1, 4, 1, 0, bias=True),
            nn.Sigmoid(),
        )

    def forward(self, images_BCHW: Tensor) -> Any:
        return self.Discrim(images_BCHW).view(-1)


def train(
    data: str,
    out: str,
    size: int = 96,
    batch: int = 256,
    epochs: int = 400,
    nz: int = 100,
    ngf: int = 64,
    ndf: int = 64,
    d_every: int = 1,
    g_every: int = 5,
    save_every: int = 5,
    workers: int = LOADER_WORKERS,
) -> dict[str, float]:
    """
    Train a model.

    Returns:
        images: number of real images; loop_s: seconds in the loop over batches;
        whole_s: seconds in total, with data set, networks and saving.
    """
    began = time.perf_counter()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    dataset = ImageFolder(
        data,
        transform=transforms.Compose(
            [
                transforms.Resize(size),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
            ]
        ),
    )
    loader = DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=workers, drop_last=True)
    netg, netd = NetG(nz, ngf), NetD(ndf)
    optimizer_g = torch.optim.Adam(netg.parameters(), 2e-4, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(netd.parameters(), 2e-4, betas=(0.5, 0.999))
    criterion = nn.BCELoss()
    true_labels, fake_labels = torch.ones(batch), torch.zeros(batch)
    fix_noises, noises = torch.randn(batch, nz, 1, 1), torch.randn(batch, nz, 1, 1)
    images, loop_s = 0, 0.0
    for epoch in range(epochs):
        epoch_began = time.perf_counter()
        for ii, (real, _) in enumerate(loader):
            if ii % d_every == 0:
                optimizer_d.zero_grad()
                criterion(netd(real), true_labels).backward()
                fake = netg(noises).detach()
                criterion(netd(fake), fake_labels).backward()
                optimizer_d.step()
            if ii % g_every == 0:
                optimizer_g.zero_grad()
                noises.copy_(torch.randn(batch, nz, 1, 1))
                criterion(netd(netg(noises)), true_labels).backward()
                optimizer_g.step()
            images += batch
        loop_s += time.perf_counter() - epoch_began
        if (epoch + 1) % save_every == 0:
            with torch.no_grad():
                shown = netg(fix_noises)[:64]
            save_image(shown, folder / f"{epoch}.png", normalize=True)
            torch.save(netd.state_dict(), folder / f"netd_{epoch}.pth")
            torch.save(netg.state_dict(), folder / f"netg_{epoch}.pth")
    return {"images": images, "loop_s": loop_s, "whole_s": time.perf_counter() - began}


class Generator:
    """The tutorial's generation, one file per image; the network remains loaded."""

    def __init__(self, netg: str, nz: int = 100, ngf: int = 64, batch: int = 64) -> None:
        self.net = NetG(nz, ngf)
        self.net.load_state_dict(torch.load(netg, weights_only=True))
        self.net.eval()
        self.nz, self.batch = nz, batch

    @torch.no_grad()
    def generate(self, count: int, out: str) -> dict[str, float]:
        """Generate images, and save each to a file."""
        began = time.perf_counter()
        folder = Path(out)
        folder.mkdir(parents=True)
        for start in range(0, count, self.batch):
            images_BCHW = self.net(torch.randn(self.batch, self.nz, 1, 1))[: count - start]
            for place, one in enumerate(images_BCHW):
                save_image(one, folder / f"{start + place:06d}.png", normalize=True, value_range=(-1, 1))
        return {"images": count, "whole_s": time.perf_counter() - began}

    @torch.no_grad()
    def forward(self, count: int) -> dict[str, float]:
        """Run only the forward passes of so many images."""
        began = time.perf_counter()
        for _ in range(0, count, self.batch):
            self.net(torch.randn(self.batch, self.nz, 1, 1))
        return {"images": count, "whole_s": time.perf_counter() - began}


def serve() -> None:
    """Run the commands on stdin, so that a benchmark can measure short pieces in a warm process."""
    generator: Generator | None = None
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        what = order.pop("do")
        answer: dict[str, float] = {}
        if what == "load":
            generator = Generator(**order)
        elif what == "train":
            answer = train(**order)
        elif generator is not None:
            answer = getattr(generator, what)(**order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        print(train(**json.loads(sys.argv[2])))
