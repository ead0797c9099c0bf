"""Clips with their texts, wherever they are listed: manifests, folders, shards or the Hub; and what is wrong with them.

A source becomes rows, `check` opens every row and tells all that is wrong at once, and every clip gets the size it is
trained at from a few sizes (buckets). It knows nothing of models beyond the tokenizer that counts.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import importlib
import io
import json
import math
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from univigu.video import VideoInfo, probe, read_video

VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".gif")
SOURCES = (
    "a .jsonl, .csv or .parquet manifest, a folder of clips with .txt or .json files beside them, WebDataset shards "
    "such as 'shards/*.tar', or hub:owner/name"
)


@dataclass
class DataConfig:
    source: str = ""  # what SOURCES says
    cache: str = ""  # the folder that `python -m training cache` fills and training reads
    video_column: str = "video"
    prompt_column: str = "prompt"
    caption_column: str = "caption"
    split: str = "train"  # of a Hub dataset
    # The sizes (frames, height, width) that clips are trained at. A clip gets the longest that it fills, and of those
    # the one nearest to its shape.
    sizes: list[tuple[int, int, int]] = field(default_factory=lambda: [(81, 480, 832)])
    fps: float | None = 16.0  # null: the frames are spread over the whole clip, whatever its speed
    fit: Literal["crop", "pad"] = "crop"
    enlarge: bool = False  # take clips that are smaller than every size
    prompt_tokens: tuple[int, int] = (0, 128)  # section 4.1; the end-of-text token counts, as it fills a place
    caption_tokens: tuple[int, int] = (128, 256)
    tokens_per_batch: int = 33_016  # video and caption tokens of one micro-batch: one clip of 81 x 480 x 832
    held_out: int = 0  # clips that validation keeps for itself
    seed: int = 0  # of the order


@dataclass(frozen=True)
class Row:
    """One clip. `where` is how a person finds it; `place` names its bytes, and changes when they do."""

    where: str
    place: str
    prompt: str
    caption: str
    opened: Callable[[], Any]  # a context manager that gives a path
    start: float = 0.0
    end: float | None = None


@dataclass(frozen=True)
class Size:
    frames: int
    height: int
    width: int


# ------------------------------------------------------------------------------------------------------------- sources


def read_rows(config: DataConfig) -> tuple[list[Row], list[str]]:
    """All rows of a source, and what is wrong with those that are none. Raises ValueError for a source that is none."""
    if not config.source:
        raise ValueError(f"data.source is empty: name {SOURCES}.")
    if config.source.startswith("hub:"):
        return _read_hub(config)
    path = Path(config.source)
    if glob.has_magic(config.source) or path.suffix == ".tar":
        return _read_shards(config)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ValueError(f"There is no {config.source!r}; data.source takes {SOURCES}.")
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise ValueError(f"{config.source!r} is none of the sources: {SOURCES}.")
    rows, problems = [], []
    for where, record in readers[path.suffix](path):
        problem = record if isinstance(record, str) else _record_problem(record, config)
        if problem:
            problems.append(f"{where}: {problem}")
        else:
            video = path.parent / record[config.video_column]
            start, end = record.get("start") or 0.0, record.get("end")
            texts = (_text(record.get(config.prompt_column)), _text(record.get(config.caption_column)))
            rows.append(_file_row(where, video, *texts, float(start), None if end in (None, "") else float(end)))
    return _some(config, rows, problems)


def _some(config: DataConfig, rows: list[Row], problems: list[str]) -> tuple[list[Row], list[str]]:
    if not rows and not problems:
        raise ValueError(f"{config.source!r} holds no clips.")
    return rows, problems


def _record_problem(record: dict[str, Any], config: DataConfig) -> str | None:
    if not isinstance(record.get(config.video_column), str) or not record[config.video_column]:
        return f"no {config.video_column!r}; it has {', '.join(map(str, record)) or 'nothing'}"
    for name in (config.prompt_column, config.caption_column):
        if not isinstance(record.get(name) or "", str):
            return f"{name!r} is {record[name]!r}, which is no text"
    for name in ("start", "end"):
        try:
            if not math.isfinite(float(record.get(name) or 0)):
                raise ValueError
        except (TypeError, ValueError):
            return f"{name!r} must be a second of the clip, not {record[name]!r}"
    return None


def _text(value: str | None) -> str:
    return " ".join((value or "").split())


def _file_row(where: str, video: Path, prompt: str, caption: str, start: float = 0.0, end: float | None = None) -> Row:
    @contextmanager
    def opened() -> Iterator[Path]:
        yield video

    state = video.stat() if video.is_file() else None
    place = f"{video.absolute()}|{state.st_size}|{state.st_mtime_ns}" if state else str(video)
    return Row(where, place, prompt, caption, opened, start, end)


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict | str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    record = json.loads(line.decode("utf-8-sig"))
                except ValueError:
                    record = None
                yield f"line {number}", record if isinstance(record, dict) else "not a JSON object"


def _read_csv(path: Path) -> Iterator[tuple[str, dict | str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"'{path}' is not UTF-8 text.") from None
    reader = csv.DictReader(io.StringIO(text))
    for record in reader:
        extra = record.pop(None, None)
        yield f"line {reader.line_num}", "more fields than the first line names" if extra else record


def _read_parquet(path: Path) -> Iterator[tuple[str, dict | str]]:
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except Exception as error:  # pyarrow has classes of its own for every way a file can be wrong
        raise ValueError(f"'{path}' is not a Parquet file: {' '.join(str(error).split())}.") from None
    for number, record in enumerate(table.to_pylist(), 1):
        yield f"row {number}", record


def _read_folder(folder: Path) -> tuple[list[Row], list[str]]:
    """clip.mp4 with clip.txt (the caption) and clip.prompt.txt, or with clip.json that holds both."""
    rows, problems = [], []
    for video in sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES):
        where = str(video.relative_to(folder))
        beside = {name: video.with_suffix(name) for name in (".json", ".txt", ".prompt.txt")}
        files = {name: path.read_bytes() for name, path in beside.items() if path.is_file()}
        texts = _beside(files)
        if isinstance(texts, str):
            problems.append(f"{where}: {texts}")
        else:
            rows.append(_file_row(where, video, *texts))
    if not rows and not problems:
        raise ValueError(f"The folder '{folder}' holds no clips ({', '.join(VIDEO_SUFFIXES)}).")
    return rows, problems


def _beside(files: dict[str, bytes]) -> tuple[str, str] | str:
    """Prompt and caption from the files beside a clip, or what is wrong with them."""
    try:
        if ".json" in files:
            record = json.loads(files[".json"].decode("utf-8-sig"))
            texts = (record.get("prompt") or "", record.get("caption") or "") if isinstance(record, dict) else (None,)
            if not all(isinstance(text, str) for text in texts):
                return "its .json must hold an object with texts under prompt and caption"
        elif ".txt" in files or ".prompt.txt" in files:
            texts = (files.get(".prompt.txt", b"").decode("utf-8-sig"), files.get(".txt", b"").decode("utf-8-sig"))
        else:
            return "no .txt or .json beside it, so it has no caption"
    except UnicodeDecodeError:
        return "the text beside it is not UTF-8"
    except ValueError:
        return "its .json is not JSON"
    return _text(texts[0]), _text(texts[1])


def _read_shards(config: DataConfig) -> tuple[list[Row], list[str]]:
    """WebDataset: tar files whose members share a name up to the first dot. Clips are read where they lie."""
    paths = sorted(glob.glob(config.source))
    if not paths:
        raise ValueError(f"No shard fits {config.source!r}.")
    rows, problems = [], []
    for path in paths:
        examples: dict[str, dict[str, tarfile.TarInfo]] = {}
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    if member.isfile():
                        parent, _, name = member.name.rpartition("/")
                        stem, _, suffix = name.partition(".")
                        examples.setdefault(f"{parent}/{stem}", {})[f".{suffix}"] = member
                for stem, members in examples.items():
                    where = f"{path}, {stem.strip('/')}"
                    clips = [suffix for suffix in members if suffix.lower() in VIDEO_SUFFIXES]
                    beside = {s: m for s, m in members.items() if s in (".json", ".txt", ".prompt.txt")}
                    texts = _beside({suffix: archive.extractfile(member).read() for suffix, member in beside.items()})
                    if len(clips) != 1:
                        problems.append(f"{where}: {len(clips)} clips instead of one")
                    elif isinstance(texts, str):
                        problems.append(f"{where}: {texts}")
                    else:
                        rows.append(_member_row(where, Path(path), members[clips[0]], clips[0], *texts))
        except (tarfile.TarError, OSError, EOFError) as error:
            problems.append(f"{path}: not a whole tar file ({error})")
    return _some(config, rows, problems)


def _member_row(where: str, shard: Path, member: tarfile.TarInfo, suffix: str, prompt: str, caption: str) -> Row:
    @contextmanager
    def opened() -> Iterator[Path]:
        with tempfile.NamedTemporaryFile(suffix=suffix) as copy:
            with shard.open("rb") as archive:
                archive.seek(member.offset_data)
                copy.write(archive.read(member.size))
            copy.flush()
            yield Path(copy.name)

    state = shard.stat()
    place = f"{shard.absolute()}|{state.st_size}|{state.st_mtime_ns}|{member.offset_data}|{member.size}"
    return Row(where, place, prompt, caption, opened)


def _read_hub(config: DataConfig) -> tuple[list[Row], list[str]]:
    datasets = _optional("datasets", "Hub datasets", "datasets")
    name = config.source.removeprefix("hub:")
    try:
        table = datasets.load_dataset(name, split=config.split)
        table = table.cast_column(config.video_column, datasets.Video(decode=False))
    except Exception as error:  # no such dataset, split or column, no access, no network: each in a class of its own
        raise ValueError(f"The Hub dataset {name!r} cannot be read: {' '.join(str(error).split())}") from None
    rows = []
    for number in range(len(table)):
        record = table[number]
        video, where = record[config.video_column], f"row {number}"
        texts = [_text(record.get(column)) for column in (config.prompt_column, config.caption_column)]
        if video.get("bytes") is None:
            rows.append(_file_row(where, Path(video["path"]), *texts))
        else:
            rows.append(_bytes_row(where, table, number, config.video_column, *texts))
    return _some(config, rows, [])


def _bytes_row(where: str, table: Any, number: int, column: str, prompt: str, caption: str) -> Row:
    @contextmanager
    def opened() -> Iterator[Path]:
        video = table[number][column]
        with tempfile.NamedTemporaryFile(suffix=Path(video.get("path") or "clip.mp4").suffix) as copy:
            copy.write(video["bytes"])
            copy.flush()
            yield Path(copy.name)

    return Row(where, f"{table._fingerprint}|{number}", prompt, caption, opened)


def _optional(module: str, what: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{what} need the package {package}: pip install {package}.") from None


# --------------------------------------------------------------------------------------------------------------- sizes


def choose_size(info: VideoInfo, config: DataConfig, start: float = 0.0, end: float | None = None) -> Size:
    """The size a clip is trained at; ValueError where it fills none."""
    span = (info.duration if end is None else end) - start
    share = span / info.duration if info.duration else 1.0
    # A container's duration is rounded: half a frame is no reason to leave a clip out.
    frames = math.floor(span * config.fps + 0.5) if config.fps else round(info.num_frames * share)
    long_enough = [Size(*size) for size in config.sizes if size[0] <= frames]
    if not long_enough:
        shortest = min(size[0] for size in config.sizes)
        rate = f" at {config.fps:g} per second" if config.fps else ""
        raise ValueError(f"too few frames: {frames}{rate}, and the shortest of data.sizes needs {shortest}")
    filled = [size for size in long_enough if config.enlarge or _scale(info, size, config.fit) <= 1.001]
    if not filled:
        least = min(long_enough, key=lambda size: size.height * size.width)
        raise ValueError(
            f"too small: {info.height}x{info.width}, and the smallest of data.sizes is {least.height}x{least.width} "
            f"(data.enlarge=true takes it all the same)"
        )

    def rank(size: Size) -> tuple[float, ...]:
        shape = abs(math.log(info.height / info.width) - math.log(size.height / size.width))
        return -size.frames, round(shape, 3), -size.height * size.width

    return min(filled, key=rank)


def _scale(info: VideoInfo, size: Size, fit: str) -> float:
    """How much a clip is enlarged to that size."""
    scales = (size.height / info.height, size.width / info.width)
    return max(scales) if fit == "crop" else min(scales)


def read_clip(row: Row, size: Size, config: DataConfig) -> np.ndarray:
    with row.opened() as path:
        end = row.end
        if config.fps and end is None:
            info = probe(path)
            needed = row.start + size.frames / config.fps
            if needed > info.duration:  # by less than half a frame, or the size would not have been chosen
                return read_video(path, size.frames, size.height, size.width, start=row.start, fit=config.fit).frames
        return read_video(
            path, size.frames, size.height, size.width, fps=config.fps, start=row.start, end=end, fit=config.fit
        ).frames


def content_hash(row: Row) -> str:
    digest = hashlib.sha256()
    with row.opened() as path, path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------- check


@dataclass
class Report:
    """What a look at every row found. `rows` are those with nothing wrong, with their sizes."""

    rows: list[tuple[Row, Size]]
    problems: list[str]
    prompt_tokens: Counter
    caption_tokens: Counter

    def print(self, source: str) -> None:
        for problem in self.problems:
            print(problem)
        sizes = Counter(size for _, size in self.rows)
        for size, count in sorted(sizes.items(), key=lambda item: -item[1]):
            print(f"{count} clips of {size.frames} frames of {size.height}x{size.width}")
        for name, tokens in (("prompts", self.prompt_tokens), ("captions", self.caption_tokens)):
            if tokens:
                lengths = sorted(tokens.elements())
                print(f"{name}: {lengths[0]} to {lengths[-1]} tokens, half of them up to {lengths[len(lengths) // 2]}")
        total = len(self.rows) + len(self.problems)
        print(f"{source}: {len(self.rows)} of {total} rows are right, {len(self.problems)} are not.")


def check(config: DataConfig, tokenizer: Any, needs: tuple[str, ...] = ("prompt", "caption"), decode: bool = True):
    """Look at every row: its file, its texts, its length and size, and with `decode` every picture it will give.

    Returns a `Report`; what is wrong with a row is one line that begins with where it is.
    """
    for size in config.sizes:
        if len(size) != 3 or size[0] < 1 or size[0] % 4 != 1:
            raise ValueError(f"data.sizes holds (frames, height, width) with 4k + 1 frames, not {list(size)}.")
    rows, problems = read_rows(config)
    limits = {"prompt": config.prompt_tokens, "caption": config.caption_tokens}
    found: dict[str, list[str]] = {row.where: [] for row in rows}
    lengths = {}
    for name in needs:
        texts = [getattr(row, name) for row in rows]
        counts = [len(ids) for ids in tokenizer(texts)["input_ids"]] if texts else []
        low, high = limits[name]
        for row, text, count in zip(rows, texts, counts, strict=True):
            if not text:
                found[row.where].append(f"no {name}")
            elif count > high:
                found[row.where].append(f"the {name} is too long: {count} tokens, over {high}")
            elif count < low:
                found[row.where].append(f"the {name} is too short: {count} tokens, under {low}")
        lengths[name] = Counter(count for text, count in zip(texts, counts, strict=True) if text)

    def look(row: Row) -> Size | str:
        try:
            with row.opened() as path:
                if not path.is_file():
                    return f"the file {path} is missing"
                size = choose_size(probe(path), config, row.start, row.end)
            if decode:  # small: what is asked is whether the pictures are there
                read_clip(row, Size(size.frames, 16, 16), config)
            return size
        except ValueError as error:
            return str(error).rstrip(".")

    right = []
    with ThreadPoolExecutor() as pool:
        for row, size in zip(rows, pool.map(look, rows), strict=True):
            if isinstance(size, str):
                found[row.where].insert(0, size)
            elif not found[row.where]:
                right.append((row, size))
    problems += [f"{where}: {'; '.join(wrong)}" for where, wrong in found.items() if wrong]
    return Report(right, problems, lengths.get("prompt", Counter()), lengths.get("caption", Counter()))
