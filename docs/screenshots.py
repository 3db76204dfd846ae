"""Take the pictures of explorer.md, with Chromium and Playwright (pip install playwright).

.venv/bin/python docs/screenshots.py path/to/coco
"""

import sys
import threading
import time
from pathlib import Path

import uvicorn
from playwright.sync_api import sync_playwright

from atss.analysis.explorer import Explorer
from atss.analysis.explorer_server import HOST, make_app
from atss.data import datasets

PORT = 8077
IMAGES = Path(__file__).with_name("images")
# File -> image and link of the page, without the rest of its state.
PICTURES = {
    "explorer_thin": ("000000001490.jpg", "a=MaxIoU&b=ATSS&object=1"),
    "explorer_crowd": ("000000009590.jpg", "a=ATSS&b=ATSS+TOP_K%3D17&object=10"),
    "explorer_none": ("000000000872.jpg", "a=MaxIoU&b=ATSS&object=0"),
}


def main(coco: str) -> None:
    source = f"coco={coco}/annotations/instances_val2017.json:{coco}/val2017"
    explorer = Explorer(datasets.register(source), "ATSS_R_50_FPN_1x", ["MODEL.DEVICE", "cpu"])
    config = uvicorn.Config(make_app(explorer, 0, ["ATSS"]), HOST, PORT, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.1)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for name, (image, link) in PICTURES.items():
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.goto(f"http://{HOST}:{PORT}/#image={explorer.find(image)}&{link}")
            page.wait_for_selector("body[data-state=ready]")
            page.click("#near")
            page.wait_for_timeout(500)  # until the next frames are painted
            file = IMAGES / f"{name}.jpg"
            page.screenshot(path=file, type="jpeg", quality=80)
            print(f"{file}: {file.stat().st_size // 1000} kB")
            page.close()
        browser.close()
    server.should_exit = True
    thread.join()


if __name__ == "__main__":
    main(sys.argv[1])
