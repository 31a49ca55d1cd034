"""The report's loss curve: a cut axis, a logarithmic scale, the checkpoint kept; links to images; a sweep's page."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from lora_llava.data.images.image_files import image_file
from lora_llava.data.images.image_id import ImageId
from lora_llava.data.images.image_sources import FolderImages, join_images
from lora_llava.pages.links import link_to
from lora_llava.pages.preview_page import render_page
from lora_llava.pages.preview_samples import Preview, PreviewRow, PreviewSample, PreviewToken
from lora_llava.pages.report_page import GalleryItem, RunReport, Table, render_report
from lora_llava.pages.report_plots import Curve, axis_limit, describe_cut, draw
from lora_llava.pages.sweep_page import Spread, SweepPage, draw_spread, render_sweep

FALLING = [(step, 10.0 if step == 1 else 1.0) for step in range(1, 21)]


def loss(points: list[tuple[float, float]], **settings: object) -> Curve:
    return Curve("Loss", "nats", {"train": points}, robust=True, **settings)  # type: ignore[arg-type]


def test_a_first_loss_of_10_does_not_set_the_axis() -> None:
    assert axis_limit(loss(FALLING)) == 1.25
    assert describe_cut(loss(FALLING)) == ["train: 1 value is above the axis, the highest 10 at step 1"]
    spikes = [*FALLING[:9], (10, 8.0), *FALLING[10:], *((step, 1.0) for step in range(21, 200))]
    assert describe_cut(loss(spikes, log_toggle=True)) == [
        "train: 2 values are above the axis, the highest 10 at step 1; the logarithmic scale shows all"
    ]


@pytest.mark.parametrize(
    ("points", "settings"),
    [
        (FALLING, {"log_scale": True}),
        ([(step, 3.0 - step / 10) for step in range(20)], {}),  # nothing is far above the rest
        (FALLING[:5], {}),  # too few to know what is usual
        ([*FALLING, (21, -1.0)], {}),
        ([(1, math.nan)], {}),
        ([], {}),
        (FALLING, {"kept": ("train", 1.0)}),  # the checkpoint kept is always inside
    ],
)
def test_an_axis_that_is_not_cut(points: list[tuple[float, float]], settings: dict[str, object]) -> None:
    assert axis_limit(loss(points, **settings)) is None
    assert describe_cut(loss(points, **settings)) == []


def test_the_drawing_ends_at_the_limit() -> None:
    def ticks(curve: Curve) -> list[str]:
        drawing = draw(curve, "c")
        assert drawing is not None
        return re.findall(r">([\d.]+)</text>", drawing.content)

    assert "10" in ticks(Curve("Loss", "", {"train": FALLING}))[-6:]
    assert ticks(loss(FALLING))[-1] == "1.25"


def page_of(*curves: Curve, gallery: tuple[GalleryItem, ...] = (), folder: Path | None = None) -> str:
    return render_report(RunReport("Run", [], curves, [], gallery, []), folder)


def test_the_scale_is_changed_without_a_script() -> None:
    html = page_of(loss(FALLING, log_toggle=True), Curve("Speed", "", {"training": [(1, 1.0)]}))
    assert html.count('<input type="checkbox" id="c0-scale"><label for="c0-scale">log scale</label>') == 1
    assert html.count('<svg class="log"') == 1
    assert html.count('<svg class="linear"') == 2
    assert "<script" not in html
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_the_legend_names_the_checkpoint_kept_rather_than_the_last() -> None:
    series = {"train": [(5, 2.0), (60, 0.1)], "validation": [(20, 0.5), (40, 0.41), (60, 0.52)]}
    text = re.sub("<[^>]+>|&ensp;", " ", page_of(Curve("Loss", "", series, kept=("validation", 40.0))))
    assert re.search(r"train\s+0\.1\s+at step 60\s", text)
    assert re.search(r"validation\s+0\.41\s+at step 40, kept; last 0\.52 at step 60", text)
    last = re.sub("<[^>]+>|&ensp;", " ", page_of(Curve("Loss", "", series, kept=("validation", 60.0))))
    assert re.search(r"validation\s+0\.52\s+at step 60, kept\s", last)
    unknown = re.sub("<[^>]+>|&ensp;", " ", page_of(Curve("Loss", "", series, kept=("validation", 7.0))))
    assert re.search(r"validation\s+0\.52\s+at step 60\s", unknown)


@pytest.mark.parametrize(
    ("file", "address"),
    [
        ("work/images/1.png", "../images/1.png"),
        ("work/runs/1.png", "1.png"),
        ("work/images/Bild 1 ä#%.png", "../images/Bild%201%20%C3%A4%23%25.png"),
        ("work/runs/javascript:alert(1)", "javascript%3Aalert%281%29"),
        ("work/runs/\"><script>'.png", "%22%3E%3Cscript%3E%27.png"),
        ("work/runs/a\nb\udc80.png", "a%0Ab%80.png"),
    ],
)
def test_links_are_relative_and_escaped(tmp_path: Path, file: str, address: str) -> None:
    assert link_to(tmp_path / file, tmp_path / "work" / "runs") == address


def test_links_without_a_common_folder(tmp_path: Path) -> None:
    assert link_to(Path("/data/my images/1.png"), Path("/home/me/run")) == "file:///data/my%20images/1.png"
    assert link_to(None, tmp_path) is link_to(tmp_path / "1.png", None) is None


def test_an_image_s_file_is_found(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (4, 4)).save(images / "1.png")
    (tmp_path / "secret.png").write_bytes((images / "1.png").read_bytes())
    os.symlink(tmp_path / "secret.png", images / "link.png")
    folder = FolderImages(images, 100)
    assert image_file(folder, "1.png") == images / "1.png"
    assert [image_file(folder, name) for name in ("2.png", "../secret.png", "link.png", "http://x/1.png", "")] == [
        None
    ] * 5
    assert image_file(join_images([folder, folder]), ImageId(1, "1.png")) == images / "1.png"


def test_report_and_preview_link_to_images(tmp_path: Path) -> None:
    image, file = Image.new("RGB", (8, 8), "red"), tmp_path / "my images" / "1&2.png"
    item = GalleryItem("What?", "B", "B", True, [image, image], [], "7", ["1&2.png", "of row 3"], [file, None])
    html = page_of(gallery=(item,), folder=tmp_path / "run")
    assert re.findall(r'<p class="file">(.*?)</p>', html) == [
        '<a href="../my%20images/1%262.png"><bdi>1&amp;2.png</bdi></a>',
        "<bdi>of row 3</bdi>",
    ]
    assert "<a " not in page_of(gallery=(item,))
    sample = PreviewSample("x", "1", (PreviewToken(1, "a", True, 0),), (image,), 0, names=("1&2.png",), files=(file,))
    preview = Preview("Samples", (), (sample,), (PreviewRow((0,), (1,), 0, 0),))
    assert '<a href="my%20images/1%262.png"><bdi>1&amp;2.png</bdi></a>, as' in render_page(preview, tmp_path)
    assert "my%20images" not in render_page(preview)


def test_the_page_of_a_sweep() -> None:
    page = SweepPage(
        "Sweep <b>",
        [("runs", "4")],
        ["chosen: lora.r=8"],
        [Table("Settings", ["", "r", "runs"], [["1", "8", "2"], ["2", "<i>", "0, 2 failed"]])],
        Spread("validation loss", [[0.5, 0.75], []]),
        Curve("Validation loss", "", {"r=8": [(1, 1.0), (2, 0.5)], "r=4": []}),
    )
    html = render_sweep(page)
    assert "<h1>Sweep &lt;b&gt;</h1>" in html
    assert '<th scope="row">2</th><td>&lt;i&gt;</td><td>0, 2 failed</td>' in html
    assert "<script" not in html
    assert "default-src 'none'" in html
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    drawing = draw_spread(page.spread, "s")
    assert drawing is not None
    assert re.findall(r">(\d)</text>", drawing.content)[-2:] == ["1", "2"]
    assert draw_spread(Spread("loss", [[], [math.nan]]), "s") is None
