"""Every kind of image that cameras, phones and the web give, against values known beforehand."""

import os
import struct
import zlib
from random import Random

import numpy as np
import pytest
from PIL import Image

from fewshot_d2.decoding import decode_rgb, printable, read_rgb

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_rgb_png_is_read_as_it_is(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    assert np.array_equal(read_rgb(tmp_path / "a.png"), PIXELS)
    assert np.array_equal(read_rgb(str(tmp_path / "a.png")), PIXELS)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_and_mirrors(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)
    rows_first = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2),
        6: PIXELS.transpose(1, 0, 2)[:, ::-1],
        7: PIXELS.transpose(1, 0, 2)[::-1, ::-1],
        8: PIXELS.transpose(1, 0, 2)[::-1],
    }
    assert np.array_equal(read_rgb(tmp_path / "a.png"), rows_first[orientation])


def test_sixteen_bits_are_scaled_and_not_cut(tmp_path):
    grey = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(grey).save(tmp_path / name)
        assert read_rgb(tmp_path / name)[0, :, 1].tolist() == [0, 0, 1, 128, 255]


def test_transparent_parts_are_white(tmp_path):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0], rgba[0, :, 3] = 200, [0, 255, 128]
    Image.fromarray(rgba).save(tmp_path / "a.png")
    clear, solid, half = read_rgb(tmp_path / "a.png")[0].tolist()
    assert clear == [255, 255, 255] and solid == [200, 0, 0]
    assert abs(half[0] - 228) <= 1 and abs(half[1] - 127) <= 1
    Image.fromarray(rgba[..., [0, 3]]).save(tmp_path / "grey.png")
    assert read_rgb(tmp_path / "grey.png")[0, 0].tolist() == [255, 255, 255]


def test_grey_cmyk_palette_and_bits(tmp_path):
    Image.fromarray(PIXELS[:, :, 0]).save(tmp_path / "grey.png")
    assert np.array_equal(read_rgb(tmp_path / "grey.png"), np.stack([PIXELS[:, :, 0]] * 3, axis=2))
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    cyan.save(tmp_path / "cyan.jpg", quality=100)
    assert np.abs(read_rgb(tmp_path / "cyan.jpg").astype(int) - [0, 255, 255]).max() <= 2
    Image.new("P", (4, 4), 0).save(tmp_path / "palette.gif")
    Image.new("1", (4, 4), 1).save(tmp_path / "bits.png")
    assert read_rgb(tmp_path / "palette.gif").shape == (4, 4, 3)
    assert (read_rgb(tmp_path / "bits.png") == 255).all()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that declares a size and has next to nothing in it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot identify"),
        (b"\xff\xd8\xff\xe0 nothing", ""),
        (png_of_size(60000, 60000), "pixels"),
        (png_of_size(9000, 9000), "at most 64000000 pixels"),
        (png_of_size(50, 50), ""),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "cannot identify"),
    ],
)
def test_broken_files_are_named(tmp_path, content, reason):
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad.jpg must be a readable image, got: .*{reason}"):
        read_rgb(tmp_path / "bad.jpg")


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    for path in (tmp_path / "pipe.jpg", tmp_path, tmp_path / "missing.jpg", tmp_path / "loop.jpg"):
        with pytest.raises(ValueError, match="must be a readable image"):
            read_rgb(path)


def test_floating_point_is_refused_because_its_range_is_unknown(tmp_path):
    Image.fromarray(np.ones((3, 3), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="a.tif .*floating-point"):
        read_rgb(tmp_path / "a.tif")


def test_printable_names_are_utf8_on_one_line():
    odd = os.fsdecode(b"a\xffb\n\x1b[31m.jpg")
    assert printable(odd) == r"a\xffb\n\x1b[31m.jpg"
    assert printable("tässe.jpg") == "tässe.jpg"
    printable("\ud800").encode("utf-8")


def test_paper_below_transparent_parts_may_be_black(tmp_path):
    Image.fromarray(np.zeros((2, 2, 4), np.uint8)).save(tmp_path / "a.png")
    assert (read_rgb(tmp_path / "a.png", paper=0) == 0).all()


def test_broken_exif_is_no_reason_to_refuse_a_photo(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", quality=100, exif=exif)
    content, length = (tmp_path / "a.jpg").read_bytes(), len(exif.tobytes())
    start, random, shapes = content.find(b"Exif") + 6, Random(0), set()
    for _ in range(2000):
        broken = bytearray(content)
        for _ in range(random.randint(1, 4)):
            broken[start + random.randrange(length - 6)] = random.randrange(256)
        shapes.add(decode_rgb(bytes(broken)).shape)
    assert shapes == {(5, 7, 3), (7, 5, 3)}
