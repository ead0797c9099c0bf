"""Clips in and out of files: looking at one, sampling it to a few frames of one size, writing mp4 and gif.

A clip here is a uint8 array (F, H, W, 3). Files go through PyAV, a frame at a time: whatever their length, only
what lies between a sample and the keyframe before it is decoded, and only the resized samples are kept. Every bad
input ends in one ValueError of one sentence. This file knows nothing of models, latents or captions.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, pairwise
from numbers import Integral, Rational, Real
from pathlib import Path

import av
import cv2
import numpy as np
from av.stream import Disposition
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from PIL import Image

# Demuxers a clip may come through. The others stay shut, above all playlists (hls, concat, dash): they open further
# files.
CONTAINERS = "mov,matroska,gif,apng,avi,mpegts,mpeg,ogg,flv,asf"
# A frame larger than this (8192 x 8192) is refused before anything of its size is allocated.
MAX_PIXELS = 1 << 26
# Containers round times, webm to the millisecond: a frame that starts this little after a sample counts as shown at it.
TIME_ROUNDING = Fraction(1, 1000)
COLORSPACE_UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED, which PyAV has no name for
# swscale's exact arithmetic: its default darkens by one level and takes the nearest chroma sample.
EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds, as a viewer sees it: the size is the displayed one, after rotation and pixel aspect."""

    duration: float  # seconds
    fps: float  # mean frames per second
    width: int
    height: int
    num_frames: int  # estimated from duration and fps where the container does not say
    rotation: int  # degrees clockwise that the file asks for: 0, 90, 180 or 270; already applied everywhere here


@dataclass(frozen=True)
class VideoClip:
    frames: np.ndarray  # uint8 (F, H, W, 3)
    fps: float  # frames per second at which the clip plays at its own speed
    times: np.ndarray  # float64 (F,): the second of the file, from its first frame on, that each frame shows


def probe(path: str | os.PathLike) -> VideoInfo:
    """Look at a video file, decoding no more than its first frame."""
    with _Source.open(path) as source:
        transposed, flip_x, flip_y = _orientation(source.first)
        width, height = max(1, round(source.first.width * source.pixel_aspect)), source.first.height
        return VideoInfo(
            duration=float(source.duration),
            fps=float(source.rate),
            width=height if transposed else width,
            height=width if transposed else height,
            num_frames=source.stream.frames or max(1, round(source.duration * source.rate)),
            rotation=(90 if flip_x else 270) if transposed else (180 if flip_x and flip_y else 0),
        )


def read_video(
    path: str | os.PathLike,
    num_frames: int,
    height: int,
    width: int,
    *,
    fps: float | Fraction | None = None,
    start: float = 0.0,
    end: float | None = None,
    fit: str = "crop",
) -> VideoClip:
    """Sample a video file to `num_frames` (4k + 1) frames of `height` x `width`.

    Time is cut into `num_frames` equal intervals and each gives the frame that is on screen at its middle. Without
    `fps` the intervals fill the span from `start` to `end` seconds (the whole clip by default), so a clip of few
    frames repeats them; with `fps` each lasts 1/fps second, and a clip too short for that is an error. `fit="crop"`
    fills the frame and cuts what sticks out on both sides, `fit="pad"` shows everything between black bars.
    Transparent pixels become white.
    """
    if not isinstance(num_frames, Integral) or num_frames < 1 or num_frames % 4 != 1:
        raise ValueError(f"num_frames must be 4k + 1 (1, 5, 9, 13, 17, …), not {num_frames!r}.")
    if not all(isinstance(side, Integral) and side > 0 for side in (height, width)):
        raise ValueError(f"height and width must be positive whole numbers of pixels, not {height!r} and {width!r}.")
    if fit not in ("crop", "pad"):
        raise ValueError(f"fit must be 'crop' or 'pad', not {fit!r}.")
    if not (math.isfinite(start) and start >= 0):
        raise ValueError(f"start must be a second of the clip, 0 or more, not {start!r}.")
    if end is not None and not (math.isfinite(end) and end > start):
        raise ValueError(f"end must be a second after start ({start:g}), not {end!r}.")
    with _Source.open(path) as source:
        has = f"'{source.name}' lasts {float(source.duration):.2f} s"
        first, last = Fraction(float(start)), source.duration if end is None else Fraction(float(end))
        # An end copied from a rounded duration (a slider, a label) is meant to be the clip's own end.
        if last > source.duration + Fraction(1, 20):
            raise ValueError(f"{has}, so it cannot be read to second {end:g}; choose an end within the clip.")
        last = min(last, source.duration)
        if first >= last:
            raise ValueError(f"{has}, so it cannot be read from second {start:g} on; choose a start within the clip.")
        interval = (last - first) / int(num_frames) if fps is None else 1 / _exact_rate(fps)
        times = [first + (index + Fraction(1, 2)) * interval for index in range(num_frames)]
        if times[-1] >= last:
            needed = f"{num_frames} frames at {float(fps):g} per second need {float(num_frames * interval):.2f} s"
            raise ValueError(
                f"{has}, but {needed} between second {start:g} and {float(last):.2f}; "
                f"give a longer clip, fewer frames or a higher fps."
            )
        frames = np.empty((num_frames, height, width, 3), np.uint8)
        shown = None
        for index, frame in enumerate(source.frames_at(times)):
            if frame is shown:
                frames[index] = frames[index - 1]
            else:
                frames[index] = _fitted(frame, source, height, width, fit)
            shown = frame
    return VideoClip(frames, float(1 / interval), np.array([float(time) for time in times]))


def write_video(path: str | os.PathLike, frames: np.ndarray, fps: float | Fraction, scale: int = 1) -> None:
    """Write frames as an H.264 mp4 that every browser plays, tagged BT.709.

    `scale` enlarges by whole pixels, so a 64x64 clip stays crisp on a page (and keeps the colour of single pixels,
    which the half-size chroma of H.264 would blur). H.264 needs even sizes: an odd last row or column is repeated
    once.
    """
    frames, rate = _checked(frames, scale), _exact_rate(fps)
    bt709 = {"dst_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.MPEG}
    reformatter = VideoReformatter()
    with (
        _written(path) as target,
        av.open(f"file:{target}", "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        # The same frames give the same bytes: with more threads they depend on the number of cores, and x264's
        # macroblock tree comes out differently now and then on clips this small.
        options = {"crf": "17", "threads": "1", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = (side * scale + side * scale % 2 for side in frames.shape[1:3])
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for image in frames:
            image = _enlarged(image, scale)
            image = np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            container.mux(
                stream.encode(
                    reformatter.reformat(frame, format="yuv420p", interpolation=Interpolation.BILINEAR | EXACT, **bt709)
                )
            )
        container.mux(stream.encode())


def write_gif(path: str | os.PathLike, frames: np.ndarray, fps: float | Fraction, scale: int = 1) -> None:
    """Write frames as a gif that loops for ever, in the 256 colours that suit the clip best; `scale` as for mp4.

    One palette for all frames and a little dither: palettes of their own would make still backgrounds flicker.
    """
    frames, rate = _checked(frames, scale), _exact_rate(fps)
    if rate > 50:
        raise ValueError(f"A gif shows at most 50 frames per second, not {float(rate):g}; lower fps or write an mp4.")
    # Delays are whole hundredths of a second: rounding the moments, not the delays, keeps the clip's length.
    moments = [round(100 * index / rate) for index in range(len(frames) + 1)]
    pixels = frames.reshape(-1, 3)
    some = pixels[np.random.default_rng(0).integers(len(pixels), size=1 << 16)]
    palette = Image.fromarray(some[None]).quantize(256, Image.Quantize.MEDIANCUT)
    images = [Image.fromarray(_enlarged(image, scale)).quantize(palette=palette) for image in frames]
    with _written(path) as target:
        images[0].save(
            target,
            format="GIF",
            save_all=True,
            append_images=images[1:],
            duration=[10 * (after - before) for before, after in pairwise(moments)],
            loop=0,
        )


class _Source:
    """An open video file: where it starts, how long it lasts, and its frames at given times."""

    def __init__(self, name: str, container: av.container.InputContainer, stream: av.video.stream.VideoStream):
        self.name, self.container, self.stream = name, container, stream
        self.decoder = stream.codec_context
        # FFmpeg's own VP8 and VP9 decoders drop the alpha plane that libvpx reads.
        if stream.metadata.get("alpha_mode") == "1" and self.decoder.name in ("vp8", "vp9"):
            self.decoder = av.CodecContext.create({"vp8": "libvpx", "vp9": "libvpx-vp9"}[self.decoder.name], "r")
        self.decoder.thread_type = "AUTO"
        self.decoder.options = {"max_pixels": str(MAX_PIXELS)}
        self.pixel_aspect = stream.sample_aspect_ratio or Fraction(1)
        self.rate = stream.average_rate or Fraction(10)
        self.reformatter = VideoReformatter()

        end = None if stream.duration else self._find_end()
        self.decoded = self._decode()
        self.first = next(self.decoded, None)
        if self.first is None:
            raise ValueError(f"'{name}' holds no picture that can be decoded; it is damaged or cut short.")
        start = self.first.pts * stream.time_base
        self.duration = stream.duration * stream.time_base if end is None else end - start
        if self.duration <= 0:
            self.duration = 1 / self.rate
        if container.format.name == "gif":  # FFmpeg's mean leaves out the last frame's delay
            self.rate = stream.frames / self.duration

    @classmethod
    @contextmanager
    def open(cls, path: str | os.PathLike) -> Iterator[_Source]:
        given, path = os.fspath(path), Path(path)
        if path.is_dir():
            raise ValueError(f"'{given}' is a folder; give a video file.")
        if not path.is_file():
            raise ValueError(f"There is no file '{given}'.")
        if path.stat().st_size == 0:
            raise ValueError(f"'{path.name}' is an empty file; give a video.")
        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file", "fflags": "+genpts+discardcorrupt"}
        unreadable = (
            f"'{path.name}' cannot be read as a video: it is cut short, damaged or none of mp4, mov, webm, mkv, avi "
            f"and gif in a common encoding."
        )
        try:
            # With "file:" before it, no name can be taken for a web address or another of FFmpeg's protocols.
            container = av.open(f"file:{path.absolute()}", options=options, metadata_errors="replace")
        except (av.FFmpegError, OSError):
            raise ValueError(unreadable) from None
        with container:
            streams = [
                stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic
            ]
            if not streams and container.streams.audio:
                raise ValueError(f"'{path.name}' has sound but no moving pictures; give a video.")
            if not streams or streams[0].codec_context is None:
                raise ValueError(unreadable)
            codec = streams[0].codec_context
            if codec.width * codec.height > MAX_PIXELS:
                raise ValueError(
                    f"'{path.name}' has frames of {codec.width}x{codec.height}, "
                    f"over {MAX_PIXELS >> 20} million pixels; scale it down."
                )
            try:
                yield cls(path.name, container, streams[0])
            except av.FFmpegError:
                raise ValueError(unreadable) from None

    def _find_end(self) -> Fraction:
        """Where the pictures end, for containers that give at most the length of the file, sound included (webm)."""
        claimed = Fraction(self.container.duration or 0, av.time_base)
        if claimed:
            self.container.seek(self.container.duration)
        end = end_of_all = Fraction(0)
        for packet in self.container.demux():
            if packet.pts is not None:
                pause = packet.duration * packet.time_base if packet.duration else 1 / self.rate
                end_of_all = max(end_of_all, packet.pts * packet.time_base + pause)
                if packet.stream is self.stream:
                    end = max(end, packet.pts * packet.time_base + pause)
        self.container.seek(0)
        # Where even the sound breaks off early, the file is cut short, and who needs the rest shall be told.
        return claimed if claimed - end_of_all > 1 else end

    def frames_at(self, times: list[Fraction]) -> Iterator[av.VideoFrame]:
        """The frame on screen at each of some rising times; what the file's index lets us leave out is not decoded."""
        index, time_base = self.stream.index_entries, self.stream.time_base
        shown, coming = None, self.first
        for time in times:
            pts = self.first.pts + (time + TIME_ROUNDING) / time_base
            keyframe = index.search_timestamp(math.floor(pts), backward=True)
            if coming is not None and keyframe >= 0 and index[keyframe].timestamp > coming.pts:
                self._seek(pts)
                shown, coming = None, next(self.decoded, None)
            while coming is not None and (shown is None or coming.pts <= pts):
                shown, coming = coming, next(self.decoded, None)
            lasts = (shown.duration or 0) * time_base if shown else 0
            if shown is None or (coming is None and (pts - shown.pts) * time_base > lasts + 2 / self.rate):
                raise ValueError(
                    f"'{self.name}' breaks off before second {float(time):.2f} although it claims to last "
                    f"{float(self.duration):.2f} s: it is cut short or damaged."
                )
            yield shown

    def _seek(self, pts: Fraction) -> None:
        # An index sorts by decoding time, so what it finds may first be shown after pts: then go further back.
        back = 0
        while True:
            self.container.seek(max(math.floor(pts) - back, self.first.pts), stream=self.stream)
            self.decoder.flush_buffers()
            self.decoded = self._decode()
            frame = next(self.decoded, None)
            if (frame is not None and frame.pts <= pts) or pts - back <= self.first.pts:
                break
            back = max(2 * back, math.ceil(1 / self.stream.time_base))
        if frame is not None:
            self.decoded = chain((frame,), self.decoded)

    def _decode(self) -> Iterator[av.VideoFrame]:
        try:
            for packet in self.container.demux(self.stream):
                if packet.size:
                    yield from (frame for frame in self.decoder.decode(packet) if frame.pts is not None)
            yield from (frame for frame in self.decoder.decode(None) if frame.pts is not None)
        except av.InvalidDataError:
            return  # a cut file often ends in half a picture: frames_at says what is missing, if anything is


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How a frame comes upright: transposed? then mirrored left-right? then top-bottom? (the nearest of eight ways)"""
    if "DISPLAYMATRIX" not in [side_data.type.name for side_data in frame.side_data]:
        return False, False, False
    # x' = a x + c y, y' = b x + d y in 16.16 fixed point; columns u, v, w are of no use here.
    a, b, _, c, d = np.frombuffer(frame.side_data["DISPLAYMATRIX"], np.int32)[:5].tolist()
    return (True, c < 0, b < 0) if abs(b) > abs(a) else (False, a < 0, d < 0)


def _fitted(frame: av.VideoFrame, source: _Source, height: int, width: int, fit: str) -> np.ndarray:
    transposed, flip_x, flip_y = _orientation(frame)
    if transposed:
        height, width = width, height
    image = _rgb(frame, source.reformatter, height, width)
    rows, columns = image.shape[:2]
    # How much wider than the wanted shape the frame is, as displayed.
    excess = Fraction(columns, rows) * source.pixel_aspect / Fraction(width, height)
    if fit == "crop":
        keep_columns = max(1, round(columns / excess)) if excess > 1 else columns
        keep_rows = max(1, round(rows * excess)) if excess < 1 else rows
        top, left = (rows - keep_rows) // 2, (columns - keep_columns) // 2
        image = _resized(image[top : top + keep_rows, left : left + keep_columns], height, width)
    else:
        inner_height = max(1, round(height / excess)) if excess > 1 else height
        inner_width = max(1, round(width * excess)) if excess < 1 else width
        top, left = (height - inner_height) // 2, (width - inner_width) // 2
        canvas = np.zeros((height, width, 3), np.uint8)
        canvas[top : top + inner_height, left : left + inner_width] = _resized(image, inner_height, inner_width)
        image = canvas
    if transposed:
        image = image.transpose(1, 0, 2)
    return image[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


def _rgb(frame: av.VideoFrame, reformatter: VideoReformatter, height: int, width: int) -> np.ndarray:
    """The frame in RGB, not smaller than `height` x `width` if it was not; a far larger one is shrunk at once."""
    has_alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    # Files that do not say: the rule of browsers and players, BT.601 for small pictures and BT.709 from 720 lines on.
    untagged_hd = frame.colorspace == COLORSPACE_UNSPECIFIED and frame.height >= 720
    shrink = 1 if has_alpha else max(1, min(frame.height // (2 * height), frame.width // (2 * width)))
    image = reformatter.reformat(
        frame,
        height=frame.height // shrink,
        width=frame.width // shrink,
        format="rgba" if has_alpha else "rgb24",
        src_colorspace=Colorspace.ITU709 if untagged_hd else None,
        interpolation=Interpolation.AREA | EXACT,
    ).to_ndarray()
    if not has_alpha:
        return image
    alpha = image[..., 3:].astype(np.uint16)
    return ((image[..., :3] * alpha + (255 - alpha) * 255 + 127) // 255).astype(np.uint8)


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    # Averaging areas is free of aliasing but blocky when it enlarges, so each side is first shrunk, then enlarged.
    rows, columns = image.shape[:2]
    image = cv2.resize(image, (min(columns, width), min(rows, height)), interpolation=cv2.INTER_AREA)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)


def _exact_rate(fps: float | Fraction) -> Fraction:
    """30000/1001 from 29.97002997: what a file stores is a ratio of whole numbers."""
    if not (isinstance(fps, Real) and math.isfinite(fps) and 0.001 <= fps <= 1000):
        raise ValueError(f"fps must be a number of frames per second between 0.001 and 1000, not {fps!r}.")
    return Fraction(fps if isinstance(fps, Rational) else float(fps)).limit_denominator(100_000)


def _checked(frames: np.ndarray, scale: int) -> np.ndarray:
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        got = f"{frames.dtype} {frames.shape}" if isinstance(frames, np.ndarray) else type(frames).__name__
        raise ValueError(f"frames must be a uint8 array of shape (F, H, W, 3), not {got}.")
    if 0 in frames.shape:
        raise ValueError(f"frames must hold at least one frame of at least one pixel, not {frames.shape}.")
    if not isinstance(scale, Integral) or scale < 1:
        raise ValueError(f"scale must be a whole number, 1 or more, not {scale!r}.")
    return frames


def _enlarged(image: np.ndarray, scale: int) -> np.ndarray:
    return image.repeat(scale, axis=0).repeat(scale, axis=1)


@contextmanager
def _written(path: str | os.PathLike) -> Iterator[Path]:
    path = Path(path).absolute()
    try:
        yield path
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"'{path}' cannot be written: {error.strerror or error}.") from None
