"""What a person may ask for, and what is refused with one line and a way out."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jobs.recipes
from jobs.context import PLAIN_NAMES
from jobs.errors import SpecError
from jobs.recipes import DEFAULT_RECIPE, RECIPES
from jobs.specs import GenerateSpec, ImportSpec, TrainSpec, check_name, size_plan
from jobs.specs.base import MAX_COUNT, MAX_SEED
from jobs.specs.generate import MAX_SHARDS

SIZES = sorted({side * 2**k for side in (8, 12) for k in range(1, 8)})


def refused(make: Any, *args: Any, **options: Any) -> SpecError:
    with pytest.raises(SpecError) as caught:
        make(*args, **options)
    line = str(caught.value)
    assert line == caught.value.message
    assert "\n" not in line + (caught.value.hint or "")
    assert line.isprintable()
    assert caught.value.exit_code == 2
    return caught.value


# --- sizes ------------------------------------------------------------------------------------


@given(st.integers(-10, 5000))
def test_a_size_is_reached_by_the_layers_or_refused_with_sizes_that_are(size: Any) -> None:
    try:
        doublings, patch_size = size_plan(size)
    except SpecError as exc:
        assert size not in SIZES
        near = [int(part.split()[0]) for part in (exc.hint or "").split("(")[0].split("--size ")[1:]]
        assert len(near) == 2
        assert all(size_plan(one) for one in near)
    else:
        # 4×4 from the first layer, doubled, and at last tripled or doubled once more.
        assert 4 * 2**doublings * patch_size == size
        assert patch_size in (2, 3)
        assert doublings >= 1


def test_the_sizes_people_use_are_there() -> None:
    assert {32, 48, 64, 96, 128, 192, 256, 512} < set(SIZES)
    assert size_plan(96) == (3, 3)
    assert size_plan(64) == (3, 2)


@given(st.sampled_from(SIZES), st.integers(-1, 10))
def test_a_patch_size_is_reached_by_the_layers_or_refused_with_those_that_are(
    size: Any, patch_size: int
) -> None:
    try:
        doublings, patch = size_plan(size, patch_size)
    except SpecError as exc:
        named = (exc.hint or "").removeprefix("--patch-size ").removesuffix(" fits, or omit it")
        fitting = {int(one) for one in named.split(" or ")}
        assert patch_size not in fitting
        assert {size_plan(size, one)[1] for one in fitting} == fitting
    else:
        assert 4 * 2**doublings * patch == size
        assert patch == patch_size or patch_size == 0


def test_a_patch_size_that_is_the_usual_one_is_the_same_network() -> None:
    assert TrainSpec.create(data="/p", size=128, patch_size=2).patch_size == 0
    assert TrainSpec.create(data="/p", patch_size=3).patch_size == 0
    assert TrainSpec.create(data="/p", size=128, patch_size=4).patch_size == 4
    assert "--patch-size 3 or 6 fits" in (refused(TrainSpec.create, data="/p", patch_size=4).hint or "")


def test_a_recipe_has_its_own_defaults_at_one_size_which_options_and_given_networks_override() -> None:
    plain = TrainSpec.create(data="/p", recipe="rpgan", size=128)
    large = TrainSpec.create(data="/p", recipe="rpgan", size=256)
    differ = {name for name, value in large.to_json().items() if value != plain.to_json()[name]}
    assert differ == {"size", *RECIPES["rpgan"].by_size[256]}
    given = TrainSpec.create(data="/p", recipe="rpgan", size=256, patch_size=0, r1_gamma=2)
    assert (given.patch_size, given.r1_gamma, given.r2_gamma) == (0, 2, large.r2_gamma)
    weights = TrainSpec.create(data="/p", recipe="rpgan", size=256, init_netg="/old/netg.pth")
    assert (weights.patch_size, weights.antialias) == (0, False), "any program can have made them"
    assert weights.r1_gamma == large.r1_gamma
    assert TrainSpec.create(data="/p", recipe="dcgan", size=256).patch_size == 0


def test_a_size_that_is_near_names_its_two_neighbours() -> None:
    error = refused(TrainSpec.create, data="/p", size=100)
    assert (error.hint or "").startswith("--size 96 or --size 128 work")


# --- JSON -------------------------------------------------------------------------------------

plain_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
rates = st.floats(1e-9, 1, allow_nan=False)
augments = st.lists(st.sampled_from(["translation", "color", "cutout"]), max_size=3).map(tuple)

# (arch, loss, norm_d, weight of R1) that go together.
pairs = st.sampled_from(
    [
        ("dcgan", "bce", "batch", 0.0),
        ("dcgan", "hinge", "spectral", 2.0),
        ("dcgan", "nonsaturating", "none", 0.5),
        ("dcgan", "relativistic", "spectral", 0.0),
        ("balanced", "relativistic", "none", 1.0),
        ("balanced", "bce", "batch", 0.0),
        ("resnet", "relativistic", "none", 1.0),
        ("resnet", "hinge", "none", 0.0),
    ]
)


def with_pair(pair: tuple[str, str, str, float], **rest: Any) -> TrainSpec:
    arch, loss, norm_d, gamma = pair
    return TrainSpec.create(arch=arch, loss=loss, norm_d=norm_d, r1_gamma=gamma, r2_gamma=gamma, **rest)


train_specs = st.builds(
    with_pair,
    pair=pairs,
    data=plain_text,
    recipe=st.sampled_from(sorted(RECIPES)),
    size=st.sampled_from(SIZES),
    batch=st.integers(2, 8192),
    epochs=st.integers(1, 10**6),
    lr_g=rates,
    lr_d=rates,
    beta1=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, MAX_SEED),
    fake_reuse=st.sampled_from(["until-g-step", "none"]),
    ema_half_life_kimg=st.floats(0, 1e6),
    augment=augments,
    mirror=st.booleans(),
    checkpoint_seconds=st.floats(1e-3, 1e9),
    init_netg=st.none() | plain_text,
    continue_from=st.none() | st.integers(1, 10**9),
)


def apart(ranges: list[tuple[int, int]]) -> bool:
    """Whether no image is named twice."""
    ends = sorted(ranges)
    return all(last < first for (_, last), (first, _) in pairwise(ends))


ranges = st.tuples(st.integers(0, 10**6), st.integers(0, 10**4)).map(lambda pair: (pair[0], sum(pair)))
keeps = st.tuples(st.integers(1, 10**4), st.integers(0, 10**4)).map(
    lambda pair: {"keep": pair[0], "of": sum(pair)}
)
amounts = (
    st.integers(1, MAX_COUNT).map(lambda count: {"count": count})
    | st.lists(ranges, min_size=1, max_size=5).filter(apart).map(lambda seeds: {"seeds": tuple(seeds)})
    | keeps
    | st.lists(st.integers(0, 10**6), min_size=2, max_size=5, unique=True).map(
        lambda points: {"interpolate": tuple(points), "frames": len(points) + 7}
    )
)
generate_specs = st.builds(
    lambda amount, **rest: GenerateSpec.create(**amount, **rest),
    amount=amounts,
    source=st.integers(1, 10**9),
    checkpoint=st.sampled_from(["best", "last"]) | st.integers(0, 10**6).map(str),
    seed=st.integers(0, MAX_SEED),
    noise_mean=st.floats(-100, 100),
    noise_std=st.floats(0, 100),
    grid=st.integers(0, 4096),
    micro_batch=st.integers(1, 4096),
    out=st.none() | plain_text,
)


@given(train_specs | generate_specs)
def test_a_spec_survives_the_job_table(spec: Any) -> None:
    text = json.dumps(spec.to_json(), allow_nan=False)
    assert type(spec).from_json(json.loads(text)) == spec


@given(generate_specs)
def test_as_many_images_are_published_as_were_asked_for(spec: Any) -> None:
    if spec.interpolate:
        assert spec.total == len(spec.interpolate) + 7
    elif spec.seeds:
        assert spec.total == sum(last - first + 1 for first, last in spec.seeds)
    else:
        assert spec.total == (spec.keep or spec.count)
    assert spec.drawn >= spec.total
    assert spec.drawn == (spec.of or spec.total)


small_amounts = (
    st.integers(1, 1500).map(lambda count: {"count": count})
    | st.lists(
        st.tuples(st.integers(0, 3000), st.integers(0, 300)).map(lambda pair: (pair[0], sum(pair))),
        min_size=1,
        max_size=6,
    )
    .filter(apart)
    .map(lambda seeds: {"seeds": tuple(seeds)})
    | st.tuples(st.integers(1, 300), st.integers(0, 1200)).map(
        lambda pair: {"keep": pair[0], "of": sum(pair)}
    )
)


@settings(deadline=None)
@given(small_amounts, st.integers(1, 300), st.integers(1, 80))
def test_the_parts_of_a_job_draw_each_image_exactly_once_in_whole_micro_batches(
    amount: Any, shard: Any, micro_batch: Any
) -> None:
    spec = GenerateSpec.create(source=1, shard_size=shard, micro_batch=micro_batch, out="/p", **amount)
    parts = spec.split()
    if not parts:
        assert spec.drawn <= max(shard, micro_batch) + micro_batch
        return

    def draws(one: Any) -> Any:
        return [draw for first, last in one.ranges for draw in range(first, last + 1)]

    assert [draw for part in parts for draw in draws(part)] == draws(spec)
    assert sum(part.image_count for part in parts) == spec.drawn
    assert len(parts) > 1
    assert all(part.split() == [] for part in parts), "a part has no parts"
    assert all((part.grid, part.out) == (0, None) for part in parts), "grids and copies are the whole's"
    assert all(part.from_json(part.to_json()) == part for part in parts)
    places = [part.draws or (0, 0) for part in parts]
    assert all(first % micro_batch == 0 for first, _ in places)
    assert all(last + 1 == first for (_, last), (first, _) in pairwise(places))
    if not spec.seeds:  # draw i is in place i: no micro-batch is computed twice
        blocks = [{draw // micro_batch for draw in draws(part)} for part in parts]
        assert sum(map(len, blocks)) == len(set().union(*blocks))


@pytest.mark.parametrize(
    ("given", "format"),
    [
        ({"count": 100_000}, "png"),
        ({"count": 100_001}, "tar"),
        ({"seeds": ((0, 100_000),)}, "tar"),
        ({"keep": 64, "of": 1_000_000}, "png"),
        ({"count": 1_000_000, "format": "png"}, "png"),
    ],
)
def test_more_than_a_hundred_thousand_images_become_archives_unless_a_format_is_given(
    given: dict[str, Any], format: str
) -> None:
    spec = GenerateSpec.create(source=1, **given)
    assert spec.format == format
    stored = {name: value for name, value in spec.to_json().items() if name != "format"}
    assert GenerateSpec.from_json({**stored, "format": "png"}).format == "png", (
        "a stored job keeps its format"
    )


@pytest.mark.parametrize("amount", [{"count": MAX_COUNT}, {"keep": 10, "of": MAX_COUNT}])
def test_the_largest_job_in_the_smallest_shards_is_less_than_ten_thousand_shards(amount: Any) -> None:
    shards = GenerateSpec.create(source=1, shard_size=1, **amount).split()
    assert 9_800 <= len(shards) <= MAX_SHARDS
    assert sum(shard.image_count for shard in shards) == MAX_COUNT


def test_up_to_ten_thousand_images_and_all_of_stored_jobs_have_the_names_of_ganq_0_2() -> None:
    few = GenerateSpec.create(source=1, count=10_000)
    assert few.names == GenerateSpec.create(source=1, seeds=((5_000_000, 5_000_009),)).names == PLAIN_NAMES
    many = GenerateSpec.create(source=1, count=2_000_000, format="tar").to_json()
    assert GenerateSpec.from_json(many).names != PLAIN_NAMES
    del many["layout"]
    assert GenerateSpec.from_json(many).names == PLAIN_NAMES


@pytest.mark.parametrize(
    ("amount", "digits"),
    [
        ({"count": 10_001}, 6),
        ({"count": 1_000_000}, 6),
        ({"count": 1_000_001}, 7),
        ({"seeds": ((0, 10_000), (12_345_678, 12_345_678))}, 8),
        ({"keep": 20_000, "of": 5_000_000}, 6),
    ],
)
def test_the_names_of_many_images_have_the_digits_of_the_largest_index(
    amount: dict[str, Any], digits: int
) -> None:
    spec = GenerateSpec.create(source=1, format="png", **amount)
    assert spec.names.digits == digits
    assert spec.names.folders
    assert {shard.names for shard in spec.split()} == {spec.names}


@settings(deadline=None, max_examples=8)
@given(st.integers(10_001, 10**8), st.integers(1, 10**8), st.sampled_from([1, 7, 64, 100, 1000, 3000, 4096]))
def test_the_archives_of_all_shards_fit_into_one_folder_and_no_two_have_one_name(
    count: int, shard_size: int, micro_batch: int
) -> None:
    spec = GenerateSpec.create(
        source=1, count=count, shard_size=shard_size, micro_batch=micro_batch, format="tar"
    )
    names: list[int] = []
    for shard in spec.split() or [spec]:
        archives = -(-shard.image_count // shard.names.per_tar)
        names += range(shard.names.first_tar, shard.names.first_tar + archives)
    assert names == list(range(len(names)))
    assert len(names) <= 9_900
    assert spec.names.linked == bool(spec.split())


def test_a_spec_cannot_be_changed_after_it_was_made() -> None:
    spec = TrainSpec.create(data="/p")
    with pytest.raises(ValueError):
        spec.batch = 3  # type: ignore[misc]  # that it is refused is the test


# --- recipes ----------------------------------------------------------------------------------


def test_the_tutorials_options_are_the_defaults() -> None:
    spec = TrainSpec.create(data="/p", recipe="dcgan")
    assert (spec.size, spec.batch, spec.epochs, spec.nz, spec.ngf, spec.ndf) == (96, 256, 400, 100, 64, 64)
    assert (spec.lr_g, spec.lr_d, spec.beta1, spec.beta2) == (2e-4, 2e-4, 0.5, 0.999)
    assert (spec.d_every, spec.g_every, spec.save_every, spec.loader_workers) == (1, 5, 5, 4)
    assert (spec.loss, spec.norm_d, spec.fake_reuse, spec.augment) == ("bce", "batch", "until-g-step", ())
    assert TrainSpec(data="/p", **TrainSpec.of_new) == spec


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_gives_a_spec_and_every_part_of_it_can_be_changed(name: Any) -> None:
    spec = TrainSpec.create(data="/p", recipe=name)
    for option, value in RECIPES[name].defaults.items():
        assert getattr(spec, option) == value
    assert TrainSpec.create(data="/p", recipe=name, batch=32, g_every=7).batch == 32


def test_every_file_among_the_recipes_is_one() -> None:
    files = {path.stem for path in Path(jobs.recipes.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == set(RECIPES)
    assert all(name == recipe.name and recipe.summary for name, recipe in RECIPES.items())
    assert DEFAULT_RECIPE in RECIPES


def test_none_means_not_given() -> None:
    assert TrainSpec.create(data="/p", recipe=None, batch=None, seed=None) == TrainSpec.create(data="/p")


# --- bad input --------------------------------------------------------------------------------

BAD_TRAIN: dict[str, tuple[dict[str, Any], str]] = {
    "no data": ({"data": None}, "--data: field required"),
    "unknown option": ({"colour": "red"}, "--colour: extra inputs are not permitted"),
    "unknown recipe": ({"recipe": "better\nbest"}, "there is no recipe"),
    "a batch of one": ({"batch": 1}, "--batch"),
    "a batch of words": ({"batch": "many"}, "--batch"),
    "no epochs": ({"epochs": 0}, "--epochs"),
    "a rate of nan": ({"lr_g": float("nan")}, "--lr-g"),
    "a rate of 0": ({"lr_d": 0}, "--lr-d"),
    "beta of 1": ({"beta1": 1}, "--beta1"),
    "beta of nan": ({"beta2": float("nan")}, "--beta2"),
    "a negative seed": ({"seed": -1}, "--seed"),
    "a seed of 64 bits": ({"seed": 2**63}, "--seed"),
    "no width": ({"ngf": 0}, "--ngf"),
    "two words in one": ({"device": "cpu\nrm -rf /"}, "--device"),
    "an escape": ({"device": "\x1b[31mred"}, "--device"),
    "endless seconds": ({"checkpoint_seconds": float("inf")}, "--checkpoint-seconds"),
    "endless kimg": ({"ema_half_life_kimg": float("inf")}, "--ema-half-life-kimg"),
    "an augment that is none": ({"augment": ("twirl",)}, "--augment"),
    "sigmoid without one": ({"loss": "bce", "norm_d": "spectral"}, "--loss bce reads a sigmoid"),
    "nothing to steer": ({"ada_target": 0.6}, "--ada-target controls"),
    "a chance of 2": ({"augment_p": 2.0}, "--augment-p"),
    "freezing what was never trained": ({"freeze_d": 2}, "--freeze-d"),
    "two starts": ({"init_from": 3, "init_netg": "/g.pth"}, "--init-from"),
    "classes of old fakes": ({"conditional": True}, "--conditional"),
    "a norm too many": ({"recipe": "r3gan", "norm_d": "spectral"}, "--arch resnet"),
    "slopes through neighbours": ({"r1_gamma": 1.0}, "--r1-gamma"),
    "a penalty of nan": ({"r2_gamma": float("nan")}, "--r2-gamma"),
    "a penalty that never comes": ({"penalty_every": 0}, "--penalty-every"),
    "rates that grow": ({"lr_end": 2.0}, "--lr-end"),
    "logits through one": ({"loss": "hinge", "norm_d": "batch"}, "--loss hinge reads logits"),
}


def test_the_options_for_a_discriminator_with_batchnorm_are_named() -> None:
    wanted: dict[str, Any] = {"data": "/p", "recipe": DEFAULT_RECIPE, "norm_d": "batch", "loss": "bce"}
    with pytest.raises(SpecError) as caught:
        TrainSpec.create(**wanted)
    assert "--r1-gamma 0 --r2-gamma 0" in str(caught.value.hint)
    assert TrainSpec.create(**wanted, r1_gamma=0.0, r2_gamma=0.0).norm_d == "batch"


@pytest.mark.parametrize("case", BAD_TRAIN)
def test_a_bad_training_option_is_refused_in_one_line_that_names_it(case: Any) -> None:
    options, says = BAD_TRAIN[case]
    assert says in refused(TrainSpec.create, **{"data": "/p", **options}).message


BAD_GENERATE: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "exactly one way"),
    "two ways": ({"count": 1, "keep": 1, "of": 2}, "exactly one way"),
    "keep alone": ({"keep": 3}, "must be given together"),
    "of alone": ({"of": 3}, "must be given together"),
    "more kept than drawn": ({"keep": 3, "of": 2}, "--keep 3 is more than --of 2"),
    "none": ({"count": 0}, "--count"),
    "too many": ({"count": MAX_COUNT + 1}, "--count"),
    "a range backwards": ({"seeds": ((5, 1),)}, "--seeds 5-1"),
    "an image twice": ({"seeds": ((0, 5), (3, 9))}, "names image 3 twice"),
    "a negative range": ({"seeds": ((-1, 3),)}, "--seeds -1-3"),
    "too many by ranges": ({"seeds": ((0, MAX_COUNT - 1), (0, 0))}, "at most"),
    "no word": ({"count": 1, "checkpoint": "worst"}, "is not a checkpoint"),
    "a superscript": ({"count": 1, "checkpoint": "²"}, "is not a checkpoint"),
    "an endless number": ({"count": 1, "checkpoint": "9" * 5000}, "is not a checkpoint"),
    "noise of nan": ({"count": 1, "noise_std": float("nan")}, "--noise-std"),
    "negative noise": ({"count": 1, "noise_std": -1}, "--noise-std"),
    "a way of one": ({"interpolate": (3,)}, "not a path between images"),
    "a way that stands": ({"interpolate": (3, 3)}, "not a path between images"),
    "frames of nothing": ({"count": 1, "frames": 9}, "--frames requires --interpolate"),
    "fewer frames than images": ({"interpolate": (1, 2, 3), "frames": 2}, "too few"),
    "a film of hours": ({"interpolate": (1, 2), "frames": 100_000}, "--frames"),
    "many frames by default": ({"interpolate": tuple(range(99))}, "too many"),
    "a way and a count": ({"interpolate": (1, 2), "count": 5}, "exactly one way"),
    "a rejection of all": ({"count": 1, "reject": 1.0}, "--reject"),
    "two choices by score": ({"keep": 1, "of": 2, "reject": 0.5}, "cannot be combined"),
    "frames that are rejected": ({"interpolate": (1, 2), "reject": 0.5}, "cannot be combined"),
    "truncation to nothing": ({"count": 1, "truncation": 0.0}, "--truncation"),
    "another format": ({"count": 1, "format": "exe"}, "--format"),
}


@pytest.mark.parametrize("case", BAD_GENERATE)
def test_a_bad_generation_option_is_refused_in_one_line_that_names_it(case: Any) -> None:
    options, says = BAD_GENERATE[case]
    assert says in refused(GenerateSpec.create, source=1, **options).message


def test_a_spec_of_another_version_is_refused_by_its_field() -> None:
    written = {**TrainSpec.create(data="/p").to_json(), "brightness": 3}
    assert "--brightness" in refused(TrainSpec.from_json, written).message


@pytest.mark.parametrize("data", [None, [], "x", 3])
def test_a_spec_that_is_no_object_is_refused(data: Any) -> None:
    assert refused(TrainSpec.from_json, data).message.startswith("spec: ")


def test_an_import_says_what_its_weights_are() -> None:
    spec = ImportSpec.create(netg="/g.pth", size=96, nz=100, ngf=64, ndf=64)
    assert ImportSpec.from_json(spec.to_json()) == spec


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["faces", "a", "0x", "2024-05-01", "A.b_c-d", "x" * 64])
def test_a_plain_name_is_taken(name: Any) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "12", ".hidden", "-f", "a b", "a/b", "../x", "a\n", "é", "x" * 65, "a'b", "$(rm)", "a\0b"]
)
def test_a_name_that_could_be_something_else_is_refused(name: Any) -> None:
    assert "cannot be a name" in refused(check_name, name).message


def test_augment_none_turns_off_what_the_recipe_would_steer_and_nothing_that_was_asked_for() -> None:
    plain = TrainSpec.create(data="/p", recipe="sngan", augment=())
    assert (plain.augment, plain.ada_target) == ((), 0.0)
    refused(TrainSpec.create, data="/p", recipe="sngan", augment=(), ada_target=0.5)


def test_the_discriminator_follows_the_generator_unless_its_size_is_given() -> None:
    assert TrainSpec.create(data="/p", ngf=16).ndf == 16
    assert TrainSpec.create(data="/p", ngf=16, ndf=32).ndf == 32
    assert TrainSpec.create(data="/p").ndf == 64
    assert TrainSpec.create(data="/p", ngf=16, init_netd="/d.pth").ndf == 64
    stored = {**TrainSpec.create(data="/p").to_json(), "ngf": 16}
    assert TrainSpec.from_json(stored).ndf == 64, "jobs that are in the table keep their networks"
