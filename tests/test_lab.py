"""The notebooks as a reader meets them: JupyterLab in a real browser, Run All Cells from the menu, figures on screen.

Needs Chromium and the `browser` extra; `make verify` runs it.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path for form in ("*.ipynb", "[!.]*/*.ipynb") for path in (ROOT / "notebooks").glob(form))
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
AS_ROOT = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
PATIENCE = 300_000  # milliseconds for the kernel to start and for a notebook to run

CONNECTED = """() => {
    const kernel = window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel
    return kernel?.connectionStatus === 'connected' && kernel.status === 'idle'
}"""
CELLS = """() => {
    const cells = window.jupyterapp.shell.currentWidget.content.model.cells
    return Array.from({length: cells.length}, (_, index) => cells.get(index).toJSON())
}"""
DONE = f"""() => {{
    const code = ({CELLS})().filter(cell => cell.cell_type === 'code')
    const failed = code.some(cell => cell.outputs.some(output => output.output_type === 'error'))
    return failed || (code.every(cell => cell.execution_count) && ({CONNECTED})())
}}"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[str]:
    """A JupyterLab server on a copy of the notebooks without their outputs; yields its address."""
    folder = tmp_path_factory.mktemp("lab")
    for path in NOTEBOOKS:
        copy_without_outputs(path, folder / path.parent.name / path.name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    options = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"]
    options += ["--ServerApp.port_retries=0", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options, str(folder)],
            env={**os.environ, **own, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
        )
        yield f"http://127.0.0.1:{port}/lab"
        server.terminate()
        server.wait(30)


def copy_without_outputs(source: Path, target: Path) -> None:
    """A notebook as if it had never been run: what the browser shows later, it ran itself."""
    notebook = json.loads(source.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(notebook), encoding="utf-8")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a window."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.fail("no Chromium here: install it (Debian: apt-get install chromium)", pytrace=False)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("no playwright here: install the `browser` extra", pytrace=False)
    with sync_playwright() as playwright:
        profile = tmp_path_factory.mktemp("profile")
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=program, headless=True, args=AS_ROOT + QUIET
        )
        yield context
        context.close()


def open_page(browser, address: str):
    """A page on that address; the server may still be starting."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    for _ in range(60):
        try:
            page.goto(address)
            return page
        except Exception as error:
            if "ERR_CONNECTION_REFUSED" not in str(error):
                raise
            page.wait_for_timeout(500)
    pytest.fail("JupyterLab did not start", pytrace=False)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_run_all_cells_from_the_menu(lab, browser, path):
    page = open_page(browser, f"{lab}/tree/{path.parent.name}/{path.name}")
    page.wait_for_function(CONNECTED)
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").click()
    page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
    page.wait_for_function(DONE)
    code = [cell for cell in page.evaluate(CELLS) if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert [output for output in outputs if output["output_type"] == "error"] == []
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for output in outputs)
    page.locator(".jp-OutputArea img[src^='data:image/png']").first.scroll_into_view_if_needed()
    page.close()


def test_there_are_notebooks_to_open():
    assert NOTEBOOKS
