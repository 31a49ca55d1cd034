"""Folders as people have them, each kind in a clean and a dirty form."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from PIL import Image

Cells = Sequence[Sequence[object]]


def png(name: str) -> bytes:
    """Return an image that differs from those of other names."""
    stream = io.BytesIO()
    value = zlib.crc32(name.encode())
    Image.new("RGB", (24, 18), (value % 256, value // 256 % 256, value // 65536 % 256)).save(stream, "PNG")
    return stream.getvalue()


def draw(folder: Path, *names: str) -> None:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(name))


def save(file: Path, content: Any, encoding: str = "utf-8") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding=encoding)


def numbered(count: int, start: int = 0) -> list[str]:
    return [f"{number}.png" for number in range(start, start + count)]


def xlsx(file: Path, sheets: dict[str, Cells]) -> None:
    """Write a workbook of Excel: numbers as numbers, all else as text."""
    types = '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">' + "".join(
        f'<Default Extension="{name}" ContentType="application/{kind}"/>'
        for name, kind in (("xml", "xml"), ("rels", "vnd.openxmlformats-package.relationships+xml"))
    )
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006/relationships"
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    numbers = range(1, len(sheets) + 1)
    book = "".join(
        f'<sheet name="{escape(name)}" sheetId="{n}" r:id="r{n}"/>' for n, name in zip(numbers, sheets, strict=True)
    )
    links = "".join(
        f'<Relationship Id="r{n}" Type="{office}/worksheet" Target="worksheets/sheet{n}.xml"/>' for n in numbers
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("[Content_Types].xml", types + "</Types>")
        packed.writestr(
            "_rels/.rels",
            f'<Relationships xmlns="{package}"><Relationship Id="b" Type="{office}/officeDocument" '
            'Target="xl/workbook.xml"/></Relationships>',
        )
        packed.writestr(
            "xl/workbook.xml", f'<workbook xmlns="{main}" xmlns:r="{office}"><sheets>{book}</sheets></workbook>'
        )
        packed.writestr("xl/_rels/workbook.xml.rels", f'<Relationships xmlns="{package}">{links}</Relationships>')
        for n, cells in zip(numbers, sheets.values(), strict=True):
            packed.writestr(f"xl/worksheets/sheet{n}.xml", f'<worksheet xmlns="{main}">{_sheet(cells)}</worksheet>')


def _sheet(cells: Cells) -> str:
    rows = []
    for n, row in enumerate(cells, 1):
        found = [
            f'<c r="{chr(65 + m)}{n}"><v>{value}</v></c>'
            if isinstance(value, (int, float))
            else f'<c r="{chr(65 + m)}{n}" t="inlineStr"><is><t>{escape(str(value))}</t></is></c>'
            for m, value in enumerate(row)
            if value not in (None, "")
        ]
        rows.append(f'<row r="{n}">{"".join(found)}</row>')
    return f"<sheetData>{''.join(rows)}</sheetData>"


def ods(file: Path, sheets: dict[str, Cells]) -> None:
    """Write a workbook of LibreOffice."""
    tables = "".join(
        f'<table:table table:name="{escape(name)}">{"".join(map(_ods_row, cells))}</table:table>'
        for name, cells in sheets.items()
    )
    spaces = " ".join(
        f'xmlns:{name}="urn:oasis:names:tc:opendocument:xmlns:{name}:1.0"' for name in ("office", "table", "text")
    )
    kind = "application/vnd.oasis.opendocument.spreadsheet"
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("mimetype", kind)
        packed.writestr(
            "content.xml",
            f"<office:document-content {spaces}><office:body><office:spreadsheet>{tables}</office:spreadsheet>"
            "</office:body></office:document-content>",
        )
        packed.writestr(
            "META-INF/manifest.xml",
            '<manifest:manifest xmlns:manifest="urn:oasis:names:tc:opendocument:xmlns:manifest:1.0">'
            f'<manifest:file-entry manifest:full-path="/" manifest:media-type="{kind}"/></manifest:manifest>',
        )


def _ods_row(row: Sequence[object]) -> str:
    cells = "".join(
        f'<table:table-cell office:value-type="string"><text:p>{escape(str(value))}</text:p></table:table-cell>'
        if value not in (None, "")
        else "<table:table-cell/>"
        for value in row
    )
    return f"<table:table-row>{cells}</table:table-row>"


def tar(file: Path, members: dict[str, bytes | str], mode: str = "w") -> None:
    """Write a shard; a text that starts with `-> ` is a link."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as packed:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str) and content.startswith("-> "):
                member.type, member.linkname = tarfile.SYMTYPE, content[3:]
                packed.addfile(member)
                continue
            data = content.encode() if isinstance(content, str) else content
            member.size = len(data)
            packed.addfile(member, io.BytesIO(data))


def class_folders(folder: Path, dirty: bool) -> None:
    if not dirty:
        draw(folder, *(f"{label}/{name}" for label in ("ok", "deep_scratch") for name in numbered(5)))
        return
    draw(folder, *(f"Training/{label}/{label}{n}.PNG" for label in ("OK", "deep scratch") for n in range(4)))
    draw(folder, "valid/ok/später 1.png", "valid/deep_scratch/v.png", "testing/OK/t.png", "testing/dent/d.png")
    draw(folder, "top.png")
    shutil.copyfile(folder / "Training/OK/OK0.PNG", folder / "Training/deep scratch/again.png")
    (folder / "Training" / "empty").mkdir()
    for junk in (".DS_Store", "Thumbs.db", "__MACOSX/ok/._0.png", "Training/OK/notes.pdf"):
        save(folder / junk, "x")


def excel(folder: Path, dirty: bool) -> None:
    draw(folder / "images", *numbered(6))
    rows = [[f"{n}.png", "What is it?", f"thing {n}"] for n in range(6)]
    if not dirty:
        xlsx(folder / "rows.xlsx", {"Sheet1": [["image", "question", "answer"], *rows]})
        return
    table = [
        ["Bericht März"],
        [],
        ["Bilddatei", "Frage", "Antwort", "", "Prüfer"],
        *([f"C:\\Fotos\\{n}.PNG", " Wie viele? ", 3.0 + n, "", "x"] for n in range(6)),
        [],
        ["", "", "", "", "x"],
        ["fehlt.png", "Wie viele?", 1],
    ]
    xlsx(folder / "Prüfung 1.XLSX", {"Notizen": [["nur Text"]], "Daten": table, "leer": []})
    save(folder / "~$Prüfung 1.XLSX", "a lock file of Excel")


def libre_office(folder: Path, dirty: bool) -> None:
    draw(folder, *numbered(8))
    if not dirty:
        ods(folder / "rows.ods", {"Blatt": [["image", "caption"], *([f"{n}.png", f"A thing {n}."] for n in range(8))]})
        return
    head = ["Fichier", "Catégorie"]
    ods(
        folder / "données.ods",
        {
            "train": [head, *([f"{n}.png", "bon" if n % 2 else "Défaut"] for n in range(6)), ["9.png", "bon"]],
            "test": [head, ["6.png", "défaut"], ["7.png", ""]],
        },
    )


def coco_captions(folder: Path, dirty: bool) -> None:
    names = numbered(5)
    draw(folder / ("train2017" if dirty else "images"), *names)
    images: list[Any] = [{"id": n, "file_name": name, "width": 24, "height": 18} for n, name in enumerate(names)]
    captions: list[Any] = [{"id": 10 + n, "image_id": n, "caption": f"A thing {n}."} for n in range(5)]
    captions += [{"id": 20 + n, "image_id": n, "caption": f"Thing {n} again."} for n in range(2)]
    if not dirty:
        save(folder / "captions.json", {"images": images, "annotations": captions})
        return
    images[0]["file_name"] = "train2017\\0.png"
    images += [{"id": 50, "file_name": "gone.png"}, {"id": 51, "file_name": "../outside.png"}, images[1]]
    captions += [{"id": 30, "image_id": 50, "caption": "Gone."}, {"id": 31, "image_id": 99, "caption": "Whose?"}]
    captions += [{"id": 32, "image_id": 1, "caption": " "}, {"id": 33, "image_id": 2, "caption": "Two\n lines."}]
    del captions[3:5]
    content = {"info": {}, "images": images, "annotations": captions}
    save(folder / "annotations" / "captions_train2017.json", content, "utf-8-sig")
    boxes = {"images": images, "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2]}]}
    save(folder / "annotations" / "instances_train2017.json", boxes)


def coco_boxes(folder: Path, dirty: bool) -> None:
    for split, start in (("train", 0), *((("valid", 4),) if dirty else ())):
        names = numbered(4, start)
        draw(folder / split, *names)
        images = [{"id": n, "file_name": name, "width": 24, "height": 18} for n, name in enumerate(names)]
        boxes: list[Any] = [
            {"id": 10, "image_id": 0, "category_id": 1, "bbox": [0, 0, 6, 6], "iscrowd": 0},
            {"id": 11, "image_id": 1, "category_id": 2, "bbox": [18, 12, 6, 6], "iscrowd": 0},
            {"id": 12, "image_id": 1, "category_id": 2, "bbox": [0, 0, 6, 6], "iscrowd": 0},
        ]
        if dirty:
            boxes += [{"id": 13, "image_id": 2, "category_id": 7, "bbox": [0, 0, 6, 6]}]
            boxes += [{"id": 14, "image_id": 3, "category_id": 1, "bbox": [0, 0, 6, 6], "iscrowd": 1}]
            boxes += [{"id": 15, "image_id": 88, "category_id": 1, "bbox": None}]
            images += [{"id": 88, "file_name": "missing.png", "width": 1, "height": 1}]
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "red_cup"}]}
        content["categories"].append({"id": 2, "name": "key"})
        save(folder / split / "_annotations.coco.json", content)
    if dirty:
        draw(folder / "train", "unlisted.png")
