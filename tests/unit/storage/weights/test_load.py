"""Weights from outside: what is read, and everything that is refused."""

import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from jobs.errors import ForeignFileError, NotFoundError
from jobs.networks.dcgan import Architecture
from jobs.networks.weights import check_colours, infer_architecture, join, network_keys, select
from storage.weights import unpickle
from storage.weights.load import MAX_BYTES, load_origin, read_weights

SMALL = Architecture(size=24, nz=6, ngf=4, ndf=4)


class TutorialG(nn.Module):
    """The generator as the tutorial writes it down, in its own words."""

    def __init__(self, nz: int, ngf: int, edge: tuple[int, int, int]) -> None:
        super().__init__()
        self.Gene = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 8, 4, 1, 0, bias=False),
            nn.BatchNorm2d(ngf * 8),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(ngf * 8, ngf * 4, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf * 4),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(ngf, 3, *edge, bias=False),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.Gene(x)
        return made


class TutorialD(nn.Module):
    def __init__(self, ndf: int, edge: tuple[int, int, int], *, last_bias: bool = True) -> None:
        super().__init__()
        self.Discrim = nn.Sequential(
            nn.Conv2d(3, ndf, *edge, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 2),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 2, ndf * 4, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 4),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 4, ndf * 8, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 8, 1, 4, 1, 0, bias=last_bias),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.Discrim(x).flatten()
        return scores


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A whole, harmless pair of files."""
    torch.save(SMALL.build_generator(1).state_dict(), tmp_path / "netg_3.pth")
    torch.save(SMALL.build_discriminator(2).state_dict(), tmp_path / "netd_3.pth")
    return tmp_path / "netg_3.pth", tmp_path / "netd_3.pth"


# --- what is read -----------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "edge"), [(96, (5, 3, 1)), (64, (4, 2, 1))])
def test_files_of_an_independent_tutorial_network_make_the_same_images_and_scores(
    tmp_path: Path, size: int, edge: tuple[int, int, int]
) -> None:
    netg, netd = TutorialG(9, 4, edge), TutorialD(5, edge)
    netg(torch.randn(8, 9, 1, 1))  # moves BatchNorm's running statistics away from 0 and 1
    netd(torch.randn(8, 3, size, size))
    torch.save(netg.state_dict(), tmp_path / "g.pth")
    torch.save(netd.state_dict(), tmp_path / "d.pth")

    arch, tensors = load_origin(tmp_path / "g.pth", tmp_path / "d.pth")

    assert arch == {"size": size, "nz": 9, "ngf": 4, "ndf": 5, "norm_d": "batch"}
    built = Architecture.from_json(arch)
    ours_g, ours_d = built.build_generator(), built.build_discriminator()
    ours_g.load_state_dict({key[2:]: t for key, t in tensors.items() if key.startswith("G.")})
    ours_d.load_state_dict({key[2:]: t for key, t in tensors.items() if key.startswith("D.")})
    latents = torch.randn(3, 9, 1, 1)
    with torch.inference_mode():
        images = netg.eval()(latents)
        assert torch.equal(ours_g.eval()(latents), images)
        assert torch.equal(ours_d.eval()(images), netd.eval()(images))


def test_a_spectral_discriminator_is_recognised_by_its_keys(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    spectral = Architecture(size=24, nz=6, ngf=4, ndf=8, norm_d="spectral")
    torch.save(spectral.build_discriminator(1).state_dict(), tmp_path / "d.pth")
    arch, _ = load_origin(pair[0], tmp_path / "d.pth")
    assert arch == spectral.to_json()


def test_a_generator_alone_is_enough(pair: tuple[Path, Path]) -> None:
    arch, tensors = load_origin(pair[0])
    assert arch["size"] == 24
    assert all(key.startswith("G.Gene.") for key in tensors)


def test_one_file_of_ganq_gives_both_networks(tmp_path: Path) -> None:
    both = join(SMALL.build_generator(1).state_dict(), SMALL.build_discriminator(2).state_dict())
    save_file(both, tmp_path / "generator.safetensors")
    arch, tensors = load_origin(tmp_path / "generator.safetensors")
    assert arch == SMALL.to_json()
    assert tensors.keys() == both.keys()
    read = read_weights(tmp_path / "generator.safetensors")
    SMALL.build_generator().load_state_dict(select(read, "G"))
    SMALL.build_discriminator().load_state_dict(select(read, "D"))


def test_wrapped_parallel_parameters_in_float64_are_the_same_weights(tmp_path: Path) -> None:
    state = SMALL.build_generator(1).state_dict()
    strange = {f"module.{key}": nn.Parameter(t.double(), False) if t.dim() else t for key, t in state.items()}
    torch.save({"state_dict": strange, "epoch": 3}, tmp_path / "g.pth")
    read = read_weights(tmp_path / "g.pth")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], t) and read[key].dtype == t.dtype for key, t in state.items())


def saved(tmp_path: Path, made: object) -> Path:
    torch.save(made, tmp_path / "whole.pth")
    return tmp_path / "whole.pth"


def renamed(state: dict[str, Tensor], *, to: str) -> dict[str, Tensor]:
    return {key.replace("Gene", to).replace("Discrim", to): tensor for key, tensor in state.items()}


def optimiser(net: nn.Module) -> dict[str, Any]:
    adam = torch.optim.Adam(net.parameters())
    for one in net.parameters():
        one.grad = torch.zeros_like(one)
    adam.step()
    return adam.state_dict()


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": tensor for key, tensor in state.items()}


Shape = Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Any]]
SHAPES: dict[str, Shape] = {
    "netG and netD": lambda g, d: {"netG": renamed(g, to="main"), "netD": renamed(d, to="main"), "epoch": 3},
    "with optimisers": lambda g, d: {
        "netG": g,
        "netD": d,
        "optimizerG": optimiser(SMALL.build_generator()),
        "optimizerD": optimiser(SMALL.build_discriminator()),
    },
    "state_dict behind the name": lambda g, d: {
        "generator_state_dict": renamed(g, to="model"),
        "discriminator_state_dict": renamed(d, to="model"),
    },
    "state_dict inside": lambda g, d: {"generator": {"state_dict": g}, "critic": {"state_dict": d}},
    "a dictionary of models": lambda g, d: {"models": {"G": g, "D": d}, "args": {"lr": 1}},
    "averages": lambda g, d: {
        "g": {key: torch.zeros_like(one) for key, one in g.items()},
        "d": d,
        "g_ema": {key: one for key, one in g.items() if "running" not in key and "num" not in key}
        | {key: one for key, one in g.items() if "running" in key},
    },
    "Lightning": lambda g, d: {
        "state_dict": {
            **under("generator", renamed(g, to="model")),
            **under("discriminator", renamed(d, to="model")),
            "validation_z": torch.zeros(3),
        },
        "hyper_parameters": {"lr": 1e-3},
        "optimizer_states": [optimiser(SMALL.build_generator())],
    },
    "DataParallel inside": lambda g, d: {"netG": under("module", g), "netD": under("module", d)},
    "compiled and parallel": lambda g, d: {
        "G": under("_orig_mod.module", g),
        "D": under("module._orig_mod", d),
    },
}


def networks(made: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The networks that are found in what a file holds, without a process that opens it."""
    found = network_keys(unpickle.flat_tensors(made))
    return select(found, "G"), select(found, "D")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_networks_are_found_in_checkpoints_of_every_common_shape(shape: Shape) -> None:
    g, d = SMALL.build_generator(1).state_dict(), SMALL.build_discriminator(2).state_dict()
    for found, state in zip(networks(shape(g, d)), (g, d), strict=True):
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize("name", ["g_ema", "generator", "netG", "G_state_dict", "model", "params_ema", "gen"])
def test_a_generator_alone_is_found_under_any_name(name: str) -> None:
    g = SMALL.build_generator(1).state_dict()
    found, _ = networks({name: renamed(g, to="main"), "step": 9})
    assert all(torch.equal(found[key], g[key]) for key in g)


def test_import_and_starting_weights_read_the_same_checkpoint(tmp_path: Path) -> None:
    g, d = SMALL.build_generator(1).state_dict(), SMALL.build_discriminator(2).state_dict()
    path = saved(tmp_path, SHAPES["with optimisers"](renamed(g, to="main"), renamed(d, to="main")))
    arch, tensors = load_origin(path)
    assert arch == SMALL.to_json()
    assert join(*(select(read_weights(path), which) for which in ("G", "D"))).keys() == tensors.keys()


def test_a_discriminator_of_another_family_does_not_keep_its_generator_from_being_imported(
    tmp_path: Path,
) -> None:
    g = SMALL.build_generator(1).state_dict()
    arch, tensors = load_origin(saved(tmp_path, {"netG": g, "netD": {"fc.weight": torch.zeros(3, 3)}}))
    assert arch["size"] == 24
    assert {key[:2] for key in tensors} == {"G."}


def channels(count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A pair for images with another number of colour channels."""
    g, d = TutorialG(9, 4, (4, 2, 1)), TutorialD(5, (4, 2, 1))
    g.Gene[-2] = nn.ConvTranspose2d(4, count, 4, 2, 1, bias=False)
    d.Discrim[0] = nn.Conv2d(count, 5, 4, 2, 1, bias=False)
    return renamed(dict(g.state_dict()), to="main"), renamed(dict(d.state_dict()), to="main")


@pytest.mark.parametrize(
    ("count", "said"), [(1, "one colour channel"), (2, "two colour"), (4, "four colour")]
)
def test_networks_for_other_colours_are_named_by_their_channels(
    tmp_path: Path, count: int, said: str
) -> None:
    g, d = channels(count)
    for made, network in ((g, "generator"), (d, "discriminator"), ({"netG": g, "netD": d}, "generator")):
        with pytest.raises(ForeignFileError, match=f"{network} of images with {said}.*instead of three"):
            check_colours(network_keys(unpickle.flat_tensors(made)), "FILE")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("mapping.fc0.weight", "synthesis.b4.const"), "StyleGAN"),
        (("conv1.weight", "layer1.0.conv1.weight", "layer4.0.bn1.weight"), "a ResNet classifier"),
        (("down_blocks.0.weight", "up_blocks.0.weight"), "a diffusion model"),
    ],
)
def test_other_networks_are_named_by_what_they_are(keys: tuple[str, ...], said: str) -> None:
    with pytest.raises(ForeignFileError, match=f"does not hold a generator: it is of {said}"):
        infer_architecture(network_keys({key: torch.zeros(3, 3) for key in keys}))


def test_a_classifier_of_convolutions_and_linear_layers_is_no_discriminator() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 10))
    with pytest.raises(ForeignFileError, match="holds a network with fully connected layers, as classifiers"):
        infer_architecture(network_keys(net.state_dict()))


def test_the_format_before_pytorch_1_6_loads(tmp_path: Path) -> None:
    state = SMALL.build_generator(1).state_dict()
    torch.save(state, tmp_path / "g.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_weights(tmp_path / "g.pth")["Gene.0.weight"], state["Gene.0.weight"])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_load(tmp_path: Path, kind: torch.dtype) -> None:
    state = {key: t.to(kind) if t.dim() else t for key, t in SMALL.build_generator(1).state_dict().items()}
    torch.save(state, tmp_path / "g.pth")
    read = read_weights(tmp_path / "g.pth")
    assert all(torch.equal(read[key].to(t.dtype), t) for key, t in state.items())


def test_a_discriminator_without_its_last_bias_gets_a_zero_one(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    netg, netd = TutorialG(9, 4, (4, 2, 1)), TutorialD(5, (4, 2, 1), last_bias=False)
    torch.save({k.replace("Gene", "main"): t for k, t in netg.state_dict().items()}, tmp_path / "g.pth")
    torch.save({k.replace("Discrim", "main"): t for k, t in netd.state_dict().items()}, tmp_path / "d.pth")
    arch, tensors = load_origin(tmp_path / "g.pth", tmp_path / "d.pth")
    assert arch["size"] == 64
    assert tensors["D.Discrim.11.bias"].tolist() == [0.0]


# --- what is refused --------------------------------------------------------------------------


class Hostile:
    """Pickles to a call of os.system."""

    def __init__(self, canary: Path) -> None:
        self.command = f"touch {canary}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def zip_of(payload: bytes) -> bytes:
    """A file as torch.save lays it out, with a pickle of our choice."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("netg/data.pkl", payload)
        archive.writestr("netg/version", "3\n")
        archive.writestr("netg/byteorder", "little")
    return file.getvalue()


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("wrap", [zip_of, bytes], ids=["zip", "bare pickle"])
def test_a_pickle_that_runs_a_command_is_refused_and_runs_nothing(
    tmp_path: Path, wrap: Callable[[bytes], bytes], protocol: int
) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "netg_399.pth"
    path.write_bytes(wrap(pickle.dumps(Hostile(canary), protocol=protocol)))
    with pytest.raises(ForeignFileError) as caught:
        load_origin(path)
    assert not canary.exists()
    assert str(path) in caught.value.message
    assert caught.value.hint
    if protocol == 2 and wrap is zip_of:
        assert "posix.system" in caught.value.message


def test_a_command_among_real_weights_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    torch.save({**SMALL.build_generator(1).state_dict(), "x": Hostile(canary)}, tmp_path / "g.pth")
    with pytest.raises(ForeignFileError, match=r"posix\.system"):
        read_weights(tmp_path / "g.pth")
    assert not canary.exists()


def test_a_whole_pickled_network_is_refused_by_the_name_of_its_class(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "g.pth")
    with pytest.raises(ForeignFileError, match=r"torch\.nn\.modules\.linear\.Linear") as caught:
        read_weights(tmp_path / "g.pth")
    assert "state_dict()" in str(caught.value.hint)


@pytest.mark.parametrize(
    "escape",
    [
        "os.system('touch canary')",
        "subprocess.run(['touch', 'canary'])",
        "os.posix_spawn('/usr/bin/touch', ['touch', 'canary'], {})",
        "os.execv('/usr/bin/touch', ['touch', 'canary'])",
        "os.fork()",
        "open('canary', 'w')",
        "os.open('canary', os.O_CREAT | os.O_WRONLY)",
        "os.open('canary', os.O_CREAT)",
        "os.remove('kept')",
        "os.rename('kept', 'canary')",
        "socket.socket()",
        "ctypes.CDLL(None).system(b'touch canary')",
        "bytearray(64 * 1024**3)",
    ],
)
def test_the_sandbox_holds_even_if_the_unpickler_had_a_hole(tmp_path: Path, escape: str) -> None:
    """Runs the code that such a hole would run, in a locked process."""
    (tmp_path / "kept").touch()
    code = (
        "import ctypes, os, runpy, socket, subprocess\n"
        f"runpy.run_path({unpickle.__file__!r})['lock_down'](1000)\n"
        f"try:\n    {escape}\nexcept (PermissionError, MemoryError) as exc:\n    print('held')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "held\n", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_the_sandbox_knows_no_secret_and_leaves_nothing_behind(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GANQ_DATABASE_URL", "postgresql://ganq:canary@db/ganq")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()
    seen: list[dict[str, str]] = []
    real_run = subprocess.run

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["env"])
        return real_run(*args, **kwargs)

    monkeypatch.setattr(subprocess, "run", watched)
    read_weights(pair[0])
    assert seen
    assert not any("canary" in value for value in seen[0].values())
    assert list((tmp_path / "temp").iterdir()) == []


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (lambda whole: half(whole), "its end is missing"),
        (lambda whole: whole[:200] + bytes(8) + whole[208:], "damaged"),
        (lambda whole: b"", "is empty"),
        (lambda whole: b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "is a web page"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (lambda whole: b"\x1f\x8b\x08" + bytes(40), "gzip"),
        (lambda whole: b"cposix\nsystem\n(S'touch canary'\ntR.", "is no PyTorch weight file"),
        (lambda whole: bytes(range(256)), "is no PyTorch weight file"),
        (lambda whole: b"\x80\x02garbage", "is no PyTorch weight file"),
        (lambda whole: plain_zip(), "is no PyTorch weight file"),
    ],
    ids=["half", "hole", "empty", "html", "lfs", "gzip", "protocol 0", "bytes", "bad pickle", "other zip"],
)
def test_what_is_no_whole_weight_file_is_refused_in_one_line(
    tmp_path: Path, pair: tuple[Path, Path], data: Callable[[bytes], bytes], said: str
) -> None:
    path = tmp_path / "netg_399.pth"
    path.write_bytes(data(pair[0].read_bytes()))
    with pytest.raises(ForeignFileError, match=said) as caught:
        read_weights(path)
    assert "\n" not in caught.value.message
    assert caught.value.hint


def plain_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("faces/0.txt", "a face")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.zeros(2)], "holds a list"),
        ({}, "an empty dictionary"),
        ({"args": {"lr": 1e-3}, "epoch": 3}, r"other things \(args, epoch\)"),
        ({"Gene.0.weight": torch.zeros(2, dtype=torch.int64)}, "Gene.0.weight is int64"),
        ({"Gene.0.weight": torch.tensor([1.0, float("nan")])}, "not finite, in Gene.0.weight"),
        ({"Gene.0.weight": torch.tensor([1.0, 1e300], dtype=torch.float64)}, "not finite"),
        ({"Gene.0.weight": torch.zeros(1).expand(10**12)}, "more than 2 GiB"),
        ({"Gene.0.weight": torch.zeros(3, device="meta")}, "of a kind"),
        ({"\x1b[31mred\n": torch.tensor([float("inf")])}, r"in \\x1b\[31mred\\n$"),
    ],
    ids=[
        "list",
        "empty",
        "training state",
        "integers",
        "nan",
        "overflow",
        "expanded",
        "meta",
        "control characters",
    ],
)
def test_a_pickle_of_other_things_is_refused_by_what_it_holds(
    tmp_path: Path, content: Any, said: str
) -> None:
    torch.save(content, tmp_path / "g.pth")
    with pytest.raises(ForeignFileError, match=said):
        read_weights(tmp_path / "g.pth")


def test_a_path_that_leads_nowhere_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no file"):
        read_weights(tmp_path / "netg_399.pth")
    (tmp_path / "file").touch()
    with pytest.raises(NotFoundError):
        read_weights(tmp_path / "file" / "netg_399.pth")


def test_folders_pipes_and_huge_files_are_refused_without_reading(tmp_path: Path) -> None:
    with pytest.raises(ForeignFileError, match="is a folder"):
        read_weights(tmp_path)
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(ForeignFileError, match="not a plain file"):
        read_weights(tmp_path / "pipe.pth")
    with open(tmp_path / "giant.pth", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ForeignFileError, match=r"2\.1 GB"):
        read_weights(tmp_path / "giant.pth")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (lambda whole: (2**40).to_bytes(8, "little") + whole[8:], "its header claims 1099511627776 bytes"),
        (lambda whole: whole[:-10], "damaged"),
        (lambda whole: whole[:8] + b"{" + bytes(whole[0] - 1) + whole[8 + whole[0] :], "damaged"),
    ],
    ids=["endless header", "cut short", "no JSON"],
)
def test_damaged_safetensors_are_refused(tmp_path: Path, data: Callable[[bytes], bytes], said: str) -> None:
    save_file({"Gene.0.weight": torch.ones(8)}, tmp_path / "good.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(data((tmp_path / "good.safetensors").read_bytes()))
    with pytest.raises(ForeignFileError, match=said):
        read_weights(tmp_path / "bad.safetensors")


def test_safetensors_with_a_value_that_is_not_finite_are_refused(tmp_path: Path) -> None:
    save_file({"Gene.0.weight": torch.tensor([float("inf")])}, tmp_path / "g.safetensors")
    with pytest.raises(ForeignFileError, match=r"not finite, in Gene\.0\.weight"):
        read_weights(tmp_path / "g.safetensors")


# --- weights that do not belong together ------------------------------------------------------


def test_a_pair_in_the_wrong_order_is_refused_with_the_right_one(pair: tuple[Path, Path]) -> None:
    with pytest.raises(ForeignFileError, match="holds a discriminator instead of a generator") as caught:
        load_origin(pair[1], pair[0])
    assert "NETG NETD" in str(caught.value.hint)
    with pytest.raises(ForeignFileError, match="holds a generator instead of a discriminator"):
        load_origin(pair[0], pair[0])
    with pytest.raises(ForeignFileError, match="holds a discriminator instead of a generator"):
        load_origin(pair[1])


def test_networks_that_know_classes_are_refused_by_that_word(tmp_path: Path) -> None:
    arch = Architecture(size=24, nz=6, ngf=4, ndf=4, classes=3)
    torch.save(arch.build_generator(0).state_dict(), tmp_path / "g.pth")
    with pytest.raises(ForeignFileError, match="class-conditional network") as caught:
        load_origin(tmp_path / "g.pth")
    assert "--class" in str(caught.value.hint)


def test_networks_for_different_sizes_are_refused(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    torch.save(Architecture(size=16, ndf=4).build_discriminator().state_dict(), tmp_path / "d.pth")
    with pytest.raises(ForeignFileError, match=r"images of 24×24, .* judges 16×16"):
        load_origin(pair[0], tmp_path / "d.pth")
