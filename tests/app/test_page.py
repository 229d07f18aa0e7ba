"""The page in a browser: `pytest -m slow tests/app/test_page.py`. Screenshots are written to the folder FVG_SCREENSHOTS, if named."""

import io
import os
import shutil
import socket
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest


pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]

PROMPT = "A red circle moves to the right"


@pytest.fixture(scope="module")
def address():
    """A server with the embedded model."""
    import uvicorn

    from diffusers_fvg import load_embedded
    from diffusers_fvg.app.api import make_api
    from diffusers_fvg.app.page import add_page
    from diffusers_fvg.app.worker import Worker

    pipe = load_embedded()
    pipe.set_progress_bar_config(disable=True)
    worker = Worker(pipe)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(add_page(make_api(worker), worker), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join(20)
    worker.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def people(browser, address):
    """`people(width, colours)` opens the page for somebody new."""
    opened = []

    def person(width=1280, colours="light"):
        size = {"width": width, "height": 900}
        context = browser.new_context(viewport=size, accept_downloads=True, color_scheme=colours)
        page = context.new_page()
        page.set_default_timeout(240_000)
        page.goto(address)
        page.wait_for_selector("#prompt textarea")
        page.wait_for_function("Number(document.querySelector('#seed input')?.value) > 0")
        opened.append(context)
        return page

    yield person
    for context in opened:
        context.close()


@pytest.fixture
def held(monkeypatch):
    """Runs of the video model stand still in step 60, until the event is set."""
    from diffusers_fvg.app.orders import Order

    go, run = threading.Event(), Order.run

    def held_run(order, pipe, report, *others):
        def wait(stage, step, steps):
            report(stage, step, steps)
            if (stage, step) == ("denoise", 60):
                assert go.wait(600)

        return run(order, pipe, wait, *others)

    monkeypatch.setattr(Order, "run", held_run)
    yield go
    go.set()


def shot(page, name):
    folder = os.environ.get("FVG_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def told(page, text):
    page.wait_for_function("text => document.querySelector('#status')?.innerText.includes(text)", arg=text)


def press(page, name, text="Done."):
    """Presses a button, and waits until what it starts is told of."""
    page.evaluate("document.querySelector('#status [role]')?.classList.add('before')")
    page.click(f"#{name}")
    page.wait_for_function(
        "text => document.querySelector('#status [role]:not(.before)')?.innerText.includes(text)", arg=text
    )


def caption(page):
    return page.input_value("#caption textarea")


def test_stages_are_edited_chosen_and_done_again(people, tmp_path):
    from diffusers_fvg.media import read_video_metadata

    page = people()
    page.fill("#prompt textarea", PROMPT)
    press(page, "rewrite")
    assert "red circle" in caption(page)
    # The caption is fixed, and the run goes on from stage 2.
    page.fill("#caption textarea", caption(page).replace("red", "blue"))
    press(page, "compose")
    pictures = page.locator("#pictures .thumbnail-item")
    assert pictures.count() == 4
    pictures.nth(2).click()
    page.wait_for_function("document.querySelector('#judged').innerText.includes('Picture 3')")
    chosen = int(page.inner_text("#judged").split("seed ")[1].split(")")[0])
    press(page, "animate")
    page.wait_for_selector("#video video")
    shot(page, "stages")
    with page.expect_download() as download:
        page.click("#get-mp4")
    download.value.save_as(tmp_path / "video.mp4")
    record = read_video_metadata(tmp_path / "video.mp4")
    assert record["seeds"]["anchor"] == chosen and "blue circle" in record["first_frame_prompt"]
    for form, suffix, start in (
        ("gif", "gif", b"GIF89a"),
        ("webp", "webp", b"RIFF"),
        ("frames", "zip", b"PK"),
        ("strip", "png", b"\x89PNG"),
    ):
        with page.expect_download() as download:
            page.click(f"#get-{form}")
        assert download.value.suggested_filename.endswith(f".{suffix}")
        assert Path(download.value.path()).read_bytes().startswith(start)
    # A caption that was changed after its pictures is a sentence, and no traceback.
    page.fill("#caption textarea", "A green square")
    press(page, "animate", "run stage 2 again")
    # After a reload it is all there; another person sees nothing of it.
    page.reload()
    page.wait_for_selector("#video video")
    assert "blue circle" in caption(page) or "green square" in caption(page)
    other = people()
    assert caption(other) == "" and other.locator("#pictures .thumbnail-item").count() == 0
    # The other one gets the recipe by the file.
    other.click("text=Recipe of a video")
    other.set_input_files("#recipe input[type=file]", str(tmp_path / "video.mp4"))
    told(other, "The recipe is loaded")
    assert other.input_value("#seed input") == str(record["seeds"]["video"])
    assert other.input_value("#prompt textarea") == PROMPT


def steps(page, number):
    page.locator("#steps input[type=number]").fill(str(number))
    page.locator("#steps input[type=number]").blur()


def slow_run(page):
    """Starts a run of the video model that takes a while, and leaves it in the middle of it."""
    page.fill("#prompt textarea", PROMPT)
    page.click("text=video alone")
    page.click("text=Settings")
    steps(page, 100)
    page.click("#generate")
    told(page, "Animating")


def recipe(page, tmp_path):
    """What the video that is shown says of itself."""
    from diffusers_fvg.media import read_video_metadata

    with page.expect_download() as download:
        page.click("#get-mp4")
    download.value.save_as(tmp_path / "recipe.mp4")
    return read_video_metadata(tmp_path / "recipe.mp4")


def test_a_reload_in_the_middle_keeps_queue_preview_and_result(people, held, tmp_path):
    ann, bob = people(), people()
    slow_run(ann)
    ann.wait_for_selector("#preview img")
    shot(ann, "preview")
    bob.fill("#prompt textarea", "A blue square moves upwards")
    bob.click("#generate")
    told(bob, "Waiting")
    for page, text in ((bob, "Waiting: 1 job"), (ann, "Animating")):
        page.reload()
        told(page, text)
    ann.wait_for_selector("#preview img")
    shot(bob, "waiting")
    # What is written meanwhile, for the next run, stays there.
    ann.fill("#prompt textarea", "A green triangle moves downwards")
    held.set()
    written = {ann: "A green triangle moves downwards", bob: "A blue square moves upwards"}
    for page, prompt in ((ann, PROMPT), (bob, "A blue square moves upwards")):
        told(page, "Done.")
        page.wait_for_selector("#video video")
        assert page.locator("#preview img").count() == 0
        assert recipe(page, tmp_path)["prompt"] == prompt
        assert page.input_value("#prompt textarea") == written[page]


def test_bad_files_are_sentences(people, tmp_path):
    good = io.BytesIO()
    PIL.Image.new("RGB", (200, 200), "red").save(good, "JPEG")
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bad = {
        "text.png": b"no picture",
        "empty.png": b"",
        "half.jpg": good.getvalue()[: len(good.getvalue()) // 2],
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "bomb.png": b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + struct.pack(">I", zlib.crc32(header)),
    }
    page = people()
    page.click("text=Your own pictures")
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        page.set_input_files("#upload input[type=file]", str(tmp_path / name))
        told(page, f"The file '{name}' cannot be used")
        assert "Errno" not in page.inner_text("#status")
    shot(page, "bad-upload")
    (tmp_path / "none.mp4").write_bytes(b"no video")
    page.click("text=Recipe of a video")
    page.set_input_files("#recipe input[type=file]", str(tmp_path / "none.mp4"))
    told(page, "The file 'none.mp4'")
    assert page.locator("#anchors .thumbnail-item").count() == 0
    assert "Traceback" not in page.inner_text("body")
    # After all that the page works.
    page.fill("#prompt textarea", PROMPT)
    press(page, "rewrite")
    assert "red circle" in caption(page)


def test_a_run_is_cancelled_and_the_next_one_is_whole(people):
    page = people()
    slow_run(page)
    shot(page, "running")
    page.click("#cancel")
    told(page, "Cancelled.")
    steps(page, 2)
    press(page, "generate")
    page.wait_for_selector("#video video")


def test_a_photo_lies_upright_and_a_phone_shows_all(people, tmp_path):
    photo = np.zeros((80, 160, 3), np.uint8)
    photo[:, :80] = (255, 0, 0)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.fromarray(photo).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    (tmp_path / "bad.png").write_bytes(b"none")
    page = people(390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shot(page, "phone-empty")
    page.fill("#prompt textarea", PROMPT)
    page.click("text=Your own pictures")
    page.set_input_files("#upload input[type=file]", str(tmp_path / "bad.png"))
    told(page, "cannot be used")
    page.set_input_files("#upload input[type=file]", str(tmp_path / "photo.jpg"))
    told(page, "replaces stages 1 and 2")
    page.fill("#frame input", "-1")
    page.set_input_files("#upload input[type=file]", str(tmp_path / "photo.jpg"))
    page.wait_for_function("document.querySelectorAll('#anchors .thumbnail-item').length === 2")
    press(page, "animate")
    page.wait_for_selector("#video video")
    shot(page, "phone")
    wide = "[...document.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > 391).map(e => e.id + '.' + e.className)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, page.evaluate(wide)


def test_a_storyboard_and_two_people_at_once(people, tmp_path):
    ann, bob = people(), people()
    ann.fill("#prompt textarea", "A red circle gradually turns into a square")
    ann.click("text=storyboard")
    bob.fill("#prompt textarea", "A blue square moves upwards")
    ann.click("#generate"), bob.click("#generate")
    for page, words in ((ann, "100% "), (bob, "blue square")):
        told(page, "Done.")
        assert words in caption(page), caption(page)
        page.wait_for_selector("#video video")
        assert recipe(page, tmp_path)["prompt"] == page.input_value("#prompt textarea")
    shot(ann, "storyboard")
    assert ann.locator("#history .thumbnail-item").count() == bob.locator("#history .thumbnail-item").count() == 1


def test_all_cards_are_dark_in_the_dark(people):
    light, dark = people(), people(colours="dark")
    cards = "[...document.querySelectorAll('.stage-card, #settings, #past'), document.querySelector('#ask')]"
    cards += ".map(card => getComputedStyle(card).backgroundColor)"
    shot(dark, "dark")
    for page, low, high in ((light, 200, 255), (dark, 0, 100)):
        colours = page.evaluate(cards)
        assert len(colours) == 6
        for colour in colours:
            assert low <= np.mean([int(part) for part in colour[4:-1].split(",")]) <= high, colours
