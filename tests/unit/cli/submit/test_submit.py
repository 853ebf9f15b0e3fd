"""`ganq submit`: what is refused before it is accepted, and what exactly is accepted."""

import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from safetensors.torch import save_file

from cli.submit.plan import PROCESS_BYTES, checkpoint_bytes, memory_bytes, training_plan
from ganq.submission.preflight import count_images
from jobs.networks.dcgan import Architecture
from jobs.recipes import DEFAULT_RECIPE, RECIPES
from jobs.specs import GenerateSpec, TrainSpec
from storage.datasets.cache import open_images
from storage.datasets.sources import Reading
from storage.volume.layout import Volume

if TYPE_CHECKING:
    from tables import Claimer
    from unit.conftest import Ganq

    from storage.db.engine import Database
    from storage.db.queries import Queries
    from storage.db.rows import Job, Lease, WorkerIdentity
    from storage.db.store import JobStore
    from storage.settings import Settings

# --- train --------------------------------------------------------------------------------


def test_a_training_is_accepted_with_the_default_recipe_and_redis_away_is_a_notice(
    ganq: "Ganq", queries: "Queries", image_folder: Path
) -> None:
    said = ganq("submit", "train", "--data", image_folder, "--name", "faces")
    assert said.code == 0
    assert "job 1 (faces): train accepted, queued" in said.out
    assert "job 1 is accepted" in said.err
    assert "no worker is running" in said.err
    job = queries.get(1)
    assert (job.name, job.kind, job.user, job.queue, job.priority) == (
        "faces",
        "train",
        "tester",
        "default",
        0,
    )
    assert job.spec == TrainSpec.create(data=str(image_folder), recipe=DEFAULT_RECIPE).to_json()


def test_no_notice_when_a_worker_listens_and_redis_is_there(
    ganq: "Ganq", image_folder: Path, database: "Database", worker_identity: "WorkerIdentity", redis_url: str
) -> None:
    from storage.db.workers import WorkerStore

    WorkerStore(database, worker_identity).report("idle")
    said = ganq("submit", "train", "--data", image_folder)
    assert (said.code, said.err) == (0, "")


def test_a_queue_that_no_worker_serves_is_noticed(
    ganq: "Ganq", image_folder: Path, database: "Database", worker_identity: "WorkerIdentity"
) -> None:
    from storage.db.workers import WorkerStore

    WorkerStore(database, worker_identity).report("idle")
    said = ganq("submit", "train", "--data", image_folder, "--queue", "nights")
    assert "no running worker serves the queue nights" in said.err


TYPED = {
    "recipe": ("--recipe", "dcgan", "dcgan"),
    "size": ("--size", "64", 64),
    "batch": ("--batch", "16", 16),
    "epochs": ("--epochs", "7", 7),
    "lr_g": ("--lr-g", "1e-3", 1e-3),
    "lr_d": ("--lr-d", "1e-3", 1e-3),
    "beta1": ("--beta1", "0.4", 0.4),
    "beta2": ("--beta2", "0.9", 0.9),
    "nz": ("--nz", "64", 64),
    "ngf": ("--ngf", "16", 16),
    "ndf": ("--ndf", "16", 16),
    "d_every": ("--d-every", "2", 2),
    "g_every": ("--g-every", "3", 3),
    "save_every": ("--save-every", "9", 9),
    "seed": ("--seed", "11", 11),
    "loader_workers": ("--num-workers", "2", 2),
    "device": ("--device", "cpu", "cpu"),
    "loss": ("--loss", "nonsaturating", "nonsaturating"),
    "norm_d": ("--norm-d", "spectral", "spectral"),
    "arch": ("--arch", "dcgan", "dcgan"),
    "patch_size": ("--patch-size", "6", 6),
    "full_res_conv": ("--full-res-conv", None, True),
    "antialias": ("--antialias", None, True),
    "skips": ("--skips", None, True),
    "r1_gamma": ("--r1-gamma", "2", 2.0),
    "r2_gamma": ("--r2-gamma", "0.5", 0.5),
    "penalty_every": ("--penalty-every", "16", 16),
    "lr_end": ("--lr-end", "0.25", 0.25),
    "gamma_end": ("--gamma-end", "0.1", 0.1),
    "beta2_end": ("--beta2-end", "0.99", 0.99),
    "fake_reuse": ("--fake-reuse", "until-g-step", "until-g-step"),
    "ema_half_life_kimg": ("--ema-half-life-kimg", "5", 5.0),
    "augment": ("--augment", "cutout,color", ["cutout", "color"]),
    "augment_p": ("--augment-p", "0.5", 0.5),
    "ada_target": ("--ada-target", "0.6", 0.6),
    "ada_kimg": ("--ada-kimg", "500", 500.0),
    "mirror": ("--mirror", None, True),
    "max_skip": ("--max-skip", "0.2", 0.2),
    "keep_duplicates": ("--keep-duplicates", None, True),
    "white_level": ("--white-level", "4095", 4095.0),
    "max_unpacked_gb": ("--max-unpacked-gb", "200", 200.0),
    "fit": ("--fit", "pad", "pad"),
    "grey": ("--grey", None, True),
    "checkpoint_seconds": ("--checkpoint-seconds", "30", 30.0),
    "precision": ("--precision", "bf16", "bf16"),
    "keep_last": ("--keep-last", "4", 4),
    "keep_every": ("--keep-every", "50", 50),
    "keep_best": ("--keep-best", "3", 3),
    "metric": ("--metric", "swd", "swd"),
    "feature_network": ("--feature-network", "random", "random"),
    "eval_every": ("--eval-every", "2", 2),
    "eval_samples": ("--eval-samples", "99", 99),
    "patience": ("--patience", "3", 3),
    "stop_after": ("--stop-after", "5", "5-epochs"),
    "deterministic": ("--no-deterministic", None, False),
    "cuda_graphs": ("--no-cuda-graphs", None, False),
}
ELSEWHERE = {
    "conditional",
    "data",
    "feature_sha256",
    "init_netg",
    "init_netd",
    "init_from",
    "freeze_d",
    "freeze_g",
    "progressive",  # needs a run that reaches full size, and implies --skips
    "continue_from",
    "reader",
}


def test_the_table_of_typed_options_holds_every_field() -> None:
    assert set(TYPED) | ELSEWHERE == set(TrainSpec.model_fields)


@pytest.mark.parametrize("field", TYPED)
def test_each_option_reaches_its_field_and_no_other(ganq: "Ganq", image_folder: Path, field: Any) -> None:
    flag, value, expected = TYPED[field]
    typed = [flag] if value is None else [flag, value]
    # --recipe dcgan alone would want batches of 256.
    said = ganq("submit", "train", "--data", image_folder, "--batch", 8, *typed, "--dry-run", "--json")
    assert said.code == 0, said.err
    base = {"batch": 8, "recipe": "dcgan" if field == "recipe" else DEFAULT_RECIPE}
    plain = TrainSpec.create(data=str(image_folder), **base).to_json()
    follows = {"ndf": expected} if field == "ngf" else {}
    assert said.json()["spec"] == {**plain, **follows, field: expected}


def test_a_feature_network_may_be_a_file_that_is_stated_by_its_checksum(
    ganq: "Ganq", image_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "net.pth"
    file.write_bytes(b"weights")
    typed = (
        "submit",
        "train",
        "--data",
        image_folder,
        "--batch",
        8,
        "--feature-network",
        file,
        "--dry-run",
        "--json",
    )
    said = ganq(*typed)
    assert (said.code, "also needs --feature-sha256" in said.err) == (2, True)
    spec = ganq(*typed, "--feature-sha256", "A" * 64).json()["spec"]
    assert (spec["feature_network"], spec["feature_sha256"]) == (str(file), "a" * 64)
    file.unlink()
    said = ganq(*typed, "--feature-sha256", "A" * 64)
    assert (said.code, "neither a built-in network" in said.err) == (3, True)


def test_augment_none_turns_the_recipes_policies_off(ganq: "Ganq", image_folder: Path) -> None:
    said = ganq("submit", "train", "--data", image_folder, "--augment", "none", "--dry-run", "--json")
    assert said.json()["spec"]["augment"] == []
    assert RECIPES[DEFAULT_RECIPE].defaults["augment"]


BAD = {
    "an impossible size": (("--size", 50), 2, "images of 50×50 cannot be made", "--size 48 or --size 64"),
    "a size beyond the largest": (("--size", 4096), 2, "cannot be made", "--size 1024 or --size 1536"),
    "a batch of one": (("--batch", 1), 2, "--batch", None),
    "no epochs": (("--epochs", 0), 2, "--epochs", None),
    "a rate that is no number": (("--lr-g", "nan"), 2, "--lr-g", None),
    "an unknown recipe": (("--recipe", "magic"), 2, "'magic'", None),
    "an unknown policy": (
        ("--augment", "blur"),
        2,
        "'--augment': 'blur' is not one of translation, color, cutout, auto, none",
        None,
    ),
    "a policy without a name": (("--augment", ""), 2, "'' is not one of translation, color", None),
    "no policy and one": (("--augment", "none,color"), 2, "none cannot be combined", None),
    "a game that does not fit": (
        ("--loss", "bce"),
        2,
        "--norm-d none gives logits",
        "--loss nonsaturating",
    ),
    "a batch larger than the set": (
        ("--batch", 71),
        1,
        "70 images, fewer than one batch of 71",
        "--batch 70",
    ),
    "weights that are not there": (("--init-netg", "/nowhere/netg.pth"), 3, "/nowhere/netg.pth", None),
    "a name of digits": (("--name", "12"), 2, "cannot be a name", None),
    "a name with a slash": (("--name", "../x"), 2, "cannot be a name", None),
    "a queue with a space": (("--queue", "a b"), 2, "--queue", None),
    "a job before it that is not there": (("--after", 99), 3, "there is no job 99", None),
    "waiting for a held job": (("--hold", "--wait"), 2, "never return", None),
    "a priority out of range": (("--priority", 10**9), 2, "--priority", None),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_one_line_and_no_row(
    ganq: "Ganq", queries: "Queries", image_folder: Path, case: Any
) -> None:
    typed, code, message, hint = BAD[case]
    said = ganq("submit", "train", "--data", image_folder, *typed)
    assert said.code == code, said.err
    first, *rest = said.err.splitlines()
    assert message in first
    assert hint is None or hint in rest[0]
    assert sum(queries.counts().values()) == 0
    assert ganq("submit", "train").code == 2, "a refused data set must not become the default"


def test_no_data_set_names_both_ways_out(ganq: "Ganq") -> None:
    said = ganq("submit", "train")
    assert said.code == 2
    assert "--data DIR" in said.err
    assert "ganq dataset make" in said.err


@pytest.mark.parametrize("what", ["missing", "empty", "a text file", "a broken zip"])
def test_data_that_is_none_is_refused(ganq: "Ganq", queries: "Queries", tmp_path: Path, what: str) -> None:
    path = tmp_path / "data"
    if what == "empty":
        path.mkdir()
    elif what == "a text file":
        path.write_text("hello")
    elif what == "a broken zip":
        path = tmp_path / "data.zip"
        path.write_bytes(b"PK but not really")
    said = ganq("submit", "train", "--data", path)
    assert said.code == (3 if what == "missing" else 1)
    assert str(path) in said.err.splitlines()[0]
    assert "→" in said.err
    assert sum(queries.counts().values()) == 0


def test_the_data_set_used_last_is_the_default_and_ganq_data_comes_before_it(
    ganq: "Ganq", queries: "Queries", image_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ganq("submit", "train", "--data", image_folder)
    assert ganq("submit", "train").code == 0
    assert queries.get(2).spec["data"] == str(image_folder)
    other = tmp_path / "other"
    image_folder.rename(other)
    assert ganq("submit", "train").code == 3
    monkeypatch.setenv("GANQ_DATA", str(other))
    assert ganq("submit", "train").code == 0
    assert queries.get(3).spec["data"] == str(other)


def test_a_relative_path_is_made_absolute(
    ganq: "Ganq", queries: "Queries", image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(image_folder.parent)
    weights = image_folder.parent / "netg.ckpt"  # any suffix: the contents tell the format
    weights.touch()
    assert ganq("submit", "train", "--data", "faces", "--init-netg", "netg.ckpt").code == 0
    spec = queries.get(1).spec
    assert (spec["data"], spec["init_netg"]) == (str(image_folder), str(weights))


def test_images_are_counted_by_name_in_folders_zips_and_tars(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "notes.txt").touch()
    (image_folder / ".hidden.png").touch()
    (image_folder / "more").mkdir()
    (image_folder / "more" / "A.JPG").touch()
    assert count_images(str(image_folder), Reading()) == 71
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for file in image_folder.rglob("*"):
            archive.write(file, file.relative_to(tmp_path))
    assert count_images(str(tmp_path / "faces.zip"), Reading()) == 71
    with tarfile.open(tmp_path / "faces.tar.gz", "w:gz") as tar:
        tar.add(image_folder, "faces")
    assert count_images(str(tmp_path / "faces.tar.gz"), Reading()) == 71


def test_the_same_submit_key_gives_the_same_job(ganq: "Ganq", queries: "Queries", image_folder: Path) -> None:
    for _ in range(2):
        said = ganq("submit", "train", "--data", image_folder, "--submit-key", "nightly-7", "--json")
        assert said.json()["id"] == 1
    assert sum(queries.counts().values()) == 1


def test_a_repeated_submit_key_says_that_the_job_is_not_new(ganq: "Ganq", image_folder: Path) -> None:
    ganq("submit", "train", "--data", image_folder, "--name", "n")
    first, again = (
        ganq("submit", "train", "--data", image_folder, "--name", "n", "--submit-key", "nightly-7")
        for _ in range(2)
    )
    assert "job 2 (n): train accepted, queued" in first.out
    assert "n was job 1" in first.err
    assert "job 2 (n): train accepted earlier with this key, queued" in again.out
    assert "n was job 1" not in again.err

    sweep = ["submit", "train", "--data", image_folder, "--sweep", "seed=0-2", "--submit-key", "nightly-8"]
    accepted, again = (ganq(*sweep) for _ in range(2))
    ids = accepted.out.partition("3 jobs of kind train accepted, ")[2].splitlines()[0]
    assert f"3 jobs of kind train accepted earlier with this key, {ids}" in again.out


def test_name_priority_queue_user_hold_and_after_reach_the_row(
    ganq: "Ganq", queries: "Queries", image_folder: Path
) -> None:
    ganq("submit", "train", "--data", image_folder, "--name", "first")
    said = ganq(
        "submit",
        "train",
        "--data",
        image_folder,
        "--priority",
        -3,
        "--queue",
        "nights",
        "--user",
        "ada",
        "--hold",
        "--after",
        "first",
        "--json",
    )
    job = queries.get(2)
    assert (job.priority, job.queue, job.user, job.held, job.blockers) == (-3, "nights", "ada", True, 1)
    assert said.json()["status"] == "held"
    assert said.json()["waits_for"] == [1]


def test_a_dry_run_writes_nothing_at_all(bare_ganq: "Ganq", tmp_path: Path, image_folder: Path) -> None:
    said = bare_ganq("submit", "train", "--data", image_folder, "--epochs", 10, "--dry-run")
    assert said.code == 0
    assert "nothing was submitted" in said.out
    assert not (tmp_path / "new-home").exists()


def test_the_plan_counts_steps_as_the_tutorial_does() -> None:
    spec = TrainSpec.create(data="/x", recipe="dcgan", batch=256, epochs=400)
    plan = training_plan(spec, 16_000)
    # RECIPES: 62 batches an epoch, 24,800 steps of D, 13 of G an epoch.
    assert (plan["batches_per_epoch"], plan["steps_d"], plan["steps_g"]) == (62, 24_800, 5_200)
    assert plan["images_shown"] == 400 * 62 * 256


@pytest.mark.parametrize(("epochs", "save_every", "grids"), [(2, 5, 1), (4, 1, 4), (7, 5, 2), (10, 5, 2)])
def test_the_plan_counts_the_grid_of_the_last_epoch(epochs: int, save_every: int, grids: int) -> None:
    spec = TrainSpec.create(data="/x", batch=32, epochs=epochs, save_every=save_every)
    assert training_plan(spec, 320)["sample_grids"] == grids


def test_a_short_job_that_ended_before_its_first_heartbeat_is_one_to_estimate_from(
    ganq: "Ganq", trained: Callable[..., int], store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    model = trained()
    asked: tuple[Any, ...] = ("submit", "generate", "--from", model, "--count", 64, "--dry-run", "--json")
    assert ganq(*asked).json()["estimate_seconds"] is None
    spec = {"source": model, "checkpoint": "best"}
    store.succeed(running_job_factory(kind="generate", spec=spec), {"pictures": 8, "images_per_s": 32.0})
    assert ganq(*asked).json()["estimate_seconds"] == pytest.approx(2.0)
    asked = ("submit", "evaluate", model, "--count", 100, "--dry-run", "--json")
    assert ganq(*asked).json()["estimate_seconds"] is None
    spec = ganq(*asked).json()["spec"]
    store.succeed(running_job_factory(kind="evaluate", spec=spec), {"seconds": 7.5})
    assert ganq(*asked).json()["estimate_seconds"] == pytest.approx(7.5)
    assert ganq(*asked, "--count", 200).json()["estimate_seconds"] is None


def test_a_dry_run_estimates_from_the_rate_of_earlier_jobs(
    ganq: "Ganq", trained: Callable[..., int], image_folder: Path
) -> None:
    asked = (
        "submit",
        "train",
        "--data",
        image_folder,
        "--recipe",
        "sngan",
        "--size",
        24,
        "--ngf",
        8,
        "--ndf",
        8,
        "--batch",
        10,
        "--epochs",
        5,
    )
    assert ganq(*asked, "--dry-run", "--json").json()["estimate_seconds"] is None
    trained(rate=50.0)
    # 5 epochs of 70 images at 50 a second.
    assert ganq(*asked, "--dry-run", "--json").json()["estimate_seconds"] == pytest.approx(7.0)
    assert "about 7 s" in ganq(*asked, "--dry-run").out
    # The same networks at another pace: plain steps on a GPU, penalties.
    for other in ("--no-cuda-graphs", "--penalty-every 2", "--r2-gamma 1"):
        assert ganq(*asked, *other.split(), "--dry-run", "--json").json()["estimate_seconds"] is None


def test_the_bytes_of_a_checkpoint_are_those_of_networks_and_of_adams_moments() -> None:
    from jobs.networks.dcgan import Architecture

    spec = TrainSpec.create(data="/x", size=16, ngf=8, ndf=4, recipe="dcgan")
    arch = Architecture.of_spec(spec)
    numbers = sum(
        one.numel()
        for network in (arch.build_generator(), arch.build_discriminator())
        for one in network.state_dict().values()
    )
    assert checkpoint_bytes(spec) == 4 * 4 * numbers


def test_the_bytes_of_a_checkpoint_grow_with_the_moving_average() -> None:
    without = TrainSpec.create(data="/x", recipe="dcgan")
    assert checkpoint_bytes(without.model_copy(update={"ema_half_life_kimg": 5.0})) > checkpoint_bytes(
        without
    )


@pytest.mark.parametrize("size", [64, 128])
def test_the_memory_of_a_training_grows_with_size_batch_and_penalties(size: int) -> None:
    spec = TrainSpec.create(data="/x", recipe="rpgan", size=size, ngf=8)
    least = memory_bytes(spec.model_copy(update={"r1_gamma": 0.0, "r2_gamma": 0.0}))
    assert PROCESS_BYTES < least < memory_bytes(spec)
    assert memory_bytes(spec) < memory_bytes(spec.model_copy(update={"batch": 64}))
    assert memory_bytes(spec) < memory_bytes(spec.model_copy(update={"size": 2 * size}))


def test_a_dry_run_says_fit_memory_and_switches_and_refuses_a_schedule_after_the_end(
    ganq: "Ganq", image_folder: Path
) -> None:
    asked: tuple[Any, ...] = (
        "submit",
        "train",
        "--data",
        image_folder,
        "--size",
        64,
        "--batch",
        10,
        "--ngf",
        8,
    )
    asked = (*asked, "--dry-run", "--epochs", 2, "--progressive")
    said = ganq(*asked, "20,40")
    assert said.code == 0
    for line in (r"progressive +20,40\n", r"skips +True\n", r"fit +crop\n", r"memory_bytes +[0-9.]+ [MG]B\n"):
        assert re.search(line, said.out), line
    for switches, code, message in (
        ("20,1k", 2, "full size begins after 1,000 images, and --epochs 2 ends the run after 140"),
        ("20", 2, "images seen when half and when full size begins"),
        ("20,forty", 2, "not two counts of images"),
    ):
        said = ganq(*asked, switches)
        assert said.code == code
        assert message in said.err


def test_the_command_that_follows_drawn_faces_fits_them(ganq: "Ganq", tmp_path: Path) -> None:
    for size, count, options in ((48, 40, " --size 48"), (96, 5, " --batch 5"), (50, 40, "")):
        said = ganq("dataset", "make", tmp_path / f"{size}", "--size", size, "--count", count)
        assert f"next: ganq submit train --epochs 100{options}   (" in said.out


# --- train --continue ---------------------------------------------------------------------


def test_continue_copies_the_spec_and_continues_from_the_job(
    ganq: "Ganq", queries: "Queries", trained: Callable[..., int], image_folder: Path
) -> None:
    parent = trained(epochs=4, name="faces")
    said = ganq("submit", "train", "--continue", "faces", "--data", image_folder, "--epochs", 9)
    assert said.code == 0, said.err
    spec, old = queries.get(parent + 1).spec, queries.get(parent).spec
    changed = {"data": str(image_folder), "epochs": 9, "continue_from": parent}
    assert spec == {**old, **changed}


def test_continue_with_another_feature_network_lets_the_checksum_of_the_old_one_go(
    ganq: "Ganq", queries: "Queries", trained: Callable[..., int], image_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "net.pth"
    file.write_bytes(b"weights")
    go_on = ("submit", "train", "--data", image_folder, "--continue")
    of_file = ("--feature-network", file, "--feature-sha256", "A" * 64)
    parent = trained(epochs=4)
    assert ganq(*go_on, parent, "--epochs", 9, *of_file).code == 0
    said = ganq(*go_on, parent, "--epochs", 9, *of_file, "--dry-run", "--json")
    assert said.json()["spec"]["feature_sha256"] == "a" * 64
    # The one that was just accepted waits for nothing but a worker, and can be gone on from.
    said = ganq(*go_on, parent + 1, "--epochs", 12, "--feature-network", "random", "--dry-run", "--json")
    assert said.code == 0, said.err
    assert (said.json()["spec"]["feature_network"], said.json()["spec"]["feature_sha256"]) == ("random", None)


@pytest.mark.parametrize(
    ("typed", "code", "message"),
    [
        (("--epochs", 4), 2, "already has 4 epochs"),
        ((), 2, "already has 4 epochs"),
        (("--epochs", 9, "--size", 48), 2, "--size 48 (it has 24)"),
        (("--epochs", 9, "--recipe", "dcgan"), 2, "--recipe dcgan (it has sngan)"),
        (("--epochs", 9, "--lr-g", "0.1"), 2, "--lr-g 0.1 (it has 0.0004)"),
        (("--epochs", 9, "--mirror"), 2, "--mirror (it has --no-mirror)"),
        (("--epochs", 9, "--augment", "auto,color"), 2, "--augment auto,color (it has auto)"),
    ],
)
def test_continue_refuses_what_a_checkpoint_cannot_do(
    ganq: "Ganq",
    queries: "Queries",
    trained: Callable[..., int],
    image_folder: Path,
    typed: Any,
    code: int,
    message: str,
) -> None:
    parent = trained(epochs=4)
    said = ganq("submit", "train", "--continue", parent, "--data", image_folder, *typed)
    assert said.code == code
    assert message in said.err.splitlines()[0]
    assert sum(queries.counts().values()) == 1


def test_conditional_needs_folders_of_classes_with_two_images_each(
    ganq: "Ganq", queries: "Queries", image_folder: Path
) -> None:
    asked = ("submit", "train", "--data", image_folder, "--batch", 8, "--conditional")
    said = ganq(*asked)
    assert said.code == 1
    assert "these images have none" in said.err
    for name, count in (("a", 9), ("b", 1)):
        (image_folder / name).mkdir()
        for number in range(count):
            (image_folder / name / f"{number}.png").write_bytes(b"x")
    for one in image_folder.glob("*.*"):
        one.unlink()
    said = ganq(*asked)
    assert said.code == 1
    assert "the class 'b' has 1 image" in said.err
    (image_folder / "b" / "2.png").write_bytes(b"x")
    assert ganq(*asked).code == 0
    assert queries.get(1).spec["conditional"] is True
    drawn = ganq("submit", "generate", "--from", 1, "--count", 4, "--class", "b", "--dry-run", "--json")
    assert drawn.json()["spec"]["class_name"] == "b", "whether it knows b, only the training can tell"


def test_a_class_that_a_training_does_not_know_is_refused_once_it_has_read_its_images(
    ganq: "Ganq",
    store: "JobStore",
    settings: "Settings",
    tmp_path: Path,
    claim: "Claimer",
) -> None:
    for number, name in enumerate(("a", "a", "b", "b")):
        image = tmp_path / "faces" / name / f"{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24), (60 * number, 9, 9)).save(image)
    asked = ("--data", tmp_path / "faces", "--size", 24, "--batch", 2, "--conditional")
    assert ganq("submit", "train", *asked).code == 0
    lease = claim()
    images = open_images(Volume(settings.volume), str(tmp_path / "faces"), 24)
    store.pin_inputs(lease, {"fingerprint": images.fingerprint})
    said = ganq("submit", "generate", "--from", 1, "--count", 4, "--class", "happy")
    assert said.code == 2
    assert "classes: a, b" in said.err
    assert ganq("submit", "generate", "--from", 1, "--count", 4, "--class", "b").code == 0


def test_networks_of_two_classes_are_no_start_for_a_data_set_of_three(
    ganq: "Ganq",
    store: "JobStore",
    settings: "Settings",
    tmp_path: Path,
    claim: "Claimer",
) -> None:
    for place, name in enumerate("aabbcc"):
        for folder in ("two", "three") if name != "c" else ("three",):
            image = tmp_path / folder / name / f"{place}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (24, 24), (40 * place, 9, 9)).save(image)
    asked = ("--size", 24, "--batch", 2, "--conditional")
    assert ganq("submit", "train", "--data", tmp_path / "two", *asked).code == 0
    started = ("submit", "train", "--init-from", 1, "--batch", 2, "--data")
    assert ganq(*started, tmp_path / "three", "--dry-run").code == 0, "its images have not been read yet"
    images = open_images(Volume(settings.volume), str(tmp_path / "two"), 24)
    store.pin_inputs(claim(), {"fingerprint": images.fingerprint})
    said = ganq(*started, tmp_path / "three")
    assert said.code == 2
    assert "the networks of job 1 know 2 classes, and 3 are requested" in said.err
    assert ganq(*started, tmp_path / "two").code == 0


@pytest.mark.parametrize("option", ["--freeze-g", "--freeze-d"])
def test_so_many_frozen_layers_that_nothing_learns_are_refused_before_the_job(
    ganq: "Ganq", trained: Callable[..., int], image_folder: Path, option: str
) -> None:
    trained(name="faces")  # 24 pixels: three layers
    asked = ("submit", "train", "--init-from", "faces", "--data", image_folder, "--batch", 8, option)
    said = ganq(*asked, 3)
    assert said.code == 2
    assert f"{option} 3 leaves nothing to learn: the network has 3 layers" in said.err
    assert f"{option} 2 at most" in said.err
    assert ganq(*asked, 2).code == 0
    swept = ganq(*asked[:-1], "--sweep", f"{option[2:]}=1,3")
    assert swept.code == 2
    assert f"{option} 3 leaves nothing to learn" in swept.err


def test_a_dry_run_knows_the_jobs_that_it_would_wait_for(
    ganq: "Ganq", trained: Callable[..., int], image_folder: Path
) -> None:
    model = trained()
    for asked in (("train", "--data", image_folder), ("generate", "--count", 4), ("evaluate", model)):
        said = ganq("submit", *asked, "--after", "nosuch", "--dry-run")
        assert said.code == 3
        assert "nosuch" in said.err


def test_a_home_that_is_no_folder_is_reported_by_every_command(bare_ganq: "Ganq", tmp_path: Path) -> None:
    (tmp_path / "new-home").touch()
    for command in (("status",), ("submit", "generate", "--count", 1), ("up",)):
        said = bare_ganq(*command)
        assert said.code == 2
        assert "is not a folder" in said.err.splitlines()[0]


def test_a_class_is_refused_before_the_job_when_the_model_knows_none(
    ganq: "Ganq", trained: Callable[..., int]
) -> None:
    trained(epochs=4, name="faces")
    said = ganq("submit", "generate", "--from", "faces", "--count", 4, "--class", "happy")
    assert said.code == 2
    assert "needs a model that was trained with classes" in said.err


def test_the_model_of_a_generation_is_an_argument_or_from_but_not_both(
    ganq: "Ganq", queries: "Queries", trained: Callable[..., int]
) -> None:
    first, second = trained(epochs=4, name="faces"), trained(epochs=4, name="newer")
    assert ganq("submit", "generate", "faces", "--count", 4).code == 0
    assert queries.get(second + 1).spec["source"] == first
    said = ganq("submit", "generate", "faces", "--from", "newer", "--count", 4)
    assert (said.code, said.err.splitlines()[0]) == (2, "error: two jobs are given: faces and --from newer")


def test_init_from_takes_over_the_networks_and_begins_a_new_run(
    ganq: "Ganq", queries: "Queries", trained: Callable[..., int], image_folder: Path
) -> None:
    parent = trained(epochs=4, name="faces")
    asked = ("submit", "train", "--init-from", "faces", "--data", image_folder, "--batch", 8, "--freeze-d", 1)
    said = ganq(*asked, "--epochs", 2)
    assert said.code == 0, said.err
    spec = queries.get(parent + 1).spec
    assert (spec["init_from"], spec["size"], spec["ngf"], spec["recipe"]) == (parent, 24, 8, "sngan")
    assert (spec["epochs"], spec["freeze_d"], spec["continue_from"]) == (2, 1, None)
    refused = ganq(*asked, "--ngf", 16, "--size", 48)
    assert refused.code == 2
    assert "--size 48 (it has 24), --ngf 16 (it has 8)" in refused.err.splitlines()[0]
    both = ganq(*asked, "--continue", "faces")
    assert both.code == 2
    assert "use only one of them" in both.err


@pytest.mark.parametrize(
    ("networks", "recipe"),
    [
        (Architecture(size=24, nz=6, ngf=4, ndf=8), "dcgan"),
        (Architecture(size=24, nz=6, ngf=4, ndf=8, norm_d="spectral"), "sngan"),
        (Architecture(size=24, nz=6, ngf=4, ndf=8, norm_d="none", arch="balanced"), "rpgan"),
        (Architecture(size=24, nz=6, ngf=4, ndf=8, norm_d="none"), "rpgan"),
        (Architecture(size=24, nz=6, ngf=4, ndf=8, norm_d="none", arch="balanced", antialias=True), "rpgan"),
        (Architecture(size=64, nz=6, ngf=4, ndf=8, norm_d="none", arch="balanced", patch_size=4), "rpgan"),
        # rpgan has penalties, with which BatchNorm does not go.
        (Architecture(size=24, nz=6, ngf=4, ndf=8, norm_d="batch", arch="balanced"), "dcgan"),
    ],
    ids=[
        "the tutorial's",
        "sngan",
        "rpgan of 0.2",
        "rpgan with dcgan",
        "rpgan",
        "large patches",
        "dcgan with balanced",
    ],
)
def test_init_from_an_import_asks_for_its_networks_and_for_any_discriminator_where_it_has_none(
    ganq: "Ganq", queries: "Queries", image_folder: Path, tmp_path: Path, networks: Any, recipe: str
) -> None:
    save_file(networks.build_generator(1).state_dict(), tmp_path / "g.safetensors")
    save_file(networks.build_discriminator(1).state_dict(), tmp_path / "d.safetensors")
    assert ganq("import", tmp_path / "g.safetensors", tmp_path / "d.safetensors", "--name", "both").code == 0
    assert ganq("import", tmp_path / "g.safetensors", "--name", "alone").code == 0
    for name in ("both", "alone"):
        said = ganq("submit", "train", "--init-from", name, "--data", image_folder, "--batch", 8)
        assert said.code == 0, said.err

    whole = TrainSpec.from_json(queries.get(3).spec)
    assert (whole.recipe, Architecture.of_spec(whole)) == (recipe, networks)
    alone = TrainSpec.from_json(queries.get(4).spec)
    assert (alone.size, alone.nz, alone.ngf, alone.arch) == (networks.size, 6, 4, networks.arch)
    assert (alone.antialias, alone.patch_size) == (networks.antialias, networks.patch_size)
    assert (alone.ndf, alone.recipe) == (64, "rpgan" if networks.arch == "balanced" else "sngan")
    wider = ("submit", "train", "--init-from", "alone", "--data", image_folder, "--batch", 8, "--ndf", 16)
    assert ganq(*wider, "--norm-d", alone.norm_d).code == 0
    assert "--ndf 16 (it has 8)" in ganq(*wider[:3], "both", *wider[4:]).err


def test_init_from_waits_for_a_training_and_refuses_what_has_no_networks(
    ganq: "Ganq", queries: "Queries", store: "JobStore", image_folder: Path
) -> None:
    ganq("submit", "train", "--data", image_folder, "--epochs", 4)
    assert ganq("submit", "train", "--init-from", 1, "--data", image_folder).code == 0
    assert queries.needs(2)[0][0] == 1
    ganq("submit", "generate", "--from", 1, "--count", 4)
    said = ganq("submit", "train", "--init-from", 3, "--data", image_folder)
    assert said.code == 2
    assert "is of kind generate and has no networks" in said.err
    store.request_cancel(1)
    said = ganq("submit", "train", "--init-from", 1, "--data", image_folder)
    assert said.code == 3
    assert "left no checkpoint" in said.err


def test_continue_waits_for_a_training_that_has_not_ended(
    ganq: "Ganq", queries: "Queries", image_folder: Path
) -> None:
    ganq("submit", "train", "--data", image_folder, "--epochs", 4)
    said = ganq("submit", "train", "--continue", 1, "--epochs", 8)
    assert said.code == 0
    assert "this job starts after it" in said.err
    assert queries.needs(2)[0][0] == 1


def test_a_model_without_a_checkpoint_names_an_older_one_of_its_name(
    ganq: "Ganq", store: "JobStore", trained: Callable[..., int]
) -> None:
    older = trained(name="heads")
    retried = ganq("retry", "heads", "--json").json()[0]["id"]
    store.request_cancel(retried)
    said = ganq("submit", "generate", "heads", "--count", 4)
    assert said.code == 3
    assert f"job {retried} has been cancelled and left no checkpoint" in said.err
    assert f"name job {older}, which has the same name" in said.err


def test_continue_needs_a_checkpoint(ganq: "Ganq", store: "JobStore", image_folder: Path) -> None:
    ganq("submit", "train", "--data", image_folder)
    store.request_cancel(1)
    said = ganq("submit", "train", "--continue", 1, "--epochs", 800)
    assert said.code == 3
    assert "left no checkpoint" in said.err


# --- generate -----------------------------------------------------------------------------

GENERATE_TYPED = {
    "count": ("--count", "9", 9),
    "checkpoint": ("--checkpoint", "last", "last"),
    "seed": ("--seed", "5", 5),
    "shard_size": ("--shard-size", "640", 640),
    "max_workers": ("--max-workers", "3", 3),
    "noise_mean": ("--noise-mean", "0.5", 0.5),
    "noise_std": ("--noise-std", "0.8", 0.8),
    "format": ("--format", "npz", "npz"),
    "grid": ("--grid", "16", 16),
    "grid_pages": ("--grid-pages", "2", 2),
    "micro_batch": ("--micro-batch", "32", 32),
    "device": ("--device", "cpu", "cpu"),
    "deterministic": ("--no-deterministic", None, False),
    "grid_epochs": ("--grid-epochs", None, True),
    "reject": ("--reject", "0.5", 0.5),
    "truncation": ("--truncation", "0.7", 0.7),
    "out": ("--out", "/tmp/pictures-of-ganq", "/tmp/pictures-of-ganq"),
}


OF_THEIR_OWN = {
    "class_name",
    "source",
    "seeds",
    "keep",
    "of",
    "draws",
    "layout",
    "quality",
    "interpolate",
    "frames",
    "passport",
}


def test_the_table_of_generate_options_holds_every_field() -> None:
    assert set(GENERATE_TYPED) | OF_THEIR_OWN == set(GenerateSpec.model_fields)


@pytest.mark.parametrize("field", GENERATE_TYPED)
def test_each_generate_option_reaches_its_field_and_no_other(
    ganq: "Ganq", trained: Callable[..., int], field: Any
) -> None:
    source = trained()
    flag, value, expected = GENERATE_TYPED[field]
    typed = [flag] if value is None else [flag, value]
    said = ganq("submit", "generate", "--count", 4, *typed, "--dry-run", "--json")
    assert said.code == 0, said.err
    assert said.json()["spec"] == {**GenerateSpec.create(source=source, count=4).to_json(), field: expected}


def test_a_lossy_format_may_have_a_quality(ganq: "Ganq", trained: Callable[..., int]) -> None:
    trained()
    said = ganq(
        "submit", "generate", "--count", 4, "--format", "jpeg", "--quality", 80, "--dry-run", "--json"
    )
    assert (said.json()["spec"]["format"], said.json()["spec"]["quality"]) == ("jpeg", 80)


def test_seeds_are_numbers_and_ranges(ganq: "Ganq", trained: Callable[..., int]) -> None:
    trained()
    said = ganq("submit", "generate", "--seeds", "0,4-6", "--dry-run", "--json").json()
    assert said["spec"]["seeds"] == [[0, 0], [4, 6]]
    assert said["plan"]["images_kept"] == 4


def test_a_latent_path_has_image_numbers_and_frames(ganq: "Ganq", trained: Callable[..., int]) -> None:
    trained()
    said = ganq(
        "submit", "generate", "--interpolate", "3, 17,42", "--frames", 7, "--dry-run", "--json"
    ).json()
    assert (said["spec"]["interpolate"], said["spec"]["frames"]) == ([3, 17, 42], 7)
    assert said["plan"]["images_kept"] == 7
    said = ganq("submit", "generate", "--interpolate", "3,17,42", "--dry-run", "--json").json()
    assert said["plan"]["images_kept"] == 120


def test_a_video_without_its_library_names_the_extra(
    ganq: "Ganq", trained: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained()
    monkeypatch.setattr("cli.submit.generate.find_spec", lambda name: None)
    said = ganq("submit", "generate", "--interpolate", "3,17")
    assert said.code == 0
    assert "pip install 'ganq[video]'" in said.err


def test_keep_of_is_the_tutorials_best_of_many(
    ganq: "Ganq", queries: "Queries", trained: Callable[..., int]
) -> None:
    source = trained()
    assert ganq("submit", "generate", "--keep", 64, "--of", 512).code == 0
    job = queries.get(source + 1)
    assert (job.spec["keep"], job.spec["of"], job.priority) == (64, 512, 10)


BAD_GENERATE = {
    "no number of images": ((), 2, "exactly one way"),
    "two ways to count": (("--count", 3, "--seeds", "1-2"), 2, "exactly one way"),
    "keep without of": (("--keep", 3), 2, "--keep and --of must be given together"),
    "more kept than drawn": (("--keep", 9, "--of", 3), 2, "--keep 9 is more than --of 3"),
    "none": (("--count", 0), 2, "--count"),
    "less than none": (("--count", -1), 2, "--count"),
    "a million millions": (("--count", 10**12), 2, "less than or equal to 100000000"),
    "the best of a million millions": (("--keep", 1, "--of", 10**12), 2, "--of"),
    "a shard of none": (("--count", 1, "--shard-size", 0), 2, "--shard-size"),
    "a format that is none": (("--count", 1, "--format", "gif"), 2, "'tar', 'npz'"),
    "two formats": (("--count", 1, "--format", "png", "--format", "tar"), 2, "twice: png and tar"),
    "a quality of what loses nothing": (("--count", 1, "--quality", 90), 2, "png is lossless"),
    "a range backwards": (("--seeds", "6-4"), 2, "--seeds 6-4"),
    "a way of words": (("--interpolate", "3,x"), 2, "'x' is not an image index"),
    "a way to nowhere": (("--interpolate", "3"), 2, "not a path"),
    "a range of words": (("--seeds", "a-b"), 2, "'a-b'"),
    "a checkpoint that is none": (("--count", 1, "--checkpoint", "newest"), 2, "is not a checkpoint"),
    "an epoch that was not kept": (("--count", 1, "--checkpoint", "3"), 3, "no checkpoint of epoch 3"),
    "a path of weights": (("--count", 1, "--from", "/x/netg_399.pth"), 2, "is a path"),
    "a job that is not there": (("--count", 1, "--from", "nobody"), 3, "no job named 'nobody'"),
}


@pytest.mark.parametrize("case", BAD_GENERATE)
def test_a_bad_generation_is_one_line_and_no_row(
    ganq: "Ganq", queries: "Queries", trained: Callable[..., int], case: Any
) -> None:
    trained()
    typed, code, message = BAD_GENERATE[case]
    said = ganq("submit", "generate", *typed)
    assert said.code == code, said.err
    assert message in said.err.splitlines()[0]
    assert sum(queries.counts().values()) == 1


def test_a_path_is_refused_with_the_command_that_imports_it(
    ganq: "Ganq", trained: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained()
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    said = ganq("submit", "generate", "--from", "weights", "--count", 1)
    assert said.code == 2
    assert "ganq import weights --name NAME" in said.err


def test_an_out_that_is_a_file_is_refused(ganq: "Ganq", trained: Callable[..., int], tmp_path: Path) -> None:
    trained()
    (tmp_path / "out").touch()
    said = ganq("submit", "generate", "--count", 1, "--out", tmp_path / "out")
    assert said.code == 2
    assert "is a file" in said.err


def test_generation_waits_for_a_training_that_has_not_ended_and_says_so(
    ganq: "Ganq", queries: "Queries", image_folder: Path
) -> None:
    ganq("submit", "train", "--data", image_folder, "--epochs", 5)
    said = ganq("submit", "generate", "--count", 2)
    assert said.code == 0
    assert "job 1 is queued: this job starts after it" in said.err
    assert [needed for needed, _ in queries.needs(2)] == [1]
    assert "waiting on 1" in ganq("status").out
    said = ganq("submit", "generate", "--count", 2, "--checkpoint", 6)
    assert said.code == 3
    assert "ends at epoch 5" in said.err


def test_now_takes_the_latest_checkpoint_of_a_running_training(
    ganq: "Ganq", queries: "Queries", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    lease = running_job_factory(spec=TrainSpec.create(data="/pictures").to_json())
    said = ganq("submit", "generate", "--count", 2, "--now")
    assert said.code == 3, "there is none yet"
    store.register_checkpoint(
        lease,
        kind="epoch",
        epoch=5,
        step=50,
        path="jobs/000001/a1/checkpoints/epoch-0005",
        manifest_sha256="0" * 64,
        size=10,
    )
    assert ganq("submit", "generate", "--count", 2, "--now").code == 0
    job = queries.get(2)
    assert job.spec["checkpoint"] == "last"
    assert job.blockers == 0


def test_a_failed_training_with_checkpoints_can_be_drawn_from_without_waiting(
    ganq: "Ganq", queries: "Queries", trained: Callable[..., int]
) -> None:
    source = trained(end="fail")
    assert ganq("submit", "generate", "--from", source, "--count", 2).code == 0
    assert queries.get(source + 1).blockers == 0


def test_a_failed_training_without_checkpoints_cannot(
    ganq: "Ganq", store: "JobStore", job_factory: "Callable[..., Job]"
) -> None:
    store.request_cancel(job_factory().id)
    said = ganq("submit", "generate", "--from", 1, "--count", 2)
    assert said.code == 3
    assert "job 1 has been cancelled and left no checkpoint" in said.err
    assert "ganq retry 1" in said.err


def test_a_generation_is_no_model_and_its_own_source_is_named(
    ganq: "Ganq", trained: Callable[..., int]
) -> None:
    source = trained()
    ganq("submit", "generate", "--count", 2)
    said = ganq("submit", "generate", "--from", source + 1, "--count", 2)
    assert said.code == 2
    assert f"--from {source}" in said.err


def test_wait_exits_with_the_jobs_outcome(
    ganq: "Ganq", image_folder: Path, store: "JobStore", queries: "Queries"
) -> None:
    import threading
    import time

    def cancel() -> None:
        while not sum(queries.counts().values()):
            time.sleep(0.02)
        store.request_cancel(1)

    other = threading.Thread(target=cancel)
    other.start()
    said = ganq("submit", "train", "--data", image_folder, "--wait")
    other.join()
    assert said.code == 1
    assert "job 1 was cancelled" in said.err
