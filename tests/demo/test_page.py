"""The page of `emax demo` in a browser: what it shows and says, the keyboard, small screens."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
from browser import Page, open_page
from PIL import Image

from emax_timm.training.data import SAMPLES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

START = (
    "import sys; from emax_cli import main; sys.exit(main(['demo', '--port', '0', *sys.argv[1:]]))"
)
STATUS = "document.querySelector('[role=status]').innerText"
REFUSED = "document.querySelector('#refused').innerText"
PICTURES = "[...document.querySelectorAll('.demo-picture img')].map(image => image.src)"
LOADED = (
    "[...document.querySelectorAll('.demo-picture img')]"
    ".filter(image => image.complete && image.naturalWidth > 0 && image.alt).length == 2"
)
FIELD = "input[type=file]"
FOCUS = "(e => [e.type, e.value, e.innerText, e.ariaLabel].join(' '))(document.activeElement)"


@contextmanager
def served(
    *arguments: str, folder: Path, **environment: str
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start `emax demo` with a folder for its temporary files; its address and process."""
    if importlib.util.find_spec("gradio") is None:
        message = "no gradio: pip install 'emax-timm[demo]'"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    process = subprocess.Popen(
        [sys.executable, "-c", START, *arguments],
        env={**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " on http://127.0.0.1:" in line, process.communicate()
        yield line.split(" on ")[1].split(";")[0], process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(folder=tmp_path_factory.mktemp("demo")) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def clothes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The last image of each class of the sample, by its class."""
    folder, found = tmp_path_factory.mktemp("clothes"), {}
    with tarfile.open(SAMPLES / "fashion_mnist" / "test.tar") as archive:
        for member in archive:
            source = archive.extractfile(member) if member.isfile() else None
            if source is not None:
                label = member.name.split("/")[-2].partition("_")[2]
                found[label] = folder / f"{label}.png"
                found[label].write_bytes(source.read())
    return found


def show(page: Page, address: str, width: int = 1280, height: int = 900) -> None:
    page.open(address, width, height)
    page.wait_for(f"!!document.querySelector('{FIELD}')")


def checked(page: Page, address: str) -> None:
    """The console has no errors, and the page has asked nobody else for anything."""
    page.evaluate("1")  # what has been told until now has been read then
    assert page.errors() == []
    elsewhere = [url for url in page.requested() if not url.startswith((address, "data:", "blob:"))]
    assert elsewhere == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_image_is_classified_and_drawn(
    width: int, height: int, dark: bool, address: str, browser: Page, clothes: dict[str, Path]
) -> None:
    browser.open(address, width, height, dark)
    browser.wait_for(f"!!document.querySelector('{FIELD}')")
    browser.upload(FIELD, clothes["ankle-boot"])
    browser.wait_for(f"{STATUS}.startsWith('Most likely: Ankle boot (92%)')")
    browser.wait_for(LOADED)
    rows = browser.evaluate("[...document.querySelectorAll('tbody tr')].map(e => e.innerText)")
    assert [row.split()[0] for row in rows] == [f"layer{i}.0.se" for i in (1, 2, 3, 4)]
    assert "Ankle boot\n92%" in browser.evaluate("document.body.innerText")
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    cut = "[...document.querySelectorAll('button, label, th, td, p, h1')].filter(element => {"
    cut += "const box = element.getBoundingClientRect(); return box.width && box.right > innerWidth"
    cut += "}).map(element => element.innerText)"
    assert browser.evaluate(cut) == []
    if folder := os.environ.get("EMAX_TEST_SCREENSHOTS"):
        time.sleep(1)
        browser.screenshot(Path(folder, f"demo-{width}{'-dark' * dark}.png"))
    checked(browser, address)


def test_stage_and_group_are_chosen(address: str, browser: Page, clothes: dict[str, Path]) -> None:
    show(browser, address)
    browser.upload(FIELD, clothes["ankle-boot"])
    browser.wait_for(LOADED)
    seen = [browser.evaluate(PICTURES)]
    browser.evaluate("document.querySelector('input[type=radio][value=layer2]').click()")
    browser.wait_for(f"{PICTURES}[0] != {seen[-1][0]!r} && {PICTURES}[1] != {seen[-1][1]!r}")
    seen.append(browser.evaluate(PICTURES))
    browser.wait_for("document.body.innerText.includes('Group of 16; 0 is their mean')")
    browser.evaluate("document.querySelector('input[type=range]').focus()")
    browser.press("ArrowRight")
    browser.wait_for(f"{PICTURES}[0] != {seen[-1][0]!r}")
    browser.wait_for(LOADED)
    assert browser.evaluate(PICTURES)[1] == seen[-1][1]  # Grad-CAM has no groups
    checked(browser, address)


def tab_to(page: Page, words: str) -> None:
    for _ in range(40):
        page.press("Tab")
        if words in page.evaluate(FOCUS):
            return
    raise AssertionError(f"the focus never came to {words}")


def test_keyboard_does_all_that_the_mouse_does(address: str, browser: Page) -> None:
    show(browser, address)
    browser.evaluate("document.activeElement.blur()")
    tab_to(browser, "Drop an image file here to upload")
    tab_to(browser, "sneaker")
    browser.press("Enter")
    browser.wait_for(f"{STATUS}.startsWith('Most likely: Sneaker')")
    browser.wait_for(LOADED)
    before = browser.evaluate(PICTURES)
    tab_to(browser, "radio layer2")
    browser.press("Space")
    browser.wait_for(f"{PICTURES}[0] != {before[0]!r}")
    browser.wait_for("document.querySelector('input[type=range]').max > 1")
    tab_to(browser, "range")
    before = browser.evaluate(PICTURES)
    browser.press("ArrowRight")
    browser.wait_for(f"{PICTURES}[0] != {before[0]!r}")
    ring = "getComputedStyle(document.activeElement)"
    assert browser.evaluate(f"{ring}.outlineStyle != 'none' || {ring}.boxShadow != 'none'")
    checked(browser, address)


RED = Image.new("RGB", (40, 30), "red")


def write_bad(name: str, path: Path) -> None:
    if name == "large.png":
        with path.open("wb") as file:
            file.truncate(200 * 2**20)
    elif name.startswith("cut"):
        RED.save(path)
        path.write_bytes(path.read_bytes()[:-30])
    elif name.startswith("cmyk"):
        RED.convert("CMYK").save(path)
    elif name.startswith("pixel"):
        RED.resize((1, 1)).save(path)
    elif name.startswith("animated"):
        RED.save(path, save_all=True, append_images=[RED.rotate(90)])
    elif name.endswith("tiff"):
        RED.save(path)
    else:
        path.write_text("not an image")


MESSAGES = {
    "text.png": (STATUS, "This file cannot be read as an image: not an image of a known format."),
    "notes.txt": (REFUSED, "notes.txt is not an image. Choose a file such as a PNG or a JPEG."),
    "large.png": (REFUSED, "large.png has 200 MB. Images may have up to 20 MB."),
    "cut.png": (STATUS, "This file cannot be read as an image: "),
    "pixel.png": (STATUS, "This image has 1 x 1 pixels, in which there is nothing to see."),
    "cmyk.jpg": (STATUS, "This image is in CMYK, the colours of print; it was turned into RGB."),
    "animated.gif": (STATUS, "This file has several frames; only the first was looked at."),
    "page.tiff": (STATUS, "Most likely: "),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_unusual_file_gets_a_message(
    name: str, address: str, browser: Page, tmp_path: Path, clothes: dict[str, Path]
) -> None:
    show(browser, address)
    write_bad(name, tmp_path / name)
    browser.upload(FIELD, tmp_path / name)
    where, message = MESSAGES[name]
    browser.wait_for(f"{where}.includes({message!r})")
    shown = "[...document.querySelectorAll('img')].every(e => e.complete && e.naturalWidth > 0)"
    browser.wait_for(shown)  # no sign of an image that the browser cannot show
    if folder := os.environ.get("EMAX_TEST_SCREENSHOTS"):
        time.sleep(1)
        browser.screenshot(Path(folder, f"demo-{name}.png"))
    # The next image is shown, and the message is gone.
    browser.evaluate("document.querySelector('[aria-label=Clear]')?.click()")
    browser.wait_for(f"!!document.querySelector('{FIELD}')")
    browser.upload(FIELD, clothes["bag"])
    browser.wait_for(f"{STATUS} == 'Most likely: Bag (91%).' && {REFUSED} == ''")
    checked(browser, address)


def test_file_is_dropped(
    address: str, browser: Page, clothes: dict[str, Path], tmp_path: Path
) -> None:
    show(browser, address)
    area = "[aria-label^='Drop an image']"
    for name in ("large.png", "notes.txt"):
        write_bad(name, tmp_path / name)
        browser.drop(area, tmp_path / name)
        browser.wait_for(f"{REFUSED} == {MESSAGES[name][1]!r}")
    browser.drop(area, clothes["bag"])
    browser.wait_for(f"{STATUS} == 'Most likely: Bag (91%).' && {REFUSED} == ''")
    checked(browser, address)


def test_image_is_pasted(address: str, browser: Page) -> None:
    show(browser, address)
    browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite"])
    red = "const c = document.createElement('canvas'); c.width = c.height = 40;"
    red += "c.getContext('2d').fillRect(0, 0, 20, 40); c.toBlob(b => done(b))"
    copy = f"new Promise(done => {{{red}}})"
    copy += ".then(blob => navigator.clipboard.write([new ClipboardItem({'image/png': blob})]))"
    browser.call("Page.bringToFront")
    browser.evaluate(copy)
    browser.evaluate("document.querySelector('[aria-label=\"Paste from clipboard\"]').click()")
    browser.wait_for(f"{STATUS}.startsWith('Most likely: ')")
    browser.wait_for(LOADED)
    checked(browser, address)


def test_file_that_is_too_large_is_refused_without_the_page(address: str) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body += bytes(21 * 2**20) + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{address}/gradio_api/upload", body, headers)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == 413


def test_files_of_the_machine_cannot_be_examined(address: str, tmp_path: Path) -> None:
    """A client that is no browser names a file that it has not uploaded."""
    RED.save(tmp_path / "image.png")
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="image.png"\r\n\r\n'
    body += (tmp_path / "image.png").read_bytes() + b"\r\n--x--\r\n"
    (uploaded,) = asked(f"{address}/gradio_api/upload", body, "multipart/form-data; boundary=x")
    assert examined(address, uploaded)
    assert not examined(address, str(tmp_path / "image.png"))


def asked(url: str, body: bytes | None = None, kind: str = "application/json") -> Any:
    request = urllib.request.Request(url, body, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def examined(address: str, path: str) -> bool:
    """Whether the server examines the image of a path on its machine."""
    events = asked(f"{address}/config")["dependencies"]
    event = next(event["id"] for event in events if event["targets"][0][1] == "input")
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    session = Path(path).parent.name
    message = {"data": [file, "layer1"], "fn_index": event, "session_hash": session}
    asked(f"{address}/gradio_api/queue/join", json.dumps(message).encode())
    url = f"{address}/gradio_api/queue/data?session_hash={session}"
    with urllib.request.urlopen(url, timeout=60) as answer:
        told = [json.loads(line[6:]) for line in answer if line.startswith(b"data: ")]
    (done,) = [event for event in told if event["msg"] == "process_completed"]
    return done["success"]


def test_two_users_see_their_own_images(
    address: str, browser: Page, clothes: dict[str, Path], tmp_path: Path
) -> None:
    with open_page(tmp_path / "other") as other:
        users = {"Ankle boot": browser, "Bag": other}
        for page in users.values():
            show(page, address)
        for name, page in users.items():
            page.upload(FIELD, clothes[name.lower().replace(" ", "-")])
        for page in users.values():
            page.wait_for(LOADED)
        before = {name: page.evaluate(PICTURES) for name, page in users.items()}
        for page in users.values():
            page.evaluate("document.querySelector('input[type=radio][value=layer3]').click()")
        for name, page in users.items():
            page.wait_for(f"{PICTURES}[1] != {before[name][1]!r}")
            alt = page.evaluate("document.querySelectorAll('.demo-picture img')[1].alt")
            assert alt == f"Grad-CAM of layer3 for {name} over the image"
            assert page.evaluate(STATUS).startswith(f"Most likely: {name}")
        assert not set(browser.evaluate(PICTURES)) & set(other.evaluate(PICTURES))


def test_model_without_attention_says_so_and_ends_without_a_trace(
    browser: Page, clothes: dict[str, Path], tmp_path: Path
) -> None:
    model: Any = timm.create_model("test_resnet", num_classes=3)
    timm.models.save_for_hf(model, str(tmp_path / "plain"), safe_serialization=True)
    (tmp_path / "tmp").mkdir()
    arguments = ("--model", f"local-dir:{tmp_path / 'plain'}")
    with (
        socket.create_server(("127.0.0.1", 0)) as proxy,
        served(
            *arguments,
            folder=tmp_path / "tmp",
            HTTPS_PROXY=f"http://127.0.0.1:{proxy.getsockname()[1]}",
            NO_PROXY="127.0.0.1",
        ) as (address, process),
    ):
        show(browser, address)
        browser.upload(FIELD, clothes["bag"])
        browser.wait_for(f"{STATUS}.startsWith('Most likely: class ')")
        text = browser.evaluate("document.body.innerText")
        assert "This model has no EMAX, EMA, CBAM, SE or ECA layer, so there is no map" in text
        cams = "[...document.querySelectorAll('.demo-picture img')].map(image => image.alt)"
        browser.wait_for(f"{cams}.join().startsWith('Grad-CAM of ')")
        checked(browser, address)
        assert [*(tmp_path / "tmp").glob("emax-demo-*/*")]
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=60)
        assert (process.returncode, out, errors) == (0, "", "")
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):  # the server has asked nobody for anything
            proxy.accept()
    assert not [*(tmp_path / "tmp").glob("emax-demo-*")]
