"""The pictures of README.md: an asset graph and a report, of a real run, in headless Chromium.

    python -m docs.make_pictures [FOLDER]

runs the demo with its state in FOLDER (a temporary one by default; a second call with the same folder only
takes the pictures) and writes docs/pictures/*.png.
"""

import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageOps

from roma_core.files import read_json
from tests.end_to_end.served import Pages, chromium

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
EXPERIMENT = "japanese_vowels"
MAX_BYTES = 120_000


def save(shot: bytes, name: str, width: int) -> None:
    """With at most so many pixels in width, and few colours."""
    image = Image.open(io.BytesIO(shot)).convert("RGB")
    image.thumbnail((width, 4 * width), Image.Resampling.LANCZOS)
    image = ImageOps.expand(image, 1, "#d0d0d0")
    path = PICTURES / f"{name}.png"
    image.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {image.size}, {path.stat().st_size:,} bytes")
    if path.stat().st_size > MAX_BYTES:
        sys.exit(f"expected at most {MAX_BYTES:,} bytes; make it narrower")


def main(folder: Path) -> None:
    environment = {"ROMA_STORAGE_ROOT": str(folder / "roma"), "PYTHONPATH": str(ROOT)}
    demo = [sys.executable, "-m", "roma_pipelines.cli", "demo", EXPERIMENT]
    subprocess.run(demo, cwd=folder, env=os.environ | environment, check=True)
    jobs = [
        path for path in folder.glob("roma/jobs/*/config.json") if "classifier" in read_json(path)
    ]
    report = max(jobs, key=lambda path: path.stat().st_mtime).parent / "outputs" / "report.html"
    PICTURES.mkdir(exist_ok=True)
    pages = Pages(folder)
    try:
        with chromium() as browser:
            page = browser.new_page(viewport={"width": 1500, "height": 620}, device_scale_factor=2)
            page.goto(f"{pages.dagster}/locations/roma_pipelines/asset-groups/{EXPERIMENT}")
            page.get_by_text("registered_classifier", exact=True).first.wait_for()
            page.wait_for_timeout(4000)  # the graph zooms
            graph = {"x": 241, "y": 162, "width": 1215, "height": 420}
            save(page.screenshot(clip=graph), "asset_graph", 1400)
            page.set_viewport_size({"width": 1000, "height": 860})
            page.goto(report.as_uri())
            page.wait_for_timeout(500)
            save(page.screenshot(), "report", 900)
    finally:
        pages.stop()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]).absolute())
    else:
        with tempfile.TemporaryDirectory() as name:
            main(Path(name))
