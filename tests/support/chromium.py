"""Headless Chromium for tests of pages: it records requests and console errors, and can show a page on a phone."""

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PHONE, DESKTOP = (390, 844), (1280, 900)  # CSS pixels


def missing_program() -> str | None:
    """Return the program that is not installed: Debian's packages are chromium and chromium-driver."""
    return next((name for name in ("chromium", "chromedriver") if shutil.which(name) is None), None)


class Browser:
    """A browser with one page at a time."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, file: Path, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> None:
        """Load a page from a file in a window of a size in CSS pixels, in the light or the dark color scheme."""
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
        self._command("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._command("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get_log("performance")  # of the page before
        self.driver.get_log("browser")
        self.driver.get(file.as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what a script returns in the page. The policy of the page does not apply to it."""
        return self.driver.execute_script(script, *arguments)

    def requests(self) -> list[str]:
        """Return the addresses that were requested since the page was opened; data URIs are none."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith(("data:", "blob:"))]

    def console_errors(self) -> list[str]:
        """Return the errors and warnings in the console since the page was opened."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def screenshot(self, file: Path, whole_page: bool = False) -> None:
        """Write a PNG of the window or of the whole page."""
        options: dict[str, Any] = {"format": "png", "captureBeyondViewport": whole_page}
        if whole_page:
            size = self._command("Page.getLayoutMetrics", {})["cssContentSize"]
            options["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        file.write_bytes(base64.b64decode(self._command("Page.captureScreenshot", options)["data"]))

    def _command(self, method: str, parameters: dict[str, Any]) -> Any:
        return self.driver.execute_cdp_cmd(method, parameters)


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Start a browser with an empty profile folder, and end it."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "WARNING"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
