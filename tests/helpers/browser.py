"""Headless Chromium for tests of pages: Debian's own browser and driver, nothing is fetched."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "no chromium and chromedriver on this machine (Debian: apt-get install chromium chromium-driver)"

QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--hide-scrollbars",
    "--disable-dev-shm-usage", "--force-color-profile=srgb",
)  # fmt: skip


class Browser:
    """One browser; `open` starts a page in a window of a given size and colour scheme."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str, *, width: int = 1280, height: int = 800, scheme: str = "light") -> None:
        """Open a page and wait until it is ready; forgets what was logged before."""
        # The size of the page itself: windows of a desktop browser cannot be as narrow as a telephone.
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.emulate(scheme=scheme)
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(url)
        self.wait("document.documentElement.dataset.ready === 'yes'")
        self.settle()

    def emulate(self, *, scheme: str, media: str = "") -> None:
        """Light or dark, screen or print."""
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})

    def wait(self, condition: str, seconds: float = 20) -> None:
        """Until a JavaScript expression is true."""
        WebDriverWait(self.driver, seconds, 0.05).until(lambda driver: driver.execute_script(f"return {condition}"))

    def settle(self) -> None:
        """Until what was asked for is drawn."""
        self.driver.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 0)))"
        )

    def run(self, script: str, *arguments: object) -> object:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def find_all(self, selector: str):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def complaints(self) -> list[str]:
        """What the console holds: errors, warnings, refusals of the content policy."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[str]:
        """Addresses asked for since `open`."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def shoot(self, path: Path) -> Path:
        self.settle()
        self.driver.save_screenshot(str(path))
        return path


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a fresh profile; `profile` is an empty folder."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for flag in (*QUIET, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # With both paths given selenium looks for no driver of its own; the variables say so once more.
    os.environ.setdefault("SE_OFFLINE", "true")
    os.environ.setdefault("SE_AVOID_STATS", "true")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER or ""))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


# --- reading and handling a report ---


def pixels(page, number=0):
    """RGB (rows, columns, 3) of a canvas, as drawn."""
    page.settle()
    data = page.run("return document.querySelectorAll('.well canvas')[arguments[0]].toDataURL()", number)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))).convert("RGB")).astype(int)


def press(page, *keys, selector=".well"):
    page.run("document.querySelector(arguments[0]).focus()", selector)
    for key in keys:
        ActionChains(page.driver).send_keys(key).perform()
    page.settle()


def hover(page, x, y, number=0):
    """Point at a place of a canvas, in shares of its width and height; returns what is read out."""
    canvas = page.find_all(".well canvas")[number]
    box = canvas.rect
    ActionChains(page.driver).move_to_element_with_offset(
        canvas, round((x - 0.5) * box["width"]), round((y - 0.5) * box["height"])
    ).perform()
    page.settle()
    return page.text("#readout")
