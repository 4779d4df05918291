"""Pictures and captions as people have them: what is found, how pixels are read, what is said."""

from __future__ import annotations

import io
import json
import struct
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
from PIL import Image, ImageCms
from pyarrow import parquet

from shiva_dit.training.pictures import sources
from shiva_dit.training.pictures.buckets import kept_share, nearest, shapes
from shiva_dit.training.pictures.entry import Words
from shiva_dit.training.pictures.pixels import PictureError, look, read_picture
from shiva_dit.training.pictures.scan import BadPicturesError, Scan, Taking, scan

WHITE = (255, 255, 255)


def coded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def drawn(width: int = 40, height: int = 32, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def corners(data: bytes, background: tuple[int, int, int] = WHITE) -> list[tuple[int, ...]]:
    """The first and the last pixel, as read."""
    look(data)
    image = read_picture(data, background)
    assert image.mode == "RGB"
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3)[[0, -1]].tolist()]


# --- what pixels mean -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG2000"])
def test_transparency_shows_the_background(kind: str) -> None:
    pixels = np.zeros((4, 6, 4), dtype=np.uint8)
    pixels[..., 0] = 200  # red lies under what is transparent
    pixels[0, 0, 3] = 128
    data = coded(Image.fromarray(pixels), kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert corners(data) == [(227, 127, 127), WHITE]
    assert corners(data, (0, 0, 255))[1] == (0, 0, 255)


@pytest.mark.parametrize("mode", ["P", "RGB", "L", "1", "I;16", "LA"])
def test_a_transparent_colour_shows_the_background(mode: str) -> None:
    options: dict[str, Any] = {}
    if mode == "I;16":
        pixels = np.full((4, 6), 65535, dtype=np.uint16)
        pixels[-1, -1] = 300
        image, options = Image.fromarray(pixels), {"transparency": 65535}
    elif mode == "LA":
        image = Image.new("LA", (6, 4), (9, 0))
    else:
        image = Image.new(mode, (6, 4), {"RGB": (1, 2, 3)}.get(mode, 1))
        options = {"transparency": (1, 2, 3) if mode == "RGB" else 1}
        if mode == "P":
            image.putpalette([0, 0, 0, 255, 0, 0])
    found = corners(coded(image, **options), (10, 20, 30))
    assert found[0] == (10, 20, 30)
    assert found[1] == ((1, 1, 1) if mode == "I;16" else (10, 20, 30))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_become_eight(kind: str) -> None:
    pixels = np.zeros((4, 6), dtype=np.uint16)
    pixels[0, 0], pixels[-1, -1] = 65535, 32768
    assert corners(coded(Image.fromarray(pixels), kind)) == [WHITE, (128, 128, 128)]


def profile(gamma: float, space: bytes = b"RGB ") -> bytes:
    """A colour profile (ICC 2) with sRGB's primaries and a plain power of its own."""
    curve = struct.pack(">4sII H", b"curv", 0, 1, round(gamma * 256)) + b"\0\0"

    def xyz(*values: float) -> bytes:
        return struct.pack(">4sI3i", b"XYZ ", 0, *(round(v * 65536) for v in values))

    text = b"made for a test\0"
    described = struct.pack(">4sII", b"desc", 0, len(text)) + text + b"\0" * 78
    content = {
        b"desc": described + b"\0" * (-len(described) % 4),
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
    }
    if space == b"RGB ":
        primaries = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
        for letter, values in zip((b"r", b"g", b"b"), primaries, strict=True):
            content |= {letter + b"XYZ": xyz(*values), letter + b"TRC": curve}
    else:
        content[b"kTRC"] = curve
    table, body, start = b"", b"", 132 + 12 * len(content)
    for name, value in content.items():
        table += struct.pack(">4sII", name, start + len(body), len(value))
        body += value
    size = start + len(body)
    head = struct.pack(">I4sI4s4s4s12s4s", size, b"lcms", 0x02100000, b"mntr", space, b"XYZ ",
                       struct.pack(">6H", 2026, 1, 1, 0, 0, 0), b"acsp")  # fmt: skip
    head += b"\0" * 28 + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", len(content)) + table + body


def test_colours_become_srgb() -> None:
    half = 188  # what sRGB calls half of the light: (1.055 * 0.502 ** (1 / 2.4) - 0.055) * 255
    linear = profile(1.0)
    for image in (Image.new("RGB", (6, 4), (128, 128, 128)), Image.new("RGBA", (6, 4), (128,) * 4)):
        data = coded(image, icc_profile=linear)
        assert look(data).profile == ""
        found = np.array(corners(data, (0, 0, 0)))
        expected = half if image.mode == "RGB" else half * 128 / 255
        assert np.abs(found - expected).max() <= 1.5  # what rounding in 8 bits leaves
    gray = coded(Image.new("L", (6, 4), 128), "JPEG", icc_profile=profile(1.0, b"GRAY"))
    assert np.abs(np.array(corners(gray)) - half).max() <= 1.5
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = drawn()
    data = coded(plain, icc_profile=srgb)
    assert read_picture(data).tobytes() == plain.tobytes()


@pytest.mark.parametrize(("given", "why"), [(b"hello", "damaged"), (profile(1.0), "is for RGB")])
def test_a_profile_that_does_not_fit_is_said(given: bytes, why: str) -> None:
    data = coded(Image.new("L", (6, 4), 100), icc_profile=given)
    assert why in look(data).profile
    assert corners(data)[0] == (100, 100, 100)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_they_say(orientation: int) -> None:
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[0, 0] = 255  # where it is stored; EXIF says which corner that is
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = coded(Image.fromarray(pixels), exif=exif)
    looks, found = look(data), np.asarray(read_picture(data))[..., 0]
    assert (looks.width, looks.height) == ((4, 6) if orientation >= 5 else (6, 4))
    assert found.shape == (looks.height, looks.width)
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0)}
    corner |= {5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert found[corner[orientation]] == 255


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is an empty file"),
        (b"<!DOCTYPE html><html></html>", "it is a web page, fetch the picture itself"),
        (b"<svg xmlns='x'></svg>", "it is a drawing in XML"),
        (b"hello", "none of the formats that Pillow reads"),
        (coded(drawn(), "JPEG")[:900], "image file is truncated"),
        (coded(drawn(), "PNG")[:900], "can't be read as a picture"),
        (coded(drawn(), "WEBP")[:900], "can't be read as a picture"),
        (coded(drawn(), "GIF")[:300], "can't be read as a picture"),
        (coded(Image.new("F", (6, 4), 0.5), "TIFF"), "32 bits a pixel"),
        (coded(Image.new("I", (6, 4), 5), "TIFF"), "32 bits a pixel"),
    ],
)
def test_what_is_no_picture_says_why(data: bytes, message: str) -> None:
    with pytest.raises(PictureError, match=message):
        look(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "AVIF"])
def test_damage_of_any_kind_is_one_kind_of_error(kind: str) -> None:
    whole, rng = coded(drawn(), kind), np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(whole)
        for place in rng.integers(0, len(broken), 8):
            broken[place] = rng.integers(0, 256)
        given = bytes(broken[: rng.integers(1, len(broken) + 1)])
        try:
            look(given)
        except PictureError:
            continue
        assert read_picture(given).mode == "RGB"


# --- shapes ---------------------------------------------------------------------------------------


def test_shapes_are_of_the_squares_area_and_within_the_models_positions() -> None:
    among = shapes(1024, 16, several=True)
    assert among[0] == (1024, 1024)
    for width, height in among:
        assert width % 64 == height % 64 == 0
        assert 0.85 * 1024**2 <= width * height <= 1024**2
        assert (height, width) in among
    assert max(max(shape) for shape in among) == 1472
    assert max(max(s) for s in shapes(1024, 16, several=True, largest=1300)) == 1280
    assert shapes(512, 16, several=False) == [(512, 512)]
    assert shapes(16, 16, several=True) == [(16, 16)]
    assert nearest(3000, 2000, among) == (1216, 832)
    assert nearest(10, 2000, among) == (704, 1472)
    assert kept_share(20_000, 50, (64, 64)) == 0.0025


# --- what is found --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "pictures"
    made.mkdir()
    return made


def put(path: Path, caption: str | None = "a caption", seed: int = 0, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn(seed=seed).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def seen(source: Path, **options: Any) -> Scan:
    known = options.pop("known", lambda key: False)
    taking = Taking(shapes=options.pop("shapes", [(32, 32)]), **options)
    return scan(source, taking, known, show_progress=False)


def captions(found: Scan) -> dict[str, tuple[str, ...]]:
    return {picture.name: picture.captions for picture in found.pictures}


def lines(found: Scan) -> str:
    return "\n".join(problem.line for problem in found.problems)


def said(found: Scan) -> str:
    return "\n".join(found.summary())


def test_every_kind_that_pillow_reads_is_taken_and_the_rest_counted(folder: Path) -> None:
    kinds = ("png", "jpg", "JPEG", "webp", "gif", "tif", "tiff", "bmp", "avif", "jfif", "jp2")
    for number, kind in enumerate(kinds):
        put(folder / f"{number}.{kind}")
    for name in ("a.heic", "b.heic", "c.mp4", "notes", ".hidden.png", "__MACOSX/._a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "orphan.txt").write_text("of no picture")
    elsewhere = folder.parent / "elsewhere"
    put(elsewhere / "linked.png")
    (folder / "link").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(folder)
    (folder / "again").symlink_to(elsewhere)  # is looked into once
    found = seen(folder)
    assert found.problems == []
    assert len(found.pictures) == len(kinds) + 1
    text = said(found)
    assert "files left out: 2 .heic, 1 .mp4, 2 hidden, 1 without an ending" in text
    assert "1 captions have no picture" in text


def test_captions_are_read_as_people_write_them(folder: Path) -> None:
    put(folder / "a.png", "\ufeffone\r\n\r\ntwo  words \r\none\n")
    put(folder / "b.png", None)
    (folder / "b.caption").write_text("of the other ending")
    put(folder / "c.png", " \n\n")
    put(folder / "dé.jpg", "ünïcode")
    drawn(seed=1).save(folder / "a.jpg")  # shares a.txt
    found = seen(folder)
    assert captions(found) == {
        "a.jpg": ("one", "two words"),
        "a.png": ("one", "two words"),
        "b.png": ("of the other ending",),
        "c.png": ("",),
        "dé.jpg": ("ünïcode",),
    }
    text = said(found)
    assert "2 have several captions" in text
    assert "1 have an empty caption" in text
    assert "2 share their caption's file with another picture" in text
    whole = captions(seen(folder, words=Words(whole=True)))
    assert whole["a.png"] == ("one two words one",)


def test_all_problems_are_listed_before_anything_is_done(folder: Path) -> None:
    for number in range(14):
        put(folder / f"{number:02d}.png", "good" if number < 3 else None)
    put(folder / "latin.png", None)
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    put(folder / "wide.png", None)
    (folder / "wide.txt").write_bytes("utf".encode("utf-16-le"))
    put(folder / "zero.png").write_bytes(b"")
    (folder / "both.png").write_bytes(b"neither picture nor caption")
    put(folder / "broken.png").unlink()
    (folder / "broken.png").symlink_to(folder / "nowhere.png")
    found = seen(folder)
    assert len(found.pictures) == 3
    text = lines(found)
    assert text.count("has no caption: write it into") == 12
    assert "both.png can't be read as a picture" in text
    assert "latin.txt is not UTF-8 text (invalid continuation byte at byte 3)" in text or (
        "latin.txt is not UTF-8 text (unexpected end of data at byte 3)" in text
    )
    assert "wide.txt is not UTF-8 text (it holds NUL): save it as UTF-8" in text
    assert "zero.png is an empty file: fetch it again" in text
    assert "broken.png can't be read: leads nowhere" in text
    error = BadPicturesError(found.problems, 3)
    assert error.lines()[-1] == "and 7 more"
    assert len(error.lines()) == 11
    assert (
        "17 problems beside 3 good pictures: mend them, or leave them out by --skip" in error.said
    )
    assert "3 pictures taken, 17 problems (12 for no caption, 2 for picture, 2 for caption" in said(
        found
    )


def test_metadata_of_the_hubs_image_folders(folder: Path) -> None:
    for name in ("a.png", "b.png", "sub/c.png", "sub/d.png", "e.png"):
        put(folder / name, None)
    rows: list[Any] = [
        {"file_name": "a.png", "text": "of a"},
        {"file_name": "b.png", "text": ["one", "two"], "width": 3},
        {"file_name": "gone.png", "text": "of none"},
        {"file_name": "e.png", "label": 3},
        {"text": "of no file"},
    ]
    text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    (folder / "metadata.jsonl").write_text(text)
    (folder / "sub" / "metadata.csv").write_text(
        '\ufefffile_name,caption\r\nc.png,"of c, with ""quotes"""\r\nd.png,\r\n', encoding="utf-8"
    )
    found = seen(folder)
    assert captions(found) == {
        "a.png": ("of a",),
        "b.png": ("one", "two"),
        "sub/c.png": ('of c, with "quotes"',),
        "sub/d.png": ("",),
    }
    text = lines(found)
    assert "metadata.jsonl, line 3, names gone.png, which is not there" in text
    assert "line 5, has no file_name: write the picture's there, or remove the line" in text
    assert (
        "line 4, has no caption under text or caption or captions or prompt (it has: label): "
        in text
    )
    assert "e.png has no caption" in text
    other = seen(folder, words=Words(column="label"))
    assert "line 4, has a caption that is no text (3)" in lines(other)
    for name, content in (("jsonl", b"{"), ("jsonl", b"[1]\n"), ("csv", b'a,"b'), ("csv", b"\xff")):
        bad = folder.parent / f"bad-{name}"
        put(bad / "a.png")
        (bad / f"metadata.{name}").write_bytes(content)
        found = seen(bad)
        assert len(found.pictures) == 1
        assert f"metadata.{name}" in lines(found)


def test_folders_of_repeats_are_honoured_or_said(folder: Path) -> None:
    put(folder / "3_cats" / "a.png")
    put(folder / "b.png", seed=1)
    found = seen(folder)
    assert [picture.repeats for picture in found.pictures] == [1, 1]
    assert "1 lie in folders named 10_name, and count once: --repeats takes the number" in said(
        found
    )
    found = seen(folder, repeats=True)
    assert [picture.repeats for picture in found.pictures] == [3, 1]
    assert "4 samples with repeats" in said(found)


def test_what_is_done_to_pictures_is_counted(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(put(folder / "small.png"))
    Image.new("RGB", (2000, 50)).save(put(folder / "wide.png"))
    drawn().save(put(folder / "anim.gif"), save_all=True, append_images=[drawn(seed=1)])
    drawn().save(put(folder / "profile.png"), icc_profile=b"broken")
    text = said(seen(folder))
    assert "4 pictures taken" in text
    assert "1 are enlarged" in text
    assert "1 lose more than half to the crop (--buckets keeps more shapes)" in text
    assert "1 are animations or have pages, of which the first is taken" in text
    assert "1 have a colour profile that can't be used, and are read as sRGB" in text


def test_keys_say_what_a_picture_becomes(folder: Path) -> None:
    put(folder / "plain.png")
    Image.new("RGBA", (40, 32), (1, 2, 3, 0)).save(put(folder / "clear.png"))
    first = {p.name: p.key for p in seen(folder).pictures}
    other = {p.name: p.key for p in seen(folder, background=(0, 0, 0)).pictures}
    assert other["plain.png"] == first["plain.png"]
    assert other["clear.png"] != first["clear.png"]
    sizes = {p.name: p.key for p in seen(folder, shapes=[(64, 64)]).pictures}
    assert not {*sizes.values()} & {*first.values()}
    put(folder / "plain.png", seed=5)
    assert seen(folder).pictures[1].key != first["plain.png"]


def test_what_was_found_good_is_not_decoded_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder / "a.png")
    key = seen(folder).pictures[0].key
    asked: list[bytes] = []
    monkeypatch.setattr("shiva_dit.training.pictures.scan.look", asked.append)
    assert [p.key for p in seen(folder, known={key}.__contains__).pictures] == [key]
    assert asked == []


# --- tars and parquet -----------------------------------------------------------------------------


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, content in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return path


def test_tars_as_webdataset_writes_them(folder: Path) -> None:
    png = coded(drawn())
    files = {
        "000.png": png,
        "000.txt": b"one\ntwo",
        "001.JPG": coded(drawn(seed=1), "JPEG"),
        "001.json": b'{"caption": "from json"}',
        "more/002.webp": coded(drawn(seed=2), "WEBP"),
        "more/002.caption": b"third",
        "003.png": png,
        "004.txt": b"of no picture",
        "005.png": b"broken",
        "005.txt": b"x",
        "__MACOSX/._000.png": b"x",
    }
    write_tar(folder / "a.tar", files)
    write_tar(folder / "b [1] {2}.tar.gz", {"x.png": png, "x.txt": b"zipped"})
    put(folder / "beside.png", "beside tars")
    found = seen(folder)
    assert captions(found) == {
        "beside.png": ("beside tars",),
        "a.tar/000.png": ("one", "two"),
        "a.tar/001.jpg": ("from json",),
        "a.tar/more/002.webp": ("third",),
        "b [1] {2}.tar.gz/x.png": ("zipped",),
    }
    text = lines(found)
    assert "a.tar/003.png has no caption: add a 003.txt to the tar" in text
    assert "a.tar/004 holds no picture (txt)" in text
    assert "a.tar/005.png can't be read as a picture" in text
    assert len(found.problems) == 3
    alone = seen(folder / "a.tar")
    assert len(alone.pictures) == 3
    whole = write_tar(
        folder / "cut.tar", {f"{i}.{e}": png for i in range(9) for e in ("png", "txt")}
    )
    whole.write_bytes(whole.read_bytes()[:4096])
    assert "cut.tar is damaged after" in lines(seen(whole))


def test_parquet_as_datasets_writes_it(folder: Path) -> None:
    pictures = [coded(drawn(seed=seed)) for seed in range(20)]
    cells = [{"bytes": data, "path": None} for data in pictures]
    texts: list[Any] = [f"caption {i}" for i in range(20)]
    texts[3] = None
    table = arrow.table({"text": texts, "image": cells})
    parquet.write_table(table, folder / "a [0].parquet")
    table = arrow.table({"png": pictures[:2], "words": [["one", "two"], ["three"]]})
    parquet.write_table(table, folder / "b.parquet")
    found = seen(folder)
    assert len(found.pictures) == 19
    assert captions(found)["a [0].parquet row 19"] == ("caption 19",)
    text = lines(found)
    assert "a [0].parquet row 3 has no caption: its text is empty" in text
    assert "b.parquet row 0 has no caption under text or caption" in text
    assert "(it has: words): name the column by --caption-column" in text
    named = seen(folder / "b.parquet", words=Words(column="words"))
    assert captions(named) == {"b.parquet row 0": ("one", "two"), "b.parquet row 1": ("three",)}
    for content in (b"", b"hello", (folder / "b.parquet").read_bytes()[:-10]):
        (folder / "bad.parquet").write_bytes(content)
        assert "bad.parquet is damaged after 0 rows, fetch it again" in lines(
            seen(folder / "bad.parquet")
        )


@pytest.mark.parametrize(("name", "package"), [("a.tar", "webdataset"), ("a.parquet", "datasets")])
def test_what_is_missing_is_said(
    name: str, package: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / name).write_bytes(b"x")
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"read by {package}.*pip install 'shiva-dit\[data\]'"):
        seen(folder)


def test_memory_holds_a_few_pictures_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(folder / "a.tar", {f"{i}.{e}": coded(drawn()) if e == "png" else b"x"
                                 for i in range(40) for e in ("png", "txt")})  # fmt: skip
    alive: list[int] = []
    given, done = [0], [0]
    entries, looked = sources.tar_entries, look

    def counted(*arguments: Any) -> Any:
        for entry in entries(*arguments):
            given[0] += 1
            alive.append(given[0] - done[0])
            yield entry

    def looking(data: bytes) -> Any:
        result = looked(data)
        done[0] += 1
        return result

    monkeypatch.setattr(sources, "tar_entries", counted)
    monkeypatch.setattr("shiva_dit.training.pictures.scan.look", looking)
    assert len(seen(folder, workers=2).pictures) == 40
    assert max(alive) <= 8
