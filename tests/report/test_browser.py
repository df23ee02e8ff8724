"""The page in a real browser: figures are drawn, scripts raise nothing, a phone shows it without scrolling sideways."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megakd.report.html import render_report
from tests.report.test_html import EVALS, named, whole, with_tasks

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=20000 --dump-dom"
)
# Errors are counted from before the page's own scripts on; then every figure is drawn and every button pressed.
WATCH = "<script>window.bad = []; window.onerror = (text) => { bad.push(text); };</script>"
PRESS = """<script>
window.addEventListener("load", () => setTimeout(() => {
  window.dispatchEvent(new Event("beforeprint"));
  document.querySelectorAll("button").forEach((button) => button.click());
  setTimeout(() => {
    const root = document.documentElement;
    parent.postMessage({
      errors: bad, inner: innerWidth, wide: root.scrollWidth,
      plots: document.querySelectorAll(".plot").length,
      drawn: document.querySelectorAll(".plot .main-svg").length,
      axes: [...document.querySelectorAll(".xtitle")].map((title) => title.textContent),
    }, "*");
  }, 2000);
}, 500));
</script>"""


# A window is at least 500 pixels wide, a frame is not.
FRAMES = """<!doctype html><html><body><script>
window.onmessage = (event) => {
  const mark = document.createElement("p");
  mark.textContent = JSON.stringify(event.data);
  document.body.append(mark);
};
</script>
<iframe src="page.html" width="390" height="900" style="border: 0"></iframe>
<iframe src="page.html" width="1400" height="900" style="border: 0"></iframe>
</body></html>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_every_figure_is_drawn_and_nothing_overflows(tmp_path: Path):
    run = whole(["experts", "all"], evals=[with_tasks(row, 0.5) for row in EVALS])
    page = render_report(run, [named("another-run-with-a-long-name-" * 3, metrics=run.metrics, evals=EVALS)])
    page = page.replace("<body>", f"<body>{WATCH}").replace("</body></html>", f"{PRESS}</body></html>")
    (tmp_path / "page.html").write_text(page)
    (tmp_path / "frames.html").write_text(FRAMES)
    assert BROWSER is not None
    command = [BROWSER, *OPTIONS.split(), f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1500,2000"]
    done = subprocess.run(
        [*command, (tmp_path / "frames.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    found = [json.loads(html.unescape(text)) for text in re.findall(r"<p>(.*?)</p>", done.stdout, re.DOTALL)]
    assert sorted(each["inner"] for each in found) == [390, 1400], done.stdout[-500:] + done.stderr[-2000:]
    for said in found:
        assert said["errors"] == [] and said["plots"] >= 20
        assert said["drawn"] >= said["plots"] and said["wide"] <= said["inner"], said
        assert "tokens trained on" in said["axes"]  # the last of the buttons of the x axis
