"""Small records of every published data set in its published layout, and random models.

With them the notebooks' paper-scale settings can be tried where neither can be had:

    python tests/fake_datasets.py FOLDER qwen3_vl gemma3

writes `FOLDER/data`, the folder that `mmheads.tasks.data_root` reads, and `FOLDER/models`.
Whatever the nominal length, a context is small.
"""

import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import random_models
from PIL import Image, ImageDraw

from mmheads.tasks import mmdocir
from mmheads.tasks.grids import DEPTHS
from mmheads.tasks.mm_niah import DATA, IMAGES, LENGTHS

DOCUMENT_LENGTHS = (8192, 131072)
DOCUMENT = "annual-report"
SIDE, PAGE, FRAME = 56, (56, 72), (64, 48)
"""Sizes in pixels: side of an image in a haystack, page of a document, frame of a video."""
ICONS, SHEETS = 8, 6
"""Images that are pasted into others, and images of haystacks without one."""

THINGS = ("fox", "ship", "bell", "lamp", "tree", "horse", "tower", "river")
WORDS = (
    *("rain", "wind", "light", "paper", "market", "garden", "bridge", "window", "stone", "letter"),
    *("falls", "moves", "turns", "holds", "opens", "slow", "bright", "early", "near", "often"),
)


def write_data(
    folder: Path, *, haystacks: int = 43, lengths: Sequence[int] = LENGTHS, seed: int = 0
) -> Path:
    """Write all data sets into a folder -> the folder.

    Args:
        folder: Made if it is not there; what `data_root` calls `data`.
        haystacks: Of each kind and length of needles; from 41 on, every split has some.
        lengths: Nominal lengths of the needles.
        seed: Of texts and pictures.
    """
    rng = np.random.default_rng(seed)
    _needles(folder / "MMLongBench", haystacks, lengths, rng)
    _document_questions(folder / "MMLongBench", rng)
    _mmdocir(folder / "MMDocIR", rng)
    _refcocog(folder / "RefCOCOg", rng)
    _vidstg(folder / "VidSTG", rng)
    return folder


def write_models(folder: Path, names: Sequence[str]) -> list[Path]:
    """Save a random model and its processor of each family, in a folder of its own name."""
    return [random_models.save(name, folder / f"tiny-random-{name}") for name in names]


# --- MMLongBench


def _needles(
    folder: Path, haystacks: int, lengths: Iterable[int], rng: np.random.Generator
) -> None:
    """Six units of text and two images, and the needle; the same for a haystack at every depth."""
    images = folder / IMAGES / "mm-niah"
    sheets = [_picture(rng, (SIDE, SIDE)) for _ in range(SHEETS)]
    for number, sheet in enumerate(sheets):
        _save(sheet, images / f"sheet_{number}.png")
    for number in range(ICONS):
        icon, pasted = _icon(number), sheets[number % SHEETS].copy()
        pasted.paste(icon, (20, 24))
        _save(icon, images / f"icon_{number}.png")
        _save(pasted, images / f"pasted_{number}.png")
    for kind, length in product(("text", "image"), lengths):
        texts = [[f"{_prose(rng)} {_prose(rng)}" for _ in range(6)] for _ in range(haystacks)]
        drawn = [int(value) for value in rng.integers(1000, 10_000, haystacks)]
        with_needle = _text_needle if kind == "text" else _image_needle
        records = [
            {"id": f"mm-niah-{number}", "depth": depth}
            | with_needle(texts[number], number, drawn[number], depth)
            for depth, number in product(DEPTHS, range(haystacks))
        ]
        name = f"retrieval-{kind}_test_K{length // 1024}_dep6.jsonl"
        _write_lines(folder / DATA / "NIAH" / name, records)


def _text_needle(texts: Sequence[str], number: int, drawn: int, depth: float) -> dict[str, Any]:
    thing = THINGS[number % len(THINGS)]
    sentence = f"The secret number of the {thing} is {drawn}."
    units: list[str | Path] = list(texts)
    at = round(depth * (len(texts) - 1))
    units[at] = texts[at].replace(". ", f". {sentence} ", 1)
    units[2:2], units[5:5] = [_sheet(number)], [_sheet(number + 1)]
    return _haystack(units) | {
        "question": f"What is the secret number of the {thing}?",
        "answer": str(drawn),
        "positive_ctxs": [{"type": "text", "text": sentence, "len": 12}],
    }


def _image_needle(texts: Sequence[str], number: int, drawn: int, depth: float) -> dict[str, Any]:
    icon, answer = number % ICONS, drawn % 4
    pasted = f"pasted_{icon}.png"
    units: list[str | Path] = list(texts)
    units[2:2], units[5:5] = [_sheet(icon + 1)], [_sheet(icon + 2)]
    units.insert(round(depth * len(units)), Path("mm-niah", pasted))
    options = [(icon + place - answer) % ICONS for place in range(4)]
    return _haystack(units) | {
        "question": "Which of these small pictures is in one of the images of the document?",
        "answer": answer,
        "positive_ctxs": [{"type": "image", "text": "<image>", "image": pasted}],
        "choices_image": [f"mm-niah/icon_{option}.png" for option in options],
    }


def _sheet(number: int) -> Path:
    return Path("mm-niah", f"sheet_{number % SHEETS}.png")


def _haystack(units: Sequence[str | Path]) -> dict[str, Any]:
    return {
        "ctxs": [
            {"type": "text", "text": unit}
            if isinstance(unit, str)
            else {"type": "image", "text": "<image>"}
            for unit in units
        ],
        "image_list": [unit.as_posix() for unit in units if isinstance(unit, Path)],
    }


def _document_questions(folder: Path, rng: np.random.Generator) -> None:
    """Four questions on one document of three pages; the last one cannot be answered."""
    kinds = {
        "mmlongdoc": (("7", "Integer"), ("a red fox", "String"), ('["fox", "bell"]', "List")),
        "slidevqa": (("12.5", "Float"), ("the tower", "String"), ("4", "Integer")),
    }
    for subset, answers in kinds.items():
        pages = [_page_name(subset, number) for number in range(3)]
        for page in pages:
            _save(_picture(rng, PAGE), folder / IMAGES / page)
        for length in DOCUMENT_LENGTHS:
            asked = [*answers, ("Not answerable", "None")]
            records = [
                {
                    "id": f"{subset}_{row}",
                    "doc_name": DOCUMENT,
                    "question": f"What stands beside the {THINGS[row]} on page {row + 1}?",
                    "answer": answer,
                    "answer_format": kind,
                    "ans_page_list": [] if kind == "None" else [row],
                    "answer_sources": ["Figure"],
                    "page_list": pages,
                    "length": length,
                }
                for row, (answer, kind) in enumerate(asked)
            ]
            name = f"{subset}_K{length // 1024}.jsonl"
            _write_lines(folder / DATA / "documentQA" / name, records)


def _page_name(subset: str, number: int) -> str:
    if subset == "slidevqa":
        return f"slideVQA/{DOCUMENT}/{DOCUMENT}-{number + 1}-1024.jpg"
    return f"mmlongbench-doc/{DOCUMENT}/{DOCUMENT}_page{number}.jpg"


# --- MMDocIR, RefCOCOg, VidSTG


def _mmdocir(folder: Path, rng: np.random.Generator) -> None:
    """Two documents of four pages with two layouts each, and two questions a document."""
    pages, layouts, lines = [], [], []
    left_half, size = [0.0, 0.0, PAGE[0] / 2, float(PAGE[1])], [float(side) for side in PAGE]
    for document, name in enumerate(("report.pdf", "guide.pdf")):
        about = {"doc_name": name, "domain": "Brochure"}
        first = [4 * document, 8 * document]
        for number in range(4):
            picture = _picture(rng, PAGE)
            pages.append(
                about
                | {"passage_id": str(number), "image_path": f"{name}_{number}.jpg"}
                | {"image_binary": _bytes(picture), "ocr_text": _prose(rng), "vlm_text": ""}
            )
            right_half = [PAGE[0] / 2, 0.0, *size]
            for kind, box in (("image", left_half), ("table", right_half)):
                layouts.append(
                    about
                    | {"type": kind, "layout_id": len(layouts), "page_id": number}
                    | {"image_path": "", "image_binary": _bytes(picture.crop(tuple(box)))}
                    | {"text": None, "bbox": box, "page_size": size}
                )
        questions = [
            {
                "Q": f"What stands beside the {THINGS[page]} in the {name.split('.')[0]}?",
                "A": f"the {THINGS[page + 4]}",
                "page_id": [page],
                "type": "['Table']",
                "layout_mapping": [{"page": page, "page_size": size, "bbox": left_half}],
            }
            for page in (1, 3)
        ]
        rows = {"page_indices": [first[0], first[0] + 3]}
        rows |= {"layout_indices": [first[1], first[1] + 7]}
        lines.append(about | rows | {"questions": questions})
    _write_lines(folder / mmdocir.ANNOTATIONS, lines)
    _write_table(folder / mmdocir.PAGES, pages)
    _write_table(folder / mmdocir.LAYOUTS, layouts)


def _refcocog(folder: Path, rng: np.random.Generator) -> None:
    """Four objects; the first is described in two ways."""
    rows = [
        {
            "question_id": str(row),
            "image": _image(_picture(rng, FRAME)),
            "question": "Describe the region.",
            "answer": [f"the {THINGS[row]}", f"a {THINGS[row]} on the left"][: 2 - bool(row)],
            "bbox": [8.0 * row, 6.0, 24.0, 30.0],
            "iscrowd": 0,
            "file_name": f"COCO_train2014_{row}.jpg",
        }
        for row in range(4)
    ]
    _write_table(folder / "data" / "val-00000-of-00001.parquet", rows)


def _vidstg(folder: Path, rng: np.random.Generator) -> None:
    """Two videos of four frames, a question and a caption each; a dog is in all but the first."""
    width, height = FRAME
    annotations = []
    for video in ("5159741010", "2793806282"):
        about = {"fps": 2, "frame_count": 4, "width": width, "height": height}
        used, shown = ({"begin_fid": first, "end_fid": 4} for first in (0, 1))
        annotations.append(
            about
            | {"vid": video, "used_segment": used, "temporal_gt": shown}
            | {"subject/objects": [{"tid": 0, "category": "dog"}, {"tid": 1, "category": "adult"}]}
            | {"used_relation": {"subject_tid": 0, "object_tid": 1, "predicate": "watch"}}
            | {
                "questions": [
                    {"description": "what watches the adult?", "type": "object", "target_id": 0}
                ]
            }
            | {
                "captions": [
                    {"description": "an adult is watched.", "type": "person", "target_id": 1}
                ]
            }
        )
        boxes = [
            [
                {"tid": 0, "bbox": {"xmin": 8 * at, "ymin": 8, "xmax": 8 * at + 23, "ymax": 31}},
                {"tid": 1, "bbox": {"xmin": 40, "ymin": 0, "xmax": 63, "ymax": 47}},
            ]
            for at in range(4)
        ]
        tracks = about | {"video_id": video, "video_path": f"1025/{video}.mp4"}
        path = folder / "vidor" / "validation" / "1025" / f"{video}.json"
        _write_json(path, tracks | {"trajectories": boxes})
        _save_frames(rng, folder / "frames" / "1025" / video)
    _write_json(folder / "annotations" / "test_annotations.json", annotations)


# --- texts, pictures, files


def _prose(rng: np.random.Generator) -> str:
    """A sentence of eight words."""
    return " ".join(rng.choice(WORDS, 8)).capitalize() + "."


def _picture(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A light background with four boxes in other colours."""
    picture = Image.new("RGB", size, tuple(rng.integers(200, 256, 3).tolist()))
    pen = ImageDraw.Draw(picture)
    for _ in range(4):
        left, top = (int(rng.integers(0, side - 16)) for side in size)
        pen.rectangle(
            (left, top, left + 12, top + 10), fill=tuple(rng.integers(0, 200, 3).tolist())
        )
    return picture


def _icon(number: int) -> Image.Image:
    icon = Image.new("RGB", (16, 16), (30 * number, 255 - 30 * number, 128))
    ImageDraw.Draw(icon).ellipse((2, 2, 6 + number, 13), fill="black")
    return icon


def _bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _image(picture: Image.Image) -> dict[str, Any]:
    """As the hub's tables hold an image."""
    return {"bytes": _bytes(picture), "path": None}


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def _save_frames(rng: np.random.Generator, folder: Path) -> None:
    for number in range(4):
        _save(_picture(rng, FRAME), folder / f"{number:06d}.png")


def _write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _write_table(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(list(rows)).to_parquet(path)


if __name__ == "__main__":
    place, *wanted = sys.argv[1:]
    print(write_data(Path(place) / "data"), *write_models(Path(place) / "models", wanted))
