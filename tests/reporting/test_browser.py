"""Reports in a real browser: no error, no request, clips play, nothing is wider than the screen, light and dark.

Without Chromium (a package of the system) these tests are skipped; where ``LOWMEM_DRF_NEEDS_CHROMIUM`` is set, as in
CI, they fail.
"""

import os
import shutil

import pytest
from _runs import big_run

from lowmem_drf.commands.report import report_command

pytestmark = pytest.mark.slow
WIDTHS = {"phone": 390, "desktop": 1280}


@pytest.fixture(scope="module")
def browser():
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        give_up = pytest.fail if os.environ.get("LOWMEM_DRF_NEEDS_CHROMIUM") else pytest.skip
        give_up("there is no Chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(tiny_run, tmp_path_factory):
    """Name -> the report of a run on tiny models, and of a run that looks like a card's."""
    folder = tmp_path_factory.mktemp("reports")
    runs = {"tiny": tiny_run, "big": big_run(folder / "run")}
    for name, run in runs.items():
        report_command(run, folder / f"{name}.html", saliency=False, force=False)
    return {name: folder / f"{name}.html" for name in runs}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("name", ["tiny", "big"])
def test_the_page_opens_and_its_clips_play(name, width, scheme, browser, pages):
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
    page.goto(pages[name].as_uri())
    page.click("#play")
    clips = {"tiny": 2, "big": 12}[name]
    moved = "[...document.querySelectorAll('video')].filter(v => v.currentTime > 0.1 && v.videoWidth > 0).length"
    for _ in range(600):  # not wait_for_function, which the page's own policy refuses
        if page.evaluate(moved) == clips:
            break
        page.wait_for_timeout(100)
    assert page.evaluate(moved) == clips
    assert page.inner_text("#play") == "Pause all"
    page.click("#play")
    assert page.evaluate("[...document.querySelectorAll('video')].every(v => v.paused)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    red = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
    assert int(red) > 200 if scheme == "light" else int(red) < 50
    shown = page.evaluate(
        "[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width > 0).length"
    )
    assert shown == page.locator("svg").count() - 1  # one is for the other width
    assert complaints == []
    context.close()


def test_a_page_of_large_clips_stays_below_15_mb(pages):
    assert pages["big"].stat().st_size < 15e6
    assert pages["big"].read_text("utf-8").count("<video") == 12
