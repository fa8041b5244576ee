"A reader's first minute, for real: JupyterLab in a headless Chromium, run all cells, move a slider."
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOUR = ROOT / "nbs" / "00_start_here.ipynb"
CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
START_SECONDS, RUN_SECONDS = 60, 120   # until the first cell has finished, until all have
EXPLORER = ".jp-OutputArea-output:has(.widget-slider):has(img.widget-image)"


def absent(what):
    "Skip with a reason; in continuous integration nothing may be absent."
    if os.environ.get("CI"): pytest.fail(f"{what}, and continuous integration must not skip this test")
    pytest.skip(what)


def small_notebook():
    "A notebook with one explorer: what the browser test itself is checked against."
    def cell(source, kind="code"):
        more = dict(outputs=[], execution_count=None) if kind == "code" else {}
        return dict(cell_type=kind, id=f"cell{len(source)}", metadata={}, source=source, **more)
    code = ("import ipywidgets as W, matplotlib.pyplot as plt\nfrom llm_workbench.display import explorer\n"
            "def figure(n=3):\n    fig, ax = plt.subplots(figsize=(4, 2))\n    ax.bar(range(n), range(n))\n"
            "    return fig\n"
            "explorer(figure, 'bars', n=W.IntSlider(3, 1, 9, continuous_update=False))")
    cells = [cell("# Small", "markdown"), cell("import sys, llm_workbench; print(sys.executable)"), cell(code),
             cell("print('the', 'end')")]
    metadata = dict(kernelspec=dict(display_name="python3", language="python", name="python3"))
    return json.dumps(dict(cells=cells, metadata=metadata, nbformat=4, nbformat_minor=5))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "(address, folder) of a JupyterLab with settings of its own; it and its kernels are gone afterwards."
    base = tmp_path_factory.mktemp("lab")
    folder = base / "nbs"
    folder.mkdir()
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "JUPYTERLAB_SETTINGS_DIR",
               "JUPYTERLAB_WORKSPACES_DIR")
    own = {name: str(base / name.lower()) for name in folders}
    settings = {  # no dialog that covers the page; every cell stays in the page, also out of sight
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "notebook-extension/tracker": {"windowingMode": "none"}}
    for name, values in settings.items():
        file = Path(own["JUPYTERLAB_SETTINGS_DIR"]) / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {**os.environ, **own, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
               f"--port={port}", "--ServerApp.port_retries=0",
               "--IdentityProvider.token="]  # no token: only this machine reaches 127.0.0.1
    log = base / "lab.log"
    environment["OMP_NUM_THREADS"] = "1"  # the browser draws too, and torch's threads would wait for each other
    server = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True,
                              stdout=log.open("w"), stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.time() + 60
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=5).read()
                break
            except OSError:
                alive = server.poll() is None and time.time() < deadline
                assert alive, f"JupyterLab did not start:\n{log.read_text()[-3000:]}"
                time.sleep(0.3)
        yield address, folder
    finally:
        server.terminate()  # asks it to stop its kernels first
        try: server.wait(30)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM: absent("no Chromium on this machine")
    from playwright.sync_api import sync_playwright
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]
    profile = str(tmp_path_factory.mktemp("profile"))
    with sync_playwright() as p:
        context = p.chromium.launch_persistent_context(profile, executable_path=CHROMIUM, headless=True, args=flags,
                                                       viewport=dict(width=1280, height=900))
        yield context
        context.close()


PROMPTS = """() => [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')]
                   .map(p => p.innerText.trim())"""
ERRORS = '.jp-Notebook [data-mime-type="application/vnd.jupyter.error"]'
FINISHED = f"""n => {{ const prompts = ({PROMPTS})();
                      const failed = document.querySelectorAll('{ERRORS}').length;
                      return failed > 0 || prompts.filter(p => /^\\[\\d+\\]:$/.test(p)).length >= n }}"""


def open_and_run(browser, address, name, cells):
    "A page with the notebook in it, where all `cells` were asked to run and have finished, or one has failed."
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.goto(f"{address}/lab/tree/{name}?reset", wait_until="domcontentloaded")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()
    page.locator(".jp-Notebook .jp-Cell").first.click()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator('[data-command="runmenu:run-all"]').click()
    for n, seconds in ((1, START_SECONDS), (cells, RUN_SECONDS)):
        page.wait_for_function(FINISHED, arg=n, timeout=seconds * 1000)
    return page


def finished(browser, address, name, cells, log):
    "`open_and_run`, tried three times: a busy JupyterLab sometimes loses a click, or a message to a new kernel."
    from playwright.sync_api import TimeoutError
    for attempt in range(3):
        try: return open_and_run(browser, address, name, cells)
        except TimeoutError as e:
            page = browser.pages[-1]
            seen = f"prompts {page.evaluate(PROMPTS)}, dialogs {page.locator('.jp-Dialog').all_inner_texts()}"
            print(f"attempt {attempt + 1}: {str(e).splitlines()[0]}; {seen}")
            page.close()
    pytest.fail(f"{name} never finished ({seen}); the end of JupyterLab's log:\n{log.read_text()[-3000:]}")


def picture(output):
    "The bytes of the picture that the explorer shows now."
    return output.locator("img.widget-image").first.evaluate(
        "async image => Array.from(new Uint8Array(await (await fetch(image.src)).arrayBuffer())).join()")


@pytest.mark.parametrize("which", ["small", "tour"])
def test_a_notebook_runs_and_its_slider_moves_the_picture(lab, browser, which):
    from playwright.sync_api import expect
    address, folder = lab
    file = folder / f"{which}.ipynb"
    if which == "small": file.write_text(small_notebook())
    elif TOUR.exists(): shutil.copyfile(TOUR, file)
    else: absent(f"{TOUR.relative_to(ROOT)} is not there")
    code_cells = [c for c in json.loads(file.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    not_empty = sum(bool("".join(c["source"]).strip()) for c in code_cells)

    page = finished(browser, address, file.name, not_empty, folder.parent / "lab.log")
    errors = page.locator(ERRORS)
    assert errors.count() == 0, errors.first.inner_text()[-3000:]
    expect(page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')).to_be_visible(timeout=60_000)

    output = page.locator(EXPLORER).first
    expect(output).to_be_visible()
    output.scroll_into_view_if_needed()
    handle, before, changed = output.locator(".widget-slider .noUi-handle").first, picture(output), False
    for key in ("ArrowRight", "ArrowLeft"):  # the slider may stand at one of its ends
        handle.focus()
        for _ in range(2): handle.press(key)
        deadline = time.time() + 20
        while not changed and time.time() < deadline:
            changed = picture(output) != before
            page.wait_for_timeout(200)
        if changed: break
    assert changed, "the slider moved, the picture did not"

    if os.environ.get("SCREENSHOT_DIR"):
        target = Path(os.environ["SCREENSHOT_DIR"])
        target.mkdir(parents=True, exist_ok=True)
        output.scroll_into_view_if_needed()
        page.wait_for_timeout(500)
        page.screenshot(path=target / f"jupyterlab_{which}.png")

    page.keyboard.press("Escape")
    page.locator('jp-button[data-command="docmanager:save"]').click()
    deadline = time.time() + 30
    while True:
        saved = json.loads(file.read_text(encoding="utf-8"))["cells"]
        counts = [c["execution_count"] for c in saved if c["cell_type"] == "code"]
        if sum(n is not None for n in counts) >= not_empty: break
        assert time.time() < deadline, "the notebook was not saved after its run"
        time.sleep(0.3)
    assert len(counts) == len(code_cells)
    assert not [o for c in saved for o in c.get("outputs", []) if o["output_type"] == "error"]
    if which == "small":
        printed = "".join(t for c in saved for o in c.get("outputs", []) for t in o.get("text", []))
        assert Path(printed.splitlines()[0]).samefile(sys.executable), "the kernel runs another Python than this test"
    page.close()
