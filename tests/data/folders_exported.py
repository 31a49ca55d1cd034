"""Folders as labelling tools and data sets leave them, each kind in a clean and a dirty form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from data.folders_made import draw, numbered, png, save, tar


def label_studio(folder: Path, dirty: bool) -> None:
    draw(folder, *numbered(4))

    def task(number: int, image: str, *annotations: Any) -> dict[str, Any]:
        return {"id": number, "data": {"image": image}, "annotations": list(annotations), "predictions": []}

    def said(*results: Any, **more: Any) -> dict[str, Any]:
        return {"result": list(results), **more}

    def choice(*texts: str) -> dict[str, Any]:
        return {"from_name": "state", "to_name": "image", "type": "choices", "value": {"choices": list(texts)}}

    def text(words: str) -> dict[str, Any]:
        return {"from_name": "caption", "to_name": "image", "type": "textarea", "value": {"text": [words]}}

    def box(label: str, **at: float) -> dict[str, Any]:
        return {"from_name": "label", "type": "rectanglelabels", "value": {**at, "rectanglelabels": [label]}}

    if not dirty:
        tasks = [task(n, f"{n}.png", said(choice("good" if n else "bad_one"))) for n in range(4)]
        save(folder / "project-1.json", tasks)
        return
    draw(folder, "1a2b3c4d-photo.png")
    tasks = [
        task(1, "/data/upload/7/deadbeef-0.png", said(choice("good"), text("A zero."), box("cup", x=0, y=0, width=20))),
        task(2, "/data/local-files/?d=sub%2F1.png", said(choice("bad")), said(choice("bad")), said(choice("good"))),
        task(3, "2.png", said(choice("bad")), said(choice("good"))),
        task(4, "3.png", said(choice("good"), was_cancelled=True), said()),
        task(5, "https://example.org/x.png", said(choice("good"))),
        task(6, "gone.png", said(choice("good"))),
        task(
            7, "/data/upload/7/1a2b3c4d-photo.png", said({"type": "brushlabels", "value": {"rle": []}}, choice("bad"))
        ),
    ]
    save(folder / "export 1.JSON", json.dumps(tasks), "utf-16")


def cvat(folder: Path, dirty: bool) -> None:
    draw(folder / "images", *numbered(4))

    def image(number: int, inside: str, more: str = "", name: str | None = None) -> str:
        named = quoteattr(name or f"{number}.png")
        return f'<image id="{number}" name={named} width="24" height="18"{more}>{inside}</image>'

    box = '<box label="{}" xtl="{}" ytl="0" xbr="{}" ybr="6">{}</box>'
    if not dirty:
        images = "".join(image(n, f'<tag label="{"worn_out" if n % 2 else "new"}"/>') for n in range(4))
        save(folder / "annotations.xml", f"<annotations><version>1.1</version>{images}</annotations>")
        return
    draw(folder / "images", "6.png")
    images = [
        image(0, box.format("cup", 0, 6, '<attribute name="colour">red</attribute>'), ' subset="Train"'),
        image(1, box.format("cup", 0, 2, "") + box.format("cup", 16, 24, '<attribute name="colour">x</attribute>')),
        image(2, '<polyline label="cup" points="0,0;1,1"/>', ' subset="Validation"'),
        image(3, '<tag label="new"><attribute name="age"></attribute></tag>', name="images\\3.PNG"),
        image(4, '<tag label="new"/>'),
        image(5, '<tag label="new"/>', name="../../etc/passwd"),
    ]
    save(folder / "annotations.xml", '<?xml version="1.0"?><annotations>' + "".join(images) + "</annotations>")


def vqa(folder: Path, dirty: bool) -> None:
    for split, start in (("train2014", 1), *((("val2014", 7),) if dirty else ())):
        numbers = range(start, start + 4)
        draw(folder / split, *(f"COCO_{split}_{n:012d}.png" for n in numbers))
        asked = [{"question_id": n * 10, "image_id": n, "question": f"Is it {n}?"} for n in numbers]
        said: list[Any] = [
            {"question_id": n * 10, "multiple_choice_answer": "yes", "answer_type": "yes/no"} for n in numbers
        ]
        if dirty:
            asked += [{"question_id": start * 10 + 5, "image_id": start, "question": "Unanswered?"}]
            asked += [{"question_id": start * 10 + 6, "image_id": 999, "question": "Where?"}]
            said += [{"question_id": start * 10 + 6, "multiple_choice_answer": "gone"}]
            said += [{"question_id": start * 10 + 7, "multiple_choice_answer": "no one asked"}]
            said[0] = {"question_id": start * 10, "answers": [{"answer": a} for a in ("two", "three", "two")]}
        subtype = {"data_subtype": split} if dirty else {}
        save(folder / f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": asked, **subtype})
        save(folder / f"v2_mscoco_{split}_annotations.json", {"annotations": said, **subtype})
    if dirty:
        save(folder / "v2_mscoco_train2014_complementary_pairs.json", [[1, 2]])


def web_dataset(folder: Path, dirty: bool) -> None:
    if not dirty:
        members: dict[str, bytes | str] = {}
        for n in range(4):
            members |= {f"{n:04d}.png": png(f"{n}"), f"{n:04d}.txt": f"A thing {n}."}
        tar(folder / "train-000000.tar", members)
        return
    tar(
        folder / "train-000000.tar.gz",
        {
            "./a/one.jpg.PNG": png("one"),
            "./a/one.cls": "0",
            "b.png": png("b"),
            "b.cls": "1\n",
            "c.png": png("c"),
            "c.json": json.dumps({"question": "What?", "answer": "A c.", "url": "http://x"}),
            "d.png": png("d"),
            "e.txt": "no image",
            "../../evil.png": png("evil"),
            "../../evil.txt": "evil",
            "f.png": "-> /etc/passwd",
            "f.txt": "a link",
            "g.png": png("g"),
            "g.json": "{broken",
            "g.seg.npy": "x",
        },
        "w:gz",
    )
    tar(folder / "val-000000.tar", {"h.png": png("h"), "h.cls": "1"})
    save(folder / "classes.txt", "sea_side\nwood\n")


def hugging_face(folder: Path, dirty: bool) -> None:
    if not dirty:
        draw(folder, *numbered(4))
        rows = [{"file_name": f"{n}.png", "text": f"A thing {n}."} for n in range(4)]
        save(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        return
    draw(folder / "train", *(f"sub/{n}.png" for n in range(4)), "bare.png")
    draw(folder / "test", "0.png")
    save(
        folder / "train" / "metadata.csv",
        "file_name,label,width\r\n"
        + "".join(f"sub/{n}.png,{n % 2},24\r\n" for n in range(4))
        + "gone.png,1,3\r\n,1,3\r\n",
        "utf-8-sig",
    )
    save(folder / "test" / "metadata.csv", "file_name,label,width\n0.png,1,24\n")


def foreign_table(folder: Path, dirty: bool) -> None:
    draw(folder / "bilder", *numbered(6))
    if not dirty:
        rows = "".join(f"{n}.png,Was ist das?,Ding {n}\n" for n in range(6))
        save(folder / "tabelle.csv", f"Bild,Frage,Antwort\n{rows}")
        return
    rows = "".join(f"D:\\Fotos\\{n}.PNG;Größe?;{n} müde;x\r\n" for n in range(6))
    rows += ";;;\r\nfehlt.png;Größe?;1;x\r\n"
    save(folder / "Übersicht 2024.CSV", f"Dateiname ;FRAGE;Antwort;Prüfer\r\n{rows}", "cp1252")


def label_table(folder: Path, dirty: bool) -> None:
    draw(folder, *numbered(8))
    if not dirty:
        rows = "".join(f"{n}.png,{'ok' if n % 2 else 'deep_scratch'}\n" for n in range(8))
        save(folder / "labels.csv", f"file,label\n{rows}")
        return
    rows = "".join(f"./{n}.png\t{'OK' if n == 1 else 'ok' if n % 2 else 'scratch'}\n" for n in range(6))
    save(folder / "labels.tsv", f"{rows}6.png\t\n7.png\tok\n7.png\tscratch\n")


def yolo(folder: Path, dirty: bool) -> None:
    splits = ("train", "valid") if dirty else ("",)
    for split in splits:
        base = folder / split
        draw(base / "images", *numbered(3))
        for name in numbered(3) if split == "valid" else ():
            (base / "images" / name).write_bytes(png(f"valid {name}"))
        save(base / "labels" / "0.txt", "0 0.5 0.5 0.1 0.1\n")
        save(base / "labels" / "1.txt", "1 0.1 0.9 0.1 0.1\n1 0.2 0.2 0.1 0.1\n")
        save(base / "labels" / "2.txt", "")
        if dirty:
            draw(base / "images", "unlabelled.png")
            save(base / "labels" / "gone.txt", "0 0.5 0.5 0.1 0.1\n")
            save(base / "labels" / "2.txt", "9 0.5 0.5 0.1 0.1\nzero 1\n\n0 0 0 1 0 1 0.6 0 0.6\n")
    if dirty:
        save(folder / "data.yaml", "train: ../train/images\nnc: 2\nnames: [red_cup, key]\n")
    else:
        save(folder / "classes.txt", "cup\nkey\n")
