"""The page in a real browser: what a person sees, and what the keys do."""

import json
import os
import pty
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser.serving import Server
from browser.world import EPOCHS, HOSTILE, IMAGES, World
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Page

Open = Callable[..., "Page"]
PAGES = {
    "queue": "/",
    "run": "/jobs/{faces}",
    "compare": "/jobs/{faces}?with={faces-2}",
    "images": "/jobs/{folder}",
    "evaluation": "/jobs/{measured}",
    "failed": "/jobs/{hostile}",
    "log": "/jobs/{faces}/log",
    "history": "/jobs/{faces}/events",
    "sweep": "/sweeps/sweep-1",
    "workers": "/workers",
    "datasets": "/datasets",
    "missing": "/jobs/4711",
}


def address(world: World, name: str) -> str:
    return PAGES[name].format(**world.ids)


def settled(page: "Page", *, begun: bool = True) -> None:
    """Wait until the grids or sheets are there."""
    page.locator("#liveness.live").wait_for()
    if page.locator("#run").count() and begun:
        page.locator("#where b").first.wait_for()
        page.locator(".chart").first.wait_for()
    if page.locator("#gallery").count():
        page.locator("#space img").first.wait_for()


@pytest.mark.parametrize(
    ("scheme", "width"),
    [
        ("light", 1280),
        ("dark", 400),
        pytest.param("light", 400, marks=pytest.mark.tier2),
        pytest.param("dark", 1280, marks=pytest.mark.tier2),
    ],
)
def test_every_page_passes_the_accessibility_check_and_stays_in_its_window(
    world: World, server: Server, open_page: Open, width: int, scheme: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    axe = Axe()
    page = open_page(server, width=width, scheme=scheme)
    violations = {}
    for name in PAGES:
        page.goto(server.base + address(world, name))
        settled(page, begun=name != "failed")
        found = axe.run(page)
        if found.violations_count:
            violations[name] = found.generate_report()
        wider = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wider <= 0, f"{name} is {wider} px wider than a window of {width}"
    assert violations == {}, "\n".join(f"{name}: {report}" for name, report in violations.items())


def shown_epoch(page: "Page") -> int:
    found = re.search(r"epoch (\d+)", page.locator("#where").inner_text())
    assert found is not None
    return int(found[1])


def test_one_slider_moves_the_grid_the_curves_and_the_strip(
    world: World, server: Server, open_page: Open
) -> None:
    page = open_page(server, address(world, "run"))
    settled(page)
    assert shown_epoch(page) == EPOCHS  # it begins at the newest

    def look() -> tuple[str, str, str, str]:
        grid = page.locator("canvas.grid").first.evaluate("c => c.toDataURL()")
        strip = page.locator("#face").evaluate("c => c.toDataURL()")
        cursor = page.locator(".chart .cursor").first.evaluate("c => c.style.transform")
        value = page.locator(".chart .value").first.inner_text()
        return grid, strip, cursor, value

    page.locator("canvas.grid:not([aria-busy])").first.wait_for()
    last = look()
    page.keyboard.press("Home")
    page.locator("canvas.grid:not([aria-busy])").first.wait_for()
    assert shown_epoch(page) == 1
    first = look()
    assert all(one != other for one, other in zip(first, last, strict=True))
    for key, epoch in (
        ("ArrowRight", 2),
        ("ArrowUp", 12),
        ("ArrowLeft", 11),
        ("ArrowDown", 1),
        ("End", EPOCHS),
    ):
        page.keyboard.press(key)
        assert shown_epoch(page) == epoch, key
    page.keyboard.press("b")  # the best checkpoint
    assert shown_epoch(page) == 16
    assert "★ best" in page.locator("#where").inner_text()
    assert page.locator("#marks .best").count() == 1
    page.keyboard.press("z")
    assert page.locator('#zoom [aria-pressed="true"]').inner_text() == "1×"
    box = page.locator("canvas.grid").first.bounding_box()
    assert box is not None
    assert box["width"] == 8 * 34 + 2  # true size
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert "--checkpoint 16" in page.locator("#here").inner_text()


def test_runs_are_compared_side_by_side_split_and_linked(
    world: World, server: Server, open_page: Open
) -> None:
    page = open_page(server, address(world, "compare"))
    settled(page)
    assert page.locator("canvas.grid").count() == 2
    page.keyboard.press("Home")
    page.keyboard.press("ArrowUp")
    captions = [one.split()[-1] for one in page.locator(".gridbox figcaption").all_inner_texts()]
    assert captions == ["11", "11"]
    page.keyboard.press("End")  # the other run has come to epoch 12 only
    captions = [one.split()[-1] for one in page.locator(".gridbox figcaption").all_inner_texts()]
    assert captions == [str(EPOCHS), "12"]
    page.get_by_role("button", name="4×").click()
    boxes = page.locator(".canvasbox")
    boxes.first.evaluate("box => box.scrollTo(100, 50)")
    page.wait_for_timeout(200)
    assert boxes.last.evaluate("box => [box.scrollLeft, box.scrollTop]") == [100, 50]
    page.keyboard.press("m")
    assert page.locator(".gridbox:visible").count() == 1
    page.get_by_role("button", name="images").click()
    assert shown_epoch(page) == EPOCHS


def test_the_gallery_opens_stars_and_saves_by_keys(
    own_world: World, own_server: Server, open_page: Open
) -> None:
    source = own_world.submit("m")
    made = own_world.images("g", source, count=IMAGES, format="png", scored=True)
    page = open_page(own_server, f"/jobs/{made}")
    settled(page)
    page.locator("#view").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.locator("#panel[open]").wait_for()
    page.get_by_text("ganq submit generate --from").first.wait_for()
    about = page.locator("#about").inner_text()
    assert "epoch 16" in about
    assert "--seeds 3" in page.locator("#command").inner_text()
    page.keyboard.press("s")
    page.locator('#star[aria-pressed="true"]').wait_for()
    page.keyboard.press("ArrowRight")
    page.get_by_text("Image 4 (5 of").wait_for()
    page.keyboard.press("Escape")
    with page.expect_download() as download:
        page.locator("#zip").click()
    assert download.value.suggested_filename == f"ganq-{made}-starred.zip"
    with zipfile.ZipFile(download.value.path()) as archive:
        lines = [json.loads(line) for line in archive.read("manifest.jsonl").splitlines()]
    assert [(one["index"], one["seed"], one["epoch"]) for one in lines] == [(3, 7, 16)]
    page.get_by_role("button", name="Worst first").click()
    page.locator("#view").focus()
    page.keyboard.press("Enter")
    page.get_by_text(f"Image {IMAGES - 1} (").wait_for()


def test_ten_thousand_images_take_few_requests_and_nodes(
    own_world: World, own_server: Server, open_page: Open
) -> None:
    source = own_world.submit("m")
    made = own_world.images("many", source, count=10_000, format="npz")
    page = open_page(own_server, f"/jobs/{made}")
    settled(page)
    sheets = [one for one in page.watched.requests if "/sheets/" in one]  # type: ignore[attr-defined]
    assert len(sheets) <= 10
    assert page.locator("#gallery *").count() <= 200
    page.locator("#goto").fill("9999")
    page.keyboard.press("Enter")
    page.get_by_text("10,000 of 10,000").wait_for(timeout=3000)
    assert page.locator("#space img").count() <= 6


def test_a_commit_reaches_the_page_and_leaves_focus_alone(
    own_world: World, own_server: Server, open_page: Open
) -> None:
    job = own_world.submit("first")
    page = open_page(own_server)
    settled(page)
    page.locator("#f-name").fill("typed")
    began = time.monotonic()
    own_world.submit("second")
    page.get_by_text("second").wait_for(timeout=5000)
    assert time.monotonic() - began < 2
    assert page.evaluate("document.activeElement.id") == "f-name"
    assert page.locator("#f-name").input_value() == "typed"
    own_world.begin(job, progress={"done": 10, "total": 100, "unit": "images", "epoch": 1, "epochs": 10})
    page.locator(f"#job-{job} .state.running").wait_for(timeout=5000)


def test_the_slider_follows_new_grids_until_it_is_touched(
    own_world: World, own_server: Server, open_page: Open
) -> None:
    job = own_world.submit("t")
    progress = {"done": 10, "total": 100, "unit": "images", "epoch": 1, "epochs": EPOCHS, "rate": 9.0}
    own_world.begin(job, progress=progress)
    own_world.train_files(job, range(1, 5))
    page = open_page(own_server, f"/jobs/{job}")
    settled(page)
    assert shown_epoch(page) == 4
    own_world.train_files(job, range(5, 7))
    own_world.set(job, hb_seq=1)
    page.locator("#where", has_text="epoch 6").wait_for(timeout=5000)
    page.keyboard.press("ArrowLeft")
    own_world.train_files(job, range(7, 9))
    page.locator('#slider[max="7"]').wait_for(timeout=5000)
    assert shown_epoch(page) == 5
    page.keyboard.press("f")
    assert shown_epoch(page) == 8


def test_a_dead_server_is_reported_and_its_return_is_noticed(
    own_world: World, own_server: Server, open_page: Open
) -> None:
    page = open_page(own_server)
    settled(page)
    own_server.stop(kill=True)
    began = time.monotonic()
    page.locator("#banner:not([hidden])").wait_for(timeout=16_000)
    assert time.monotonic() - began < 15
    own_world.submit("meanwhile")
    own_server.again()
    page.get_by_text("meanwhile").wait_for(timeout=15_000)
    page.locator("#banner").wait_for(state="hidden")


def test_a_hostile_name_is_text_everywhere(world: World, server: Server, open_page: Open) -> None:
    page = open_page(server)
    settled(page)
    shown = page.locator(f"#job-{world.ids['hostile']} .name").inner_text()
    assert "<script>alert(1)</script>" in shown
    assert shown == HOSTILE
    page.goto(server.base + f"/jobs/{world.ids['hostile']}")
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.locator("script:not([src])").count() == 0
    page.goto(server.base + f"/jobs/{world.ids['hostile']}/log")
    assert (
        "<b>bold</b>" in page.locator(".log").inner_text() or "last line" in page.locator(".log").inner_text()
    )


def test_an_action_asks_once_and_is_the_commands_own(
    own_world: World, own_server: Server, open_page: Open
) -> None:
    job = own_world.submit("t")
    page = open_page(own_server, f"/jobs/{job}")
    settled(page, begun=False)
    page.get_by_role("button", name="Hold").click()
    page.get_by_role("button", name="Release").wait_for()
    page.get_by_role("button", name="Priority up").click()
    page.get_by_text("priority 1").first.wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Keep it").click()
    assert state_of(own_world, job) == "queued"
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Cancel it").click()
    page.locator(".state.cancelled").wait_for()
    assert state_of(own_world, job) == "cancelled"
    page.get_by_role("button", name="Retry").click()
    page.get_by_text("Submitted as job").wait_for()


def test_a_list_of_jobs_is_walked_by_keys(world: World, server: Server, open_page: Open) -> None:
    page = open_page(server)
    settled(page)
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"/jobs/\d+$"))


def state_of(world: World, job_id: int) -> Any:
    from tables import job_row

    return job_row(world.database, job_id)["state"]


def test_a_report_opens_from_disk_without_a_server(
    world: World, server: Server, browser: Any, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cli.main", "report", str(world.ids["faces"]), "--html", str(path)],
        env=server.env,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(path)
    assert path.stat().st_size < 20e6
    page = browser.new_context(offline=True).new_page()
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"file://{path}")
    page.locator("#where b").first.wait_for()
    page.locator("canvas.grid:not([aria-busy])").first.wait_for()
    page.keyboard.press("Home")
    assert shown_epoch(page) == 1
    assert all(one.startswith(("file:", "data:", "blob:")) for one in asked)
    assert errors == []
    page.context.close()


def test_status_draws_the_last_grid_on_a_terminal_and_nowhere_else(world: World, server: Server) -> None:
    command = [sys.executable, "-P", "-m", "cli.main", "status", str(world.ids["faces"])]
    colours = {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
    env = {name: value for name, value in server.env.items() if name != "NO_COLOR"} | colours
    on_terminal = of_terminal(command, env)
    assert "▀" in on_terminal
    assert re.search(r"loss_d  [▁▂▃▄▅▆▇█]{20}", on_terminal)
    assert "▀" not in of_terminal(command, env | {"NO_COLOR": "1"})
    piped = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    assert "▀" not in piped
    assert "▁" not in piped


def of_terminal(command: list[str], env: dict[str, str]) -> str:
    """What a command prints on a terminal of 100 columns."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(command, env=env | {"COLUMNS": "100"}, stdout=follower, stderr=follower)
    os.close(follower)
    data = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        data += piece
    os.close(leader)
    assert process.wait(timeout=60) == 0
    return data.decode()


def test_open_names_the_page_while_it_is_served(world: World, server: Server) -> None:
    command = [sys.executable, "-P", "-m", "cli.main", "open", "--print"]
    done = subprocess.run(command, env=server.env, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == server.link


def test_the_axis_changes_and_the_epoch_stays(world: World, server: Server, open_page: Open) -> None:
    page = open_page(server, address(world, "run") + "#epoch=6")
    settled(page)
    for axis in ("images", "time", "epoch"):
        page.locator("#link").get_by_role("button", name=axis).click()
        assert shown_epoch(page) == 6, axis
        assert page.locator("#slider").input_value() == "5"
        values = page.locator(".chart .value").all_inner_texts()
        assert all(re.search(r"\d", one) for one in values), (axis, values)
        if axis == "time":
            page.locator(".chart summary").first.click()
            assert "time (s)" in page.locator(".chart th").first.inner_text()
            page.wait_for_timeout(100)
            moved = page.locator(".chart .cursor").first.evaluate("c => c.style.transform")
            assert float(re.sub(r"[^\d.]", "", moved)) > 5  # it does not stand at the left edge
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**#epoch=7")
    page.reload()
    settled(page)
    assert shown_epoch(page) == 7


def test_the_best_checkpoint_is_a_button(world: World, server: Server, open_page: Open) -> None:
    page = open_page(server, address(world, "run"), width=400)
    settled(page)
    page.get_by_role("button", name="★ best at 16").click()
    assert shown_epoch(page) == 16
    page.keyboard.press("Home")
    page.locator("#marks .best").click()
    assert shown_epoch(page) == 16


def test_compared_grids_have_one_size_and_both_names(world: World, server: Server, open_page: Open) -> None:
    page = open_page(server, address(world, "compare"))
    settled(page)
    page.locator("canvas.grid:not([aria-busy])").last.wait_for()
    page.get_by_role("button", name="Blink").click()
    widths = []
    for _ in range(2):
        widths.append(page.locator("canvas.grid:visible").evaluate("c => c.clientWidth"))
        page.evaluate("ganqRun.state.blink++; ganqRun.go(ganqRun.state.at, false)")
    assert widths[0] == widths[1]
    page.get_by_role("button", name="Split").click()
    caption = page.locator(".gridbox:visible figcaption").inner_text()
    assert re.search(r"faces\s+epoch 24\s+faces-2\s+epoch 12", caption), caption
    losses = page.locator(".chart", has_text="Losses").first
    assert "faces-2 loss d" in losses.inner_text()
    assert losses.locator(".swatch.dash").count() == 2
    suggested = page.locator("#trainings option").all_inner_texts()
    assert "faces-2, running" in suggested


def test_a_wrong_name_in_compare_is_reported_beside_the_run(
    world: World, server: Server, open_page: Open
) -> None:
    page = open_page(server, address(world, "run"))
    settled(page)
    page.locator("#with").fill("nosuch")
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("there is no job named 'nosuch'").wait_for()
    settled(page)
    assert page.locator("#with").input_value() == "nosuch"
    page.goto(server.base + f"/jobs/{world.ids['rates-0']}?with=rates-1")
    settled(page)
    assert page.locator("#with").input_value() == "rates-1"
    assert page.locator(".differ tbody tr").all_inner_texts() == ["lr-g\t0.0001\t0.0002"]


def test_an_error_page_does_not_fetch_itself_again(
    own_world: World, own_server: Server, open_page: Open
) -> None:
    page = open_page(own_server, "/jobs/4711")
    page.locator("#liveness.live").wait_for()
    own_world.submit("meanwhile")
    page.wait_for_timeout(1500)
    asked = [one for one in page.watched.requests if one.endswith("/jobs/4711")]  # type: ignore[attr-defined]
    assert len(asked) == 1


def test_images_are_generated_from_the_slider_on_a_phone(
    own_world: World, own_server: Server, open_page: Open
) -> None:
    job = own_world.submit("t")
    own_world.begin(job, state="succeeded")
    own_world.train_files(job, range(1, 9))
    for path in (own_world.volume.attempt(job, 1) / "samples").glob("*.png"):  # wider than the phone
        with Image.open(path) as grid:
            grid.resize((3 * grid.width, 3 * grid.height), Image.Resampling.NEAREST).save(path)
    page = open_page(own_server, f"/jobs/{job}#epoch=2", width=400)
    settled(page)
    assert page.locator(".stage").evaluate("one => one.scrollWidth - one.clientWidth") <= 0
    box = page.locator("#here").evaluate("one => one.clientHeight")
    page.get_by_label("Number of images").fill("12")
    page.get_by_role("button", name="Generate from epoch 4, the nearest kept").wait_for()
    page.keyboard.press("Tab")
    page.evaluate("ganqRun.go(7)")
    page.get_by_role("button", name="Generate from epoch 8", exact=True).wait_for()
    assert page.locator("#here").evaluate("one => one.clientHeight") == box  # the grid stays where it is
    page.get_by_role("button", name="Generate from epoch 8").click()
    page.get_by_text(f"Submitted as job {job + 1}").wait_for()
    assert own_world_spec(own_world, job + 1)["count"] == 12


def own_world_spec(world: World, job_id: int) -> Any:
    from tables import job_row

    return job_row(world.database, job_id)["spec"]


def test_a_cancel_names_the_job_and_a_pause_points_to_its_button(
    own_world: World, own_server: Server, open_page: Open
) -> None:
    job = own_world.submit("faces")
    own_world.begin(job, progress={"done": 10, "total": 100, "unit": "images", "epoch": 1, "epochs": 10})
    page = open_page(own_server, f"/jobs/{job}")
    settled(page, begun=False)
    page.get_by_role("button", name="Pause").click()
    toast = page.locator("#note")
    toast.get_by_text("Resume continues it").wait_for()
    assert toast.locator("a").count() == 0  # the page one is on
    page.get_by_role("button", name="Cancel").click()
    assert page.locator("#ask h2").inner_text() == f"Cancel faces (job {job})?"
    page.get_by_role("button", name="Keep running").click()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Cancel it").click()
    page.get_by_text("cancelling").wait_for()
    page.get_by_role("button", name="Cancel").wait_for(state="detached")
    assert page.locator(".actions button").count() == 0


def test_a_job_whose_prerequisite_failed_is_retried_with_it(
    own_world: World, own_server: Server, open_page: Open
) -> None:
    train = own_world.submit("m")
    images = own_world.submit("g", kind="generate", spec={"source": train, "count": 4}, after=[train])
    own_world.begin(train, state="failed", error_code="NAN_LOSS", error_message="loss_d is NaN at step 7")
    own_world.set(images, state="failed", finished_at=time.time(), error_code="DEPENDENCY_FAILED")
    page = open_page(own_server, f"/jobs/{train}")
    page.get_by_text("It failed without a sample grid.").wait_for()
    assert "diverged: loss_d is NaN at step 7" in page.locator(".facts").inner_text()
    page.goto(own_server.base + f"/jobs/{images}")
    page.get_by_role("button", name="Retry both").click()
    page.get_by_text(f"Submitted as job {images + 2}.").wait_for()
    again = own_world_spec(own_world, images + 2)
    assert again["source"] == images + 1
    page.get_by_role("link", name=f"retried as {images + 2}").wait_for()
    change = page.locator("meta[name=ganq-change]").get_attribute("content")
    origin: dict[str, Any] = {"X_Ganq_Token": change or "", "Origin": own_server.base}
    refused = own_server.get(f"/jobs/{images}/retry", method="POST", body={}, **origin)
    assert refused.status == 409
    assert f"ganq retry {train} --with-waiting" in refused.json["error"]["hint"]


def test_the_time_of_a_run_leaves_its_pauses_out(
    own_world: World, own_server: Server, open_page: Open
) -> None:
    job = own_world.submit("t")
    own_world.begin(job, state="queued", held=True, ran_s=42.0)
    page = open_page(own_server, f"/jobs/{job}")
    assert re.search(r"ran for\s+42 s", page.locator(".facts").inner_text())


def test_the_log_says_its_attempt_and_keeps_title_and_actions_in_view(
    world: World, server: Server, open_page: Open
) -> None:
    page = open_page(server, f"/jobs/{world.ids['faces']}/log")
    settled(page)
    assert page.get_by_text("The log of attempt 2 of 2").count() == 1
    page.evaluate("scrollTo(0, 600)")
    top = page.locator("h1").evaluate("one => one.getBoundingClientRect().top")
    assert 0 < top < 120


def test_without_a_token_a_browser_is_told_how_to_log_in(world: World, server: Server, browser: Any) -> None:
    page = browser.new_context().new_page()
    page.goto(server.base)
    assert page.locator("code").first.inner_text() == "ganq open"
    assert page.locator("body").evaluate("b => getComputedStyle(b).maxWidth") != "none"  # its style is let in
    page.context.close()


def test_sizes_of_images_differ_and_places_count_from_one(
    own_world: World, own_server: Server, open_page: Open
) -> None:
    source = own_world.submit("m")
    made = own_world.images("g", source, count=10, format="png")
    page = open_page(own_server, f"/jobs/{made}", width=400)
    settled(page)
    assert page.locator("#position").inner_text() == "1–10 of 10"
    assert page.locator("#sizes button").all_inner_texts() == ["S", "M", "L"]
    heights = []
    for size in ("S", "M", "L"):
        page.locator("#sizes").get_by_role("button", name=size).click()
        heights.append(page.locator("#space").evaluate("one => one.clientHeight"))
    assert heights == sorted(set(heights))


def test_held_jobs_are_counted_and_listed(own_world: World, own_server: Server, open_page: Open) -> None:
    own_world.submit("waits")
    own_world.submit("stays", held=True)
    page = open_page(own_server)
    page.get_by_role("link", name="1 held or paused").click()
    page.get_by_text("stays").wait_for()
    assert page.locator("[data-row]").count() == 1


def test_images_are_starred_under_the_pointer_and_by_taps(
    own_world: World, own_server: Server, open_page: Open
) -> None:
    source = own_world.submit("m")
    made = own_world.images("g", source, count=40, format="png")
    page = open_page(own_server, f"/jobs/{made}", width=400)
    settled(page)
    page.locator("#view").hover(position={"x": 10, "y": 10})
    page.get_by_role("button", name="Star image 0", exact=True).click()
    page.get_by_role("button", name="Unstar image 0").wait_for()
    page.get_by_role("button", name="Pick").click()
    for x in (150, 250):
        page.locator("#view").click(position={"x": x, "y": 60})
    page.get_by_text("Download 3 starred").wait_for()
    assert page.locator("#panel[open]").count() == 0
    page.keyboard.press("p")
    page.locator("#view").click(position={"x": 60, "y": 60})
    page.locator("#panel[open]").wait_for()


def test_the_queued_chip_counts_what_its_list_shows(
    own_world: World, own_server: Server, open_page: Open
) -> None:
    own_world.submit("waits")
    own_world.submit("stays", held=True)
    page = open_page(own_server)
    page.get_by_role("link", name="1 queued").click()
    page.get_by_text("waits").wait_for()
    assert page.locator("[data-row]").count() == 1


def test_the_header_is_not_behind_the_slider(own_world: World, own_server: Server, open_page: Open) -> None:
    job = own_world.submit("t")
    progress = {"done": 160, "total": 160 * EPOCHS, "unit": "images", "epoch": 1, "epochs": EPOCHS}
    own_world.begin(job, progress=progress)  # as of a heartbeat, some seconds ago
    own_world.train_files(job, range(1, 5))
    page = open_page(own_server, f"/jobs/{job}")
    settled(page)
    assert f"epoch 4/{EPOCHS}" in page.locator(".title").inner_text()
    assert shown_epoch(page) == 4


def test_the_card_of_a_worker_follows_its_job_at_once(
    own_world: World, own_server: Server, open_page: Open
) -> None:
    job = own_world.submit("t")
    own_world.begin(job, progress={"done": 10, "total": 10, "unit": "images", "epoch": 10, "epochs": 10})
    own_world.worker("gpu-0", state="busy", job_id=job)
    page = open_page(own_server)
    page.locator(".card.running", has_text="epoch 10/10").wait_for()
    own_world.set(job, state="succeeded", worker=None, finished_at=time.time(), result={})
    page.locator(".card", has_text="no job").wait_for(timeout=5000)
    assert "idle" in page.locator(".card").inner_text()
