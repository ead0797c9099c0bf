"""Every file is made on the spot. Its frames carry their own number, so a test sees which frame was really read."""

from __future__ import annotations

import time
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from univigu.video import probe, read_video, write_gif, write_video

HEIGHT, WIDTH = 48, 64
RED, GREEN, BLUE, YELLOW = (200, 30, 40), (30, 160, 60), (40, 60, 190), (220, 200, 50)
CODECS = {  # container -> codec, pixel format, options
    "mp4": ("libx264", "yuv420p", {"preset": "ultrafast", "g": "12", "bf": "2"}),
    "mov": ("libx264", "yuv420p", {"preset": "ultrafast", "g": "12", "bf": "2"}),
    "mkv": ("libx264", "yuv420p", {"preset": "ultrafast", "g": "12", "bf": "2"}),
    "ts": ("libx264", "yuv420p", {"preset": "ultrafast", "g": "12", "bf": "2"}),
    "webm": ("libvpx-vp9", "yuv420p", {"deadline": "realtime", "cpu-used": "8", "g": "12"}),
    "avi": ("mpeg4", "yuv420p", {"g": "12", "bf": "2", "b": "2M"}),
    "gif": ("gif", "rgb8", {}),
}


def numbered(number: int) -> np.ndarray:
    """A picture of 16 cells that spells its number in binary."""
    bits = np.array([number >> bit & 1 for bit in range(16)], np.uint8).reshape(4, 4) * 255
    return np.repeat(bits.repeat(HEIGHT // 4, 0).repeat(WIDTH // 4, 1)[..., None], 3, 2)


def numbers(frames: np.ndarray) -> list[int]:
    rows, columns = (np.arange(4) * 2 + 1) * frames.shape[1] // 8, (np.arange(4) * 2 + 1) * frames.shape[2] // 8
    bits = frames[:, rows][:, :, columns].mean(-1).reshape(len(frames), 16) > 127
    return [int(sum(1 << i for i, bit in enumerate(frame) if bit)) for frame in bits]


def quarters(height: int = HEIGHT, width: int = WIDTH, colours=(RED, GREEN, BLUE, YELLOW)) -> np.ndarray:
    image = np.empty((height, width, len(colours[0])), np.uint8)
    top, left = height // 2, width // 2
    image[:top, :left], image[:top, left:], image[top:, :left], image[top:, left:] = colours
    return image


def corners(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    return np.array(
        [[image[y, x] for x in (width // 6, width - width // 6)] for y in (height // 6, height - height // 6)]
    )


def is_near(actual, wanted, tolerance: float = 6) -> bool:
    return bool(np.abs(np.asarray(actual, float) - np.asarray(wanted, float)).max() <= tolerance)


def encode(path, images, fps=8, codec=None, pixels=None, options=None, starts=None, setup=None, container_options=None):
    """Write images with PyAV itself, at `fps` or, for a variable rate, from the given milliseconds on."""
    default_codec, default_pixels, default_options = CODECS.get(path.suffix[1:], CODECS["mp4"])
    if codec is None:
        codec, pixels, options = default_codec, pixels or default_pixels, options or default_options
    kind = {"ts": "mpegts", "mkv": "matroska"}.get(path.suffix[1:])
    with av.open(str(path), "w", format=kind, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        for number, image in enumerate(images):
            if number == 0:
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt = pixels
                if starts:
                    stream.codec_context.time_base = Fraction(1, 1000)
                if setup:
                    setup(stream)
            frame = av.VideoFrame.from_ndarray(image, "rgba" if image.shape[2] == 4 else "rgb24")
            if starts:
                frame.pts, frame.time_base = starts[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module", params=list(CODECS))
def numbered_clip(request, tmp_path_factory):
    """40 numbered frames at 8 per second in every container."""
    return encode(tmp_path_factory.mktemp("clips") / f"clip.{request.param}", [numbered(i) for i in range(40)])


SPANS = [
    (17, {}),
    (41, {}),
    (5, {"start": 1.3, "end": 3.1}),
    (9, {"start": 4.2}),
    (1, {"end": 0.4}),
    (17, {"fps": 8}),
    (33, {"fps": 8, "start": 0.8125}),
    (5, {"fps": 4, "start": 1.0}),
    (9, {"fps": 2.5, "start": 0.3}),
    (13, {"fps": 30, "start": 2.2}),
]


@pytest.mark.parametrize(("num_frames", "span"), SPANS)
def test_each_sample_is_the_frame_on_screen_at_its_time(numbered_clip, num_frames, span):
    clip = read_video(numbered_clip, num_frames, 36, 48, **span)

    assert clip.frames.shape == (num_frames, 36, 48, 3) and clip.frames.dtype == np.uint8
    interval = 1 / span["fps"] if "fps" in span else (span.get("end", 5.0) - span.get("start", 0.0)) / num_frames
    assert np.allclose(clip.times, span.get("start", 0.0) + (np.arange(num_frames) + 0.5) * interval, atol=0.011)
    assert clip.fps == pytest.approx(1 / interval, rel=0.02)
    tick = 100 if numbered_clip.suffix == ".gif" else 1000
    starts = np.round(np.arange(40) / 8 * tick + 1e-9) / tick
    assert numbers(clip.frames) == [int(np.flatnonzero(starts <= at + 0.001)[-1]) for at in clip.times]


def test_every_frame_of_a_clip_is_read_once_when_it_has_as_many_as_asked(numbered_clip):
    assert numbers(read_video(numbered_clip, 17, HEIGHT, WIDTH, fps=8, start=2).frames) == list(range(16, 33))
    assert numbers(read_video(numbered_clip, 17, HEIGHT, WIDTH, end=2.125).frames) == list(range(17))


def test_probe_sees_duration_rate_and_size(numbered_clip):
    info = probe(numbered_clip)
    assert info.duration == pytest.approx(5, abs=0.011) and info.fps == pytest.approx(8, rel=0.003)
    assert (info.width, info.height, info.num_frames, info.rotation) == (WIDTH, HEIGHT, 40, 0)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "webm", "mkv", "gif"])
def test_variable_frame_rate_is_sampled_by_time_not_by_frame_number(tmp_path, suffix):
    starts = [0, 40, 100, 1100, 1130, 1500, 1520, 2600, 2640, 2700]
    path = encode(tmp_path / f"clip.{suffix}", map(numbered, range(10)), fps=25, starts=starts)

    clip = read_video(path, 53, HEIGHT, WIDTH, end=2.65)

    assert numbers(clip.frames) == [
        max(i for i, start in enumerate(starts) if start <= 1000 * at + 1) for at in clip.times.tolist()
    ]


def test_a_gif_with_delays_of_its_own_and_transparency(tmp_path):
    halves = [Image.new("RGBA", (40, 30), (0, 0, 0, 0)) for _ in range(3)]
    for half, left in zip(halves, (0, 20, 10), strict=True):
        half.paste((*RED, 255), (left, 0, left + 20, 30))
    path = tmp_path / "clip.gif"
    halves[0].save(path, save_all=True, append_images=halves[1:], duration=[250, 500, 250], disposal=2)

    row = read_video(path, 5, 30, 40).frames[:, 15, [5, 15, 25, 35]]

    white, red = (255, 255, 255), RED
    second = [white, white, red, red]
    assert is_near(row, [[red, red, white, white], second, second, second, [white, red, red, white]])
    assert probe(path).duration == 1.0 and probe(path).num_frames == 3


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "options"),
    [
        ("vp9.webm", "libvpx-vp9", "yuva420p", {"deadline": "realtime", "cpu-used": "8"}),
        ("vp8.webm", "libvpx", "yuva420p", {"auto-alt-ref": "0", "deadline": "realtime"}),
        ("png.mov", "png", "rgba", {}),
        ("prores.mov", "prores_ks", "yuva444p10le", {}),
    ],
)
def test_transparent_pixels_become_white(tmp_path, name, codec, pixels, options):
    image = quarters(colours=[(*RED, 255), (*RED, 128), (*RED, 0), (*BLUE, 255)])
    path = encode(tmp_path / name, [image] * 3, codec=codec, pixels=pixels, options=options)

    seen = corners(read_video(path, 1, HEIGHT, WIDTH).frames[0])

    halfway = np.add(RED, 255) / 2
    assert is_near(seen, [[RED, halfway], [(255, 255, 255), BLUE]])


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("clockwise", [0, 90, 180, 270])
def test_rotation_tags_are_applied(tmp_path, clockwise, mirrored):
    image = quarters()
    path = encode(
        tmp_path / "clip.mp4", [image] * 3, setup=lambda s: s.set_display_rotation(-clockwise, hflip=mirrored)
    )
    upright = np.rot90(image, -clockwise // 90)
    if mirrored:
        upright = upright[:, ::-1]

    info = probe(path)
    seen = read_video(path, 1, *upright.shape[:2]).frames[0]

    assert (info.height, info.width) == upright.shape[:2]
    assert mirrored or info.rotation == clockwise
    assert is_near(corners(seen), corners(upright))


def test_portrait_crop_keeps_the_middle_and_pad_keeps_everything(tmp_path):
    image = np.zeros((96, 48, 3), np.uint8)
    image[:24], image[24:72], image[72:] = RED, GREEN, BLUE
    path = encode(tmp_path / "clip.mp4", [image] * 3)

    cropped = read_video(path, 1, 32, 32).frames[0]
    padded = read_video(path, 1, 32, 32, fit="pad").frames[0]

    assert is_near(cropped[2:30, 2:30], GREEN)
    assert is_near(padded[:, :8], 0, 0) and is_near(padded[:, 24:], 0, 0)
    assert is_near(padded[4, 16], RED) and is_near(padded[16, 16], GREEN) and is_near(padded[28, 16], BLUE)
    wide = encode(tmp_path / "wide.mp4", [image.transpose(1, 0, 2)] * 3)
    assert is_near(read_video(wide, 1, 32, 32).frames[0][2:30, 2:30], GREEN)
    assert is_near(read_video(wide, 1, 32, 32, fit="pad").frames[0][:8], 0, 0)


def test_pixels_that_are_not_square_are_shown_as_meant(tmp_path):
    def widen(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(2)

    image = np.zeros((64, 32, 3), np.uint8)
    image[:], image[16:48, 8:24] = BLUE, RED
    path = encode(tmp_path / "clip.mp4", [image] * 3, setup=widen)

    assert (probe(path).width, probe(path).height) == (64, 64)
    seen = read_video(path, 1, 64, 64, fit="pad").frames[0]
    assert is_near(seen[32, 20:44], RED) and is_near(seen[20:44, 32], RED)
    assert is_near(seen[32, [4, 60]], BLUE) and is_near(seen[[4, 60], 32], BLUE)


@pytest.mark.parametrize(("height", "width"), [(37, 51), (1, 1), (3, 90)])
@pytest.mark.parametrize("suffix", ["webm", "gif"])
def test_odd_sizes(tmp_path, suffix, height, width):
    image = np.full((height, width, 3), BLUE, np.uint8)
    path = tmp_path / f"clip.{suffix}"
    if suffix == "gif":
        Image.fromarray(image).save(path)
    else:
        encode(path, [image] * 5)

    assert (probe(path).height, probe(path).width) == (height, width)
    assert is_near(read_video(path, 5, 16, 24).frames, BLUE)


@pytest.mark.parametrize("suffix", list(CODECS))
def test_one_frame_stands_still(tmp_path, suffix):
    path = encode(tmp_path / f"clip.{suffix}", [numbered(5)])

    clip = read_video(path, 9, HEIGHT, WIDTH)

    assert numbers(clip.frames) == [5] * 9
    assert probe(path).num_frames == 1 and 0 < probe(path).duration <= 0.2
    with pytest.raises(ValueError, match=r"9 frames at 8 per second need 1\.12 s"):
        read_video(path, 9, HEIGHT, WIDTH, fps=8)


@pytest.mark.parametrize(
    ("suffix", "fps", "options"),
    [
        ("mp4", 10, {}),
        ("mp4", 2, {"movflags": "frag_keyframe+empty_moov"}),
        ("webm", 1, {}),
        ("webm", 1, {"live": "1"}),  # as browsers record: neither a duration nor an index
    ],
)
def test_ten_minutes_are_read_at_once(tmp_path, suffix, fps, options):
    images = (numbered(number) for number in range(600 * fps))
    fast = ("libvpx", "yuv420p", {"deadline": "realtime", "cpu-used": "16"}) if suffix == "webm" else (None, None, None)
    path = encode(tmp_path / f"long.{suffix}", images, fps, *fast, container_options=options)

    began = time.process_time()
    info = probe(path)
    sparse = read_video(path, 17, HEIGHT, WIDTH)
    late = read_video(path, 17, HEIGHT, WIDTH, fps=fps, start=580)
    spent = time.process_time() - began

    assert info.duration == pytest.approx(600, abs=0.1) and info.num_frames == 600 * fps
    assert numbers(sparse.frames) == [int(at * fps) for at in sparse.times]
    assert numbers(late.frames) == list(range(580 * fps, 580 * fps + 17))
    assert spent < 2


def test_sound_does_not_lengthen_the_pictures(tmp_path):
    path = tmp_path / "clip.webm"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libvpx", rate=8, options={"deadline": "realtime"})
        video.height, video.width, video.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        audio = container.add_stream("libopus", rate=48000)
        for number in range(8):
            container.mux(video.encode(av.VideoFrame.from_ndarray(numbered(number), "rgb24")))
        container.mux(video.encode())
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 48000 * 4 * 2), np.int16), "s16", "stereo")
        silence.sample_rate = 48000
        container.mux(audio.encode(silence))
        container.mux(audio.encode())

    assert probe(path).duration == pytest.approx(1, abs=0.01)
    assert numbers(read_video(path, 9, HEIGHT, WIDTH).frames) == [0, 1, 2, 3, 4, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("codec", "pixels", "matrix", "levels"),
    [
        ("libx264", "yuv444p", Colorspace.ITU709, ColorRange.MPEG),
        ("libx264", "yuv444p", Colorspace.ITU601, ColorRange.MPEG),
        ("libx264", "yuvj420p", Colorspace.ITU601, ColorRange.JPEG),
        ("libx264", "yuv420p10le", Colorspace.ITU709, ColorRange.MPEG),
        ("libx264", "yuv420p", Colorspace.ITU601, None),  # untagged and small
        ("prores_ks", "yuv422p10le", Colorspace.ITU709, ColorRange.MPEG),
    ],
)
def test_colours_survive_matrix_range_and_depth(tmp_path, codec, pixels, matrix, levels):
    path, image = tmp_path / "clip.mov", quarters()
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options={"crf": "8"} if codec == "libx264" else {})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, pixels
        if levels:
            tag = {Colorspace.ITU709: 1, Colorspace.ITU601: 6}[matrix]
            stream.codec_context.colorspace, stream.codec_context.color_range = tag, levels
        frame = av.VideoFrame.from_ndarray(image, "rgb24")
        range_ = levels or ColorRange.MPEG
        container.mux(stream.encode(frame.reformat(format=pixels, dst_colorspace=matrix, dst_color_range=range_)))
        container.mux(stream.encode())

    assert is_near(corners(read_video(path, 1, HEIGHT, WIDTH).frames[0]), corners(image), 4)


def test_shrinking_averages_and_does_not_alias(tmp_path):
    stripes = np.zeros((480, 640, 3), np.uint8)
    stripes[:, ::2] = 255
    path = encode(tmp_path / "clip.mp4", [stripes] * 2)

    assert is_near(read_video(path, 1, 30, 40).frames, 127.5, 8)
    assert is_near(read_video(path, 1, 300, 400).frames.reshape(300, -1, 20, 3).mean((0, 2)), 127.5, 8)


def message_of(call) -> str:
    """The one clear sentence that a call must end with."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert not isinstance(caught.value, av.FFmpegError)
    assert caught.value.__cause__ is None and (caught.value.__suppress_context__ or caught.value.__context__ is None)
    assert message.endswith(".") and "\n" not in message and "Error" not in message
    return message


def test_files_that_are_no_video_get_one_sentence(tmp_path, capfd):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("Not a film at all.\n" * 50)
    (tmp_path / "noise.webm").write_bytes(np.random.default_rng(0).bytes(5000))
    Image.fromarray(quarters()).save(tmp_path / "picture.png")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    with av.open(str(tmp_path / "sound.m4a"), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), "fltp", "mono")
        silence.sample_rate = 48000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())

    for name, wanted in {
        "missing.mp4": "There is no file",
        "": "is a folder",
        "empty.mp4": "is an empty file",
        "text.mp4": "cannot be read as a video",
        "noise.webm": "cannot be read as a video",
        "picture.png": "cannot be read as a video",
        "sound.wav": "cannot be read as a video",
        "sound.m4a": "has sound but no moving pictures",
    }.items():
        for call in (lambda p: probe(p), lambda p: read_video(p, 5, 8, 8)):
            message = message_of(lambda name=name, call=call: call(tmp_path / name))
            assert wanted in message and name in message
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", ["mp4", "mov", "webm", "mkv"])
def test_a_file_cut_short_says_so(tmp_path, suffix, capfd):
    options = {"movflags": "+faststart"} if suffix in ("mp4", "mov") else {}
    images = np.random.default_rng(0).integers(0, 256, (40, HEIGHT, WIDTH, 3), dtype=np.uint8)
    path = encode(tmp_path / f"clip.{suffix}", images, container_options=options)
    whole = path.read_bytes()

    path.write_bytes(whole[: len(whole) * 6 // 10])
    assert "cut short" in message_of(lambda: read_video(path, 17, HEIGHT, WIDTH))
    assert len(read_video(path, 17, HEIGHT, WIDTH, end=1.5).frames) == 17, "what is left can still be used"
    path.write_bytes(whole[:400])
    assert "cut short" in message_of(lambda: read_video(path, 17, HEIGHT, WIDTH))
    assert capfd.readouterr() == ("", "")


def test_an_mp4_that_lost_its_index_says_so(tmp_path):
    path = encode(tmp_path / "clip.mp4", [numbered(i) for i in range(40)])
    path.write_bytes(path.read_bytes()[:-1500])
    assert "cut short" in message_of(lambda: read_video(path, 17, HEIGHT, WIDTH))


def test_nothing_but_a_plain_local_video_is_opened(tmp_path, monkeypatch):
    video = encode(tmp_path / "clip.mp4", [numbered(7)] * 9)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{video}\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    (tmp_path / "list.mp4").write_text(playlist)
    (tmp_path / "concat.mp4").write_text(f"ffconcat version 1.0\nfile '{video}'\n")
    for name in ("list.m3u8", "list.mp4", "concat.mp4"):
        assert "cannot be read as a video" in message_of(lambda name=name: read_video(tmp_path / name, 5, 8, 8))
    for address in ("http://127.0.0.1/clip.mp4", f"concat:{video}", f"file:{video}", "pipe:0", "color=red", "-"):
        assert "There is no file" in message_of(lambda address=address: probe(address))

    monkeypatch.chdir(tmp_path)
    video.rename(tmp_path / "concat:film 100% é.mp4")
    assert numbers(read_video("concat:film 100% é.mp4", 5, HEIGHT, WIDTH).frames) == [7] * 5


def test_a_frame_of_absurd_size_is_refused(tmp_path):
    path = encode(tmp_path / "clip.gif", [quarters()])
    data = bytearray(path.read_bytes())
    data[6:10] = (10000).to_bytes(2, "little") * 2
    path.write_bytes(data)
    assert "10000x10000" in message_of(lambda: probe(path))


def test_a_clip_that_is_too_short_says_what_it_has_and_what_is_needed(tmp_path):
    path = encode(tmp_path / "clip.mp4", [numbered(i) for i in range(16)])
    message = message_of(lambda: read_video(path, 33, HEIGHT, WIDTH, fps=8))
    for part in ("lasts 2.00 s", "33 frames at 8 per second", "need 4.12 s", "give a longer clip"):
        assert part in message
    assert "between second 1 and 1.5" in message_of(lambda: read_video(path, 5, 8, 8, fps=8, start=1, end=1.5))
    assert "to second 2.5" in message_of(lambda: read_video(path, 5, 8, 8, end=2.5))
    assert "from second 2 on" in message_of(lambda: read_video(path, 5, 8, 8, start=2))
    assert len(read_video(path, 5, 8, 8, end=2.01).frames) == 5, "a rounded duration is the clip's own end"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"num_frames": 16}, "4k + 1"),
        ({"num_frames": 0}, "4k + 1"),
        ({"num_frames": -3}, "4k + 1"),
        ({"num_frames": 5.0}, "4k + 1"),
        ({"height": 0}, "height and width"),
        ({"width": 8.5}, "height and width"),
        ({"fit": "stretch"}, "'crop' or 'pad'"),
        ({"fps": 0}, "fps must be"),
        ({"fps": float("nan")}, "fps must be"),
        ({"fps": "8"}, "fps must be"),
        ({"start": -0.1}, "start must be"),
        ({"start": float("inf")}, "start must be"),
        ({"start": 1, "end": 1}, "end must be"),
    ],
)
def test_wrong_arguments_get_one_sentence(tmp_path, arguments, wanted):
    path = encode(tmp_path / "clip.mp4", [numbered(i) for i in range(16)])
    arguments = {"num_frames": 5, "height": 8, "width": 8, **arguments}
    assert wanted in message_of(lambda: read_video(path, **arguments))


@pytest.fixture
def drawing() -> np.ndarray:
    """17 frames of 64x64: a soft sky, and a ball that crosses it."""
    rows, columns = np.mgrid[:64, :64]
    frames = np.stack([np.stack([90 + rows, 140 + rows // 2, 250 - columns // 2], -1)] * 17).astype(np.uint8)
    for number, frame in enumerate(frames):
        frame[(rows - 32) ** 2 + (columns - 8 - 3 * number) ** 2 < 60] = RED
    return frames


@pytest.mark.parametrize("scale", [1, 4])
def test_an_mp4_comes_back_as_it_was_written(tmp_path, drawing, scale):
    write_video(tmp_path / "clip.mp4", drawing, 8, scale)

    info = probe(tmp_path / "clip.mp4")
    clip = read_video(tmp_path / "clip.mp4", 17, 64, 64)

    assert (info.width, info.height, info.num_frames) == (64 * scale, 64 * scale, 17)
    assert (info.duration, info.fps, clip.fps) == (2.125, 8, 8)
    error = np.abs(clip.frames.astype(int) - drawing)
    assert error.mean() < (2 if scale == 1 else 1)
    assert abs((clip.frames.astype(int) - drawing).mean()) < 0.5, "no colour cast"
    assert error.mean((1, 2, 3)).max() < 3, "and in its order"


def test_an_mp4_plays_in_browsers(tmp_path, drawing):
    write_video(tmp_path / "clip.mp4", drawing, 8)

    data = (tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "it can start before it has all arrived"
    with av.open(str(tmp_path / "clip.mp4")) as container:
        (stream,) = container.streams
        frame = next(container.decode(stream))
    assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    assert [frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range] == [1, 1, 1, ColorRange.MPEG]


def test_the_same_frames_give_the_same_file(tmp_path, drawing):
    for write in (write_video, write_gif):
        files = set()
        for _ in range(20 if write is write_video else 2):
            write(tmp_path / "clip", drawing, 8)
            files.add((tmp_path / "clip").read_bytes())
        assert len(files) == 1


def test_a_gif_comes_back_as_it_was_written_and_loops(tmp_path, drawing):
    write_gif(tmp_path / "clip.gif", drawing, 8, 2)

    info, clip = probe(tmp_path / "clip.gif"), read_video(tmp_path / "clip.gif", 17, 64, 64)

    assert (info.width, info.height, info.num_frames) == (128, 128, 17)
    assert info.duration == pytest.approx(17 / 8, abs=0.006)
    assert np.abs(clip.frames.astype(int) - drawing).mean((1, 2, 3)).max() < 3
    assert Image.open(tmp_path / "clip.gif").info["loop"] == 0
    assert "at most 50" in message_of(lambda: write_gif(tmp_path / "clip.gif", drawing, 60))


@pytest.mark.parametrize("fps", [Fraction(30000, 1001), 30000 / 1001, np.float64(12.5), 24])
def test_a_rate_that_is_no_whole_number_is_kept(tmp_path, drawing, fps):
    write_video(tmp_path / "clip.mp4", drawing, fps)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].average_rate == Fraction(float(fps)).limit_denominator(1001)
    assert len(read_video(tmp_path / "clip.mp4", 17, 8, 8, fps=fps).frames) == 17


@pytest.mark.parametrize("write", [write_video, write_gif])
@pytest.mark.parametrize(("height", "width", "count"), [(33, 51, 3), (1, 1, 1), (64, 64, 1)])
def test_odd_sizes_and_single_frames_can_be_written(tmp_path, write, height, width, count):
    path = tmp_path / ("clip.mp4" if write is write_video else "clip.gif")
    write(path, np.full((count, height, width, 3), BLUE, np.uint8), 8)

    info = probe(path)
    even = 2 if write is write_video else 1
    assert (info.height, info.width) == (height + height % even, width + width % even)
    assert info.duration == pytest.approx(count / 8, abs=0.006)
    assert is_near(read_video(path, 1, 8, 8).frames, BLUE)


def test_scale_enlarges_whole_pixels(tmp_path):
    pixels = np.random.default_rng(3).choice([0, 255], (1, 6, 6, 1)).repeat(3, 3).astype(np.uint8)
    write_video(tmp_path / "clip.mp4", pixels, 8, 8)
    seen = read_video(tmp_path / "clip.mp4", 1, 48, 48).frames[0]
    assert is_near(seen[4::8, 4::8], pixels[0], 12) and is_near(seen[2::8, 5::8], pixels[0], 12)


@pytest.mark.parametrize("write", [write_video, write_gif])
def test_frames_that_cannot_be_written_get_one_sentence(tmp_path, write, capfd):
    good, path = np.zeros((2, 8, 8, 3), np.uint8), tmp_path / "clip.bin"
    for frames in (good[0], good.astype(np.float32), good[..., :2], good[:0], good[:, :0], good.tolist()):
        assert message_of(lambda frames=frames: write(path, frames, 8)).startswith("frames must")
    assert "scale must" in message_of(lambda: write(path, good, 8, 0))
    assert "fps must" in message_of(lambda: write(path, good, -1))
    assert not path.exists()
    assert "cannot be written" in message_of(lambda: write(tmp_path / "no" / "such" / "folder.mp4", good, 8))
    assert "cannot be written" in message_of(lambda: write(tmp_path, good, 8))
    assert capfd.readouterr() == ("", "")
