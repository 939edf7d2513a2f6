"""Pictures as people have them (modes, orientation, damage) and the preprocessing, against torchvision's numbers."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mnv2_fused import images
from mnv2_fused.images import ImageError, find_images, preprocess, read_image


def picture(width=64, height=48):
    y, x, c = np.ogrid[:height, :width, :3]
    return Image.fromarray(((x * 3 + y * 5 + c * 50) % 256).astype(np.uint8))


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# ---- modes


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm"])
def test_lossless_formats_keep_every_pixel(tmp_path, suffix):
    picture().save(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(pixels(read_image(tmp_path / f"a.{suffix}")), pixels(picture()))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "CMYK", "YCbCr"])
def test_modes_are_what_pillow_shows(tmp_path, mode):
    image = picture().convert(mode)
    image.save(tmp_path / "a.tif" if mode in ("CMYK", "YCbCr") else tmp_path / "a.png")
    read = read_image(next(tmp_path.iterdir()))
    worst = np.abs(pixels(read) - pixels(image.convert("RGB"))).max()
    assert worst == 0, f"{mode}: off by {worst}"


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (40, 40), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    assert np.abs(pixels(read_image(tmp_path / "a.jpg")) - [255, 0, 0]).max() <= 3  # JPEG is lossy


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_greys_are_scaled_not_clipped(tmp_path, suffix):
    grey = np.linspace(0, 65535, 64 * 48).round().astype(np.uint16).reshape(48, 64)
    Image.fromarray(grey).save(tmp_path / f"a.{suffix}")
    expected = np.rint(grey / 257).astype(int)
    np.testing.assert_array_equal(pixels(read_image(tmp_path / f"a.{suffix}")), np.stack([expected] * 3, -1))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_unknown_range_is_refused(tmp_path, dtype):
    Image.fromarray(np.full((8, 8), 1_000_000, dtype)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="range is not known"):
        read_image(tmp_path / "a.tif")


def test_transparent_pixels_are_white(tmp_path):
    image = picture().convert("RGBA")
    image.putalpha(Image.fromarray(np.where(np.arange(64) < 32, 0, 255).astype(np.uint8)[None].repeat(48, 0)))
    image.save(tmp_path / "a.png")
    read = pixels(read_image(tmp_path / "a.png"))
    assert (read[:, :32] == 255).all()
    np.testing.assert_array_equal(read[:, 32:], pixels(picture())[:, 32:])


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.paste(0, (0, 0, 4, 8))
    image.save(tmp_path / "a.png", transparency=0)
    read = pixels(read_image(tmp_path / "a.png"))
    assert (read[:, :4] == 255).all() and (read[:, 4:] == [10, 20, 30]).all()


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (pixels(read_image(tmp_path / "a.gif")) == [255, 0, 0]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    stored_as = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # PIL.Image.Transpose, see EXIF 2.3
    stored = picture() if stored_as is None else picture().transpose(Image.Transpose(stored_as))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(pixels(read_image(tmp_path / "a.png")), pixels(picture()))


# ---- damage and attacks


def png_of_zeros(width, height):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = zlib.compress(bytes(1 << 20))  # decoded to the end it would be reported as truncated
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", start) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "width, height, reason",
    [
        (10_001, 10_000, "10001 x 10000 pixels; at most 100000000 are decoded"),
        (20_000, 20_000, "decompression bomb"),  # Pillow's own limit
        (2**31 - 1, 2**31 - 1, "decompression bomb"),
        (10_000, 10_000, "truncated"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_by_its_header(tmp_path, width, height, reason):
    (tmp_path / "a.png").write_bytes(png_of_zeros(width, height))
    with pytest.raises(ImageError, match=reason):
        read_image(tmp_path / "a.png")


def test_pixel_limit_is_inclusive(tmp_path):
    picture(10, 10).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", max_pixels=100).size == (10, 10)
    with pytest.raises(ImageError, match="10 x 10 pixels; at most 99"):
        read_image(tmp_path / "a.png", max_pixels=99)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "tif", "webp"])
def test_every_truncation_is_reported(tmp_path, suffix):
    """Cut anywhere in its first 90%, a file gives ImageError or (GIF keeps complete rows) a picture, nothing else."""
    path = tmp_path / f"a.{suffix}"
    picture().save(path)
    content = path.read_bytes()
    refused = 0
    for length in np.linspace(1, len(content) * 0.9, 25).astype(int):
        path.write_bytes(content[:length])
        try:
            assert read_image(path).size == (64, 48)
        except ImageError as error:
            refused += 1
            assert str(error) and "\n" not in str(error)
    assert refused >= 20 or suffix == "gif"
    path.write_bytes(content)
    read_image(path)


@pytest.mark.filterwarnings("ignore")  # Pillow remarks on odd TIFF tags
@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "tif", "webp", "ppm"])
def test_flipped_bytes_never_raise_anything_else(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    picture().save(path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(100):
        damaged = np.frombuffer(content, np.uint8).copy()
        where = rng.integers(0, min(len(damaged), 200), 3)  # headers: most of the decoders' decisions
        damaged[where] = rng.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        try:
            assert read_image(path, max_pixels=1_000_000).mode == "RGB"
        except ImageError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "empty"),
        (b"hello, I am text\n" * 100, "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "not a picture"),  # would start Ghostscript
    ],
)
def test_not_a_picture(tmp_path, content, reason):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        read_image(tmp_path / "a.jpg")


def test_not_a_file(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match="not a regular file"):
        read_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="not a regular file"):  # and does not wait for a writer
        read_image(tmp_path / "pipe.jpg")


def test_size_limit_of_the_file(tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    with pytest.raises(ImageError, match="at most 10 are read"):
        read_image(tmp_path / "a.png")


# ---- preprocessing


@pytest.mark.parametrize("resize, crop", [(4, 4), (5, 4), (256, 224)])
def test_preprocess_of_the_right_size_is_a_crop(resize, crop):
    image = picture(resize, resize)
    start = round((resize - crop) / 2)
    cut = np.asarray(image)[start : start + crop, start : start + crop].transpose(2, 0, 1)
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    result = preprocess(image, resize, crop)
    assert result.dtype == np.float32 and result.flags.c_contiguous and result.shape == (3, crop, crop)
    # Values up to 2.7 after three float32 operations on numbers below 1, divided by 0.224
    np.testing.assert_allclose(result, (cut / 255 - mean) / std, atol=4 * np.finfo(np.float32).eps / 0.224)


@pytest.mark.parametrize(
    "size, resize, crop, total, spots",
    [
        # By torchvision 0.28: ImageClassification(crop_size=crop, resize_size=resize)(picture(*size))
        ((640, 427), 232, 224, 34092.9124, [0.056939743, -0.7307989, 0.20518219, 1.2456646, 1.4199566]),
        ((427, 640), 256, 224, 34024.4188, [1.9749122, 1.1357993, -1.5280112, 0.33934647, 2.3785625]),
        ((64, 48), 256, 224, 31143.7542, [-1.3644148, -0.90204638, -0.84523803, -0.65411752, 2.0822659]),
        ((333, 777), 183, 160, 17655.1106, [-1.8610327, 0.74193001, -0.12745096, -0.91555554, 0.26962969]),
        ((51, 50), 33, 32, 720.155172, [-2.0665298, -1.0390445, -1.107843, -1.0724182, 2.0996952]),
    ],
)
def test_preprocess_is_torchvisions(size, resize, crop, total, spots):
    result = preprocess(picture(*size), resize, crop)
    assert result.shape == (3, crop, crop)
    np.testing.assert_allclose(result.sum(dtype=np.float64), total, rtol=1e-6)
    where = np.linspace(0, result.size - 1, len(spots)).astype(int)
    np.testing.assert_allclose(result.ravel()[where], spots, atol=1e-6)


def test_long_thin_pictures(tmp_path):
    assert preprocess(Image.new("RGB", (1, 700)), 256, 224).shape == (3, 224, 224)
    with pytest.raises(ImageError, match="1 x 100000 pixels is too long and thin"):  # 256 x 25,600,000 when resized
        preprocess(Image.new("RGB", (1, 100_000)), 256, 224)
    with pytest.raises(ValueError, match="crop=300"):
        preprocess(picture(), 256, 300)


# ---- finding


def test_find_images(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt", ".hidden.png", "sub/c.webp", ".git/d.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)

    def names(*args, **kwargs):
        return [str(path.relative_to(tmp_path)) for path in find_images(*args, **kwargs)]

    assert names([tmp_path]) == ["a.JPG", "b.png"]
    assert names([tmp_path], recursive=True) == ["a.JPG", "b.png", "sub/c.webp"]
    assert names([tmp_path / "notes.txt", tmp_path / "missing"]) == ["notes.txt", "missing"]
    assert find_images([tmp_path / ".git" / "nothing"]) == [tmp_path / ".git" / "nothing"]
