"""The report in a real browser: Debian's Chromium, headless, driven over its debugging pipe."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess

import numpy as np
import pytest

from lensjax.report.html import render_html

pytestmark = pytest.mark.slow

LUMINANCE = """
const channel = c => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
const luminance = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
const parse = text => text.match(/[0-9.]+/g).map(Number);
const ground = node => {
  for (let at = node; at; at = at.parentElement) {
    const colour = parse(getComputedStyle(at).backgroundColor);
    if (colour.length === 3 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
};
const poor = [];
for (const node of document.querySelectorAll('main *')) {
  const own = [...node.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  if (!own || ['TITLE', 'DESC', 'STYLE'].includes(node.tagName.toUpperCase())) continue;
  const style = getComputedStyle(node);
  const ink = parse(node.namespaceURI.endsWith('svg') ? style.fill : style.color);
  const [a, b] = [luminance(ink), luminance(ground(node))].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) poor.push(`${node.tagName} ${ratio.toFixed(2)} ${node.textContent.slice(0, 30)}`);
}
poor
"""
SIZES = (
    "[...document.querySelectorAll('svg[role=img]')].map(f => f.getBoundingClientRect()).map(r => [r.width, r.height])"
)
CUT = """
[...document.querySelectorAll('svg[role=img]')].flatMap(figure => {
  const edge = figure.getBoundingClientRect();
  return [...figure.querySelectorAll('text')].filter(t => {
    const r = t.getBoundingClientRect();
    return r.left < edge.left - 1 || r.right > edge.right + 1 || r.top < edge.top - 1 || r.bottom > edge.bottom + 1;
  }).map(t => t.textContent);
})
"""


class Chromium:
    """One page in a browser; what it says on its console and asks of the network is kept."""

    def __init__(self, profile):
        program = shutil.which("chromium")
        assert program is not None, "this test needs Debian's chromium: apt-get install chromium"
        down, up = os.pipe(), os.pipe()

        # The browser reads commands from 3 and writes to 4; numbers above those cannot be overwritten on the way.
        read, write = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (down[0], up[1]))
        profile = f"--user-data-dir={profile}"
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe")
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "bash", program, *options, profile, "about:blank"],
            pass_fds=(read, write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (down[0], up[1], read, write):
            os.close(end)
        self.input, self.output, self.rest = down[1], up[0], b""
        self.number, self.said, self.asked, self.loaded = 0, [], [], False
        target = next(t for t in self.do("Target.getTargets")["targetInfos"] if t["type"] == "page")["targetId"]
        self.session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.do(f"{domain}.enable")

    session = None

    def message(self):
        while b"\0" not in self.rest:
            part = os.read(self.output, 1 << 16)
            assert part, "the browser has gone"
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\0")
        return json.loads(line)

    def note(self, message):
        name, facts = message.get("method", ""), message.get("params", {})
        if name in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.said.append(facts)
        if name == "Page.javascriptDialogOpening":
            self.said.append(facts)
        if name == "Network.requestWillBeSent":
            self.asked.append(facts["request"]["url"])
        self.loaded |= name == "Page.loadEventFired"

    def do(self, method, **params):
        self.number += 1
        call = {"id": self.number, "method": method, "params": params}
        os.write(self.input, json.dumps(call | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while (message := self.message()).get("id") != self.number:
            self.note(message)
        assert "error" not in message, message
        return message["result"]

    def open(self, path, *, width, dark=False):
        self.said, self.asked, self.loaded = [], [], False
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.do("Emulation.setEmulatedMedia", features=[scheme])
        self.do("Page.navigate", url=path.as_uri())
        while not self.loaded:
            self.note(self.message())

    def ask(self, expression):
        found = self.do("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def close(self):
        with contextlib.suppress(OSError):
            os.close(self.input)
        self.process.wait(timeout=30)
        os.close(self.output)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Chromium(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def pages(make, hostile, tmp_path):
    """A plain report and one whose every name and text means harm."""
    plain, evil = tmp_path / "plain.html", tmp_path / "evil.html"
    tangents = {"alpha": {"kernel_spectrum": [3.0, 1.0, 0.1], "trace_by_layer": {"head": 2.0}}}
    plain.write_text(
        render_html(make("averaged", "lens", truth=np.array([1.0, 2, 3]), facts={"tangents": tangents})), "utf-8"
    )
    facts = {"tune_command": hostile[1], "notes": [hostile[0]], "specification": {hostile[0]: hostile[1]}}
    selection = make(names=hostile, source=hostile[0], failures={hostile[1]: hostile[0]}, facts=facts)
    evil.write_text(render_html(selection), "utf-8")
    return {"plain": plain, "evil": evil}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", ["plain", "evil"])
def test_it_renders(browser, pages, name, width, dark):
    browser.open(pages[name], width=width, dark=dark)
    assert browser.ask("document.querySelectorAll('details').forEach(d => d.open = true); 'open'") == "open"
    assert browser.said == []
    assert browser.asked == [pages[name].as_uri()]
    assert browser.ask("document.documentElement.scrollWidth <= window.innerWidth")
    figures = browser.ask(SIZES)
    assert len(figures) == {"plain": 3 + 1 + 2, "evil": 4 + 1}[name]
    assert all(w >= 200 and h >= 20 for w, h in figures), figures
    assert browser.ask(CUT) == []
    assert browser.ask(LUMINANCE) == []
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == (
        "rgb(15, 19, 26)" if dark else "rgb(244, 246, 249)"
    )
    assert browser.ask("document.querySelectorAll('script, img, link').length") == 0
    assert browser.ask("document.querySelector('h1').innerText").startswith("Fine-tune ")


def test_the_check_itself_sees_what_it_is_for(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><main style='width:2000px;background:#fff'><p style='color:#aaa'>pale</p>"
        "<script>console.error('no')</script><img src='https://evil.example/x.png'></main>"
    )
    browser.open(page, width=390)
    assert browser.said
    assert len(browser.asked) == 2
    assert not browser.ask("document.documentElement.scrollWidth <= 390")
    assert browser.ask(LUMINANCE) == ["P 2.32 pale"]
