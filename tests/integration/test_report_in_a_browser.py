"""The page of a run in headless Chromium, driven through ChromeDriver; axe-core if AXE names it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fundamentallm.files.lock import run_lock
from fundamentallm.reports.comparison import compare
from fundamentallm.reports.forms import section
from fundamentallm.reports.live import LivePage
from fundamentallm.reports.page import chart_data, page
from fundamentallm.reports.run_data import read_run, stamp

pytestmark = pytest.mark.outside

HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"


class Browser:
    """A session of ChromeDriver."""

    def __init__(self, port: int, profile: Path, width: int = 1200) -> None:
        self.server = f"http://127.0.0.1:{port}"
        self.path = ""
        flags = [
            "headless",
            "no-sandbox",
            "disable-gpu",
            "no-first-run",
            "disable-background-networking",
            "disable-component-update",
            "disable-sync",
            f"user-data-dir={profile}",
            f"window-size={width},1600",
        ]
        options = {
            "browserName": "chrome",
            "goog:chromeOptions": {"args": [f"--{flag}" for flag in flags]},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        made = self.call("POST", "/session", {"capabilities": {"alwaysMatch": options}})
        self.path = f"/session/{made['sessionId']}"

    def call(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            self.server + self.path + path,
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, address: str) -> None:
        self.call("POST", "/url", {"url": "about:blank"})
        self.log("performance")
        self.call("POST", "/url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def wait_for(self, script: str) -> Any:
        end = time.monotonic() + 20
        while not (value := self.run(script)) and time.monotonic() < end:
            time.sleep(0.1)
        return value

    def press(self, key: str) -> None:
        event = "new KeyboardEvent('keydown', {key: arguments[0]})"
        self.run(f"document.activeElement.dispatchEvent({event})", key)

    def log(self, kind: str) -> list[Any]:
        found: list[Any] = self.call("POST", "/se/log", {"type": kind})
        return found

    def requests(self) -> list[str]:
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def move_to(self, share: float) -> str:
        """Move the pointer over the first chart, and return what is told there."""
        script = """
            const plot = document.querySelector(".plot"), box = plot.getBoundingClientRect();
            plot.dispatchEvent(new PointerEvent("pointermove",
              {clientX: box.left + box.width * arguments[0], clientY: box.top + 60}));
            return document.querySelector(".hover").innerText;
        """
        return str(self.run(script, share))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.fail("chromedriver is not installed: apt-get install chromium chromium-driver")
    port = 9515
    process = subprocess.Popen(
        [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        browser = Browser(port, tmp_path_factory.mktemp("profile"))
        yield browser
        browser.call("DELETE", "")
    finally:
        process.terminate()
        process.wait()


def write_run(path: Path, steps: int, text: str = "text") -> Path:
    (path / "incidents" / "00000040-data").mkdir(parents=True)
    (path / "config.yaml").write_text("name: run\n")
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            place = {"step": step, "tokens": 64 * step, "elapsed_seconds": step / 4}
            loss = 2 + 100 / (step + 50) + (step * 7919 % 1000) / 1e4
            values = {"train/loss": loss, "train/loss_ema": loss, "train/lr": 1 / step}
            more = {"train/grad_norm": loss / 2, "train/tokens_per_second": 1e4 + step % 7}
            file.write(json.dumps({**place, **values, **more}) + "\n")
            if step % 10 == 0:
                file.write(json.dumps({**place, "val/loss": loss}) + "\n")
    usual = {"longest": 3.5, "distinct": 0.9, "repeated": 2.0, "count": 4}
    copying = {"longest": 3, "start": 1, "place": text, "repeated": 1, "validation": usual}
    sample = {"prompt": text, "text": text, "copying": copying}
    samples = [{"step": step, **sample} for step in (10, 20)]
    usage = {"process": 1.0, "step": 20, "seconds": {"training": 9.0}, "joules": {"cpu": 40.0}}
    (path / "usage.jsonl").write_text(json.dumps(usage) + "\n")
    (path / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
    report = {"step": 40, "fault": text, "verdict": "data", "decision": "skipped"}
    (path / "incidents" / "00000040-data" / "report.json").write_text(json.dumps(report))
    return path


def opened(browser: Browser, run: Path) -> None:
    file = run / "report.html"
    file.write_bytes(page([read_run(run)]))
    browser.open(file.as_uri())


def test_hover_keyboard_zoom_and_axes(browser: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 50)
    opened(browser, run)
    series = chart_data([read_run(run)])["charts"][0]["series"][0]
    browser.run("document.querySelector('.plot').focus()")
    for key, step in (("Home", 1), ("ArrowRight", 2), ("End", 50), ("ArrowLeft", 49)):
        browser.press(key)
        told = browser.run("return document.querySelector('.plot').getAttribute('aria-valuetext')")
        value = f"{series['value'][step - 1]:.8g}"
        assert f"training: {value} at step {step}" in told
    told = browser.move_to(0.99)
    assert f"training: {series['value'][-1]:.8g} at step 50" in told
    browser.run("document.querySelector('.plot').focus()")
    browser.press("Home")
    browser.press("+")
    browser.press("End")
    told = browser.run("return document.querySelector('.plot').getAttribute('aria-valuetext')")
    assert "at step 50" not in told
    browser.press("Escape")
    assert "incident at step 40: text" in str([browser.move_to(i / 400) for i in range(300, 360)])
    for box in ("logx", "logy"):
        browser.run("document.getElementById(arguments[0]).click()", box)
        assert browser.run("return document.querySelectorAll('svg path.curve').length") == 6
    assert not browser.log("browser")


def test_a_drag_that_ends_beside_the_chart_zooms(browser: Browser, tmp_path: Path) -> None:
    opened(browser, write_run(tmp_path / "run", 50))
    box = browser.run(
        "const plot = document.querySelector('.plot'); plot.scrollIntoView();"
        " const box = plot.getBoundingClientRect();"
        " return [Math.round(box.left + box.width / 2), Math.round(box.top + 60),"
        " Math.round(box.right + 40)]"
    )
    middle, height, beyond = box
    moves = [
        {"type": "pointerMove", "x": middle, "y": height},
        {"type": "pointerDown", "button": 0},
        {"type": "pointerMove", "x": beyond, "y": height},
        {"type": "pointerUp", "button": 0},
    ]
    pointer = {"type": "pointer", "id": "mouse", "actions": moves}
    browser.call("POST", "/actions", {"actions": [pointer]})
    assert browser.run("return document.querySelector('rect.zoom').getAttribute('width')") == "0"
    browser.run("document.querySelector('.plot').focus()")
    browser.press("Home")
    told = browser.run("return document.querySelector('.plot').getAttribute('aria-valuetext')")
    assert told.startswith("step 2")  # of 50, the second half is shown
    assert not browser.log("browser")


def test_texts_do_not_run_and_nothing_is_requested(browser: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "<img src=x onerror='window.broken = 1'>", 50, HOSTILE)
    opened(browser, run)
    assert browser.run("return document.querySelectorAll('svg path.curve').length") == 6
    told = [browser.move_to(i / 400) for i in range(300, 360)]
    assert any("incident at step 40: </script><script>" in one for one in told)
    assert browser.run("return window.broken === undefined && !document.querySelector('img')")
    requests = browser.requests()
    assert [one for one in requests if not one.startswith("file:")] == []
    assert len(requests) == 1
    assert not browser.log("browser")


def test_200_000_lines_load_within_two_seconds(browser: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 180_000)
    opened(browser, run)
    assert (run / "report.html").stat().st_size < 5e6
    ended = browser.run("return performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert 0 < ended < 2000
    assert "bin of steps" in browser.move_to(0.5)


def test_a_served_page_follows_the_run(browser: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 50)
    with LivePage(lambda: page([read_run(run)], refresh=0.2), lambda: stamp(run)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        browser.open(server.address)
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 51, "tokens": 1, "elapsed_seconds": 1, "train/loss": 1.25}\n')
        script = "return document.querySelector('.plot').getAttribute('aria-valuetext')"
        assert browser.wait_for(f"{script}.includes('1.25 at step 51')")
        with (run / "samples.jsonl").open("a") as file:  # after the metrics of its step
            file.write('{"step": 51, "prompt": "", "text": "the last sample"}\n')
        script = "return document.getElementById('samples').textContent"
        assert browser.wait_for(f"{script}.includes('the last sample')")
        state = "return document.getElementById('state').textContent"
        with run_lock(run):
            assert browser.wait_for(f"{state} === 'running'")
        assert browser.wait_for(f"{state} === 'not finished'")
        (run / "config.yaml").rename(run / "moved.yaml")
        (run / "metrics.jsonl").rename(run / "moved.jsonl")
        assert browser.wait_for(f"{state}.includes('cannot be read now')")
        (run / "moved.yaml").rename(run / "config.yaml")
        (run / "moved.jsonl").rename(run / "metrics.jsonl")
        assert browser.wait_for(f"{state} === 'not finished'")
        server.shutdown()
        thread.join()
        server.server_close()
        assert browser.wait_for(
            "return document.getElementById('state').textContent.includes('has ended')"
        )
    expected = ("ERR_CONNECTION", "ERR_SOCKET", "503")  # of a server that ends
    messages = [one["message"] for one in browser.log("browser")]
    assert not [one for one in messages if not any(word in one for word in expected)]


@pytest.mark.parametrize("num_runs", [1, 4])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation(
    browser: Browser, tmp_path: Path, scheme: str, num_runs: int
) -> None:
    if "AXE" not in os.environ:
        pytest.skip("AXE does not name axe.min.js of axe-core")
    runs = [read_run(write_run(tmp_path / f"run-{i}", 50 + i)) for i in range(num_runs)]
    assert runs[0].samples[0].copying
    assert runs[0].spent.joules
    file = tmp_path / "page.html"
    file.write_bytes(page(runs, section(compare(runs)) if num_runs > 1 else None))
    browser.open(file.as_uri())
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    command = {"cmd": "Emulation.setEmulatedMedia", "params": {"features": media}}
    browser.call("POST", "/goog/cdp/execute", command)
    browser.run(Path(os.environ["AXE"]).read_text(encoding="utf-8"))
    script = "const done = arguments[0]; axe.run().then((found) => done(found.violations))"
    assert browser.call("POST", "/execute/async", {"script": script, "args": []}) == []
