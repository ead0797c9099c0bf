"""Every kind of source, the sizes of clips, and all that can be wrong with rows, told at once."""

from __future__ import annotations

import csv
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clips import make_clips, write_manifest
from tiny import tiny_tokenizer

from training.data import DataConfig, Size, check, choose_size, read_clip, read_rows
from univigu.video import VideoInfo, read_video


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return folder, make_clips(folder)


def config(source, **settings) -> DataConfig:
    return DataConfig(
        **{
            "source": str(source),
            "sizes": [(9, 32, 32), (5, 32, 32)],
            "fps": 8.0,
            "prompt_tokens": (0, 8),
            "caption_tokens": (4, 16),
            **settings,
        }
    )


def texts(rows) -> list[tuple[str, str]]:
    return [(row.prompt, row.caption) for row in rows]


def sources(folder, rows, tmp_path):
    """The same clips as every kind of source."""
    jsonl = write_manifest(folder / "clips.jsonl", rows)
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    (folder / "clips.csv").write_text(table.getvalue(), encoding="utf-8-sig")
    beside = tmp_path / "beside"
    beside.mkdir()
    for row in rows:
        (beside / row["video"]).write_bytes((folder / row["video"]).read_bytes())
        (beside / row["video"]).with_suffix(".txt").write_text(row["caption"] + "\n")
        (beside / row["video"]).with_suffix(".prompt.txt").write_text(row["prompt"])
    (beside / "0.json").write_text(json.dumps({"prompt": rows[0]["prompt"], "caption": rows[0]["caption"]}))
    for number in range(2):
        with tarfile.open(tmp_path / f"shard-{number}.tar", "w") as archive:
            for row in rows[3 * number : 3 * number + 3]:
                archive.add(folder / row["video"], f"data/{row['video']}")
                about = json.dumps({"prompt": row["prompt"], "caption": row["caption"]}).encode()
                member = tarfile.TarInfo(f"data/{row['video'].replace('mp4', 'json')}")
                member.size = len(about)
                archive.addfile(member, io.BytesIO(about))
    return [jsonl, folder / "clips.csv", beside, tmp_path / "shard-*.tar"]


def test_every_kind_of_source_gives_the_same_rows(clips, tmp_path):
    folder, rows = clips
    expected = [(row["prompt"], row["caption"]) for row in rows]
    pictures = [read_video(folder / row["video"], 9, 32, 32, fps=8).frames for row in rows[:2]]
    for source in sources(folder, rows, tmp_path):
        found, problems = read_rows(config(source))
        assert texts(found) == expected and problems == []
        assert len({row.place for row in found}) == len(rows)
        for row, frames in zip(found, pictures, strict=False):
            assert (read_clip(row, Size(9, 32, 32), config(source)) == frames).all()
        report = check(config(source), tiny_tokenizer())
        assert report.problems == [] and [size for _, size in report.rows] == [Size(9, 32, 32)] * 6


def test_parquet(clips):
    folder, rows = clips
    pq.write_table(pa.Table.from_pylist(rows), folder / "clips.parquet")
    found, problems = read_rows(config(folder / "clips.parquet"))
    assert texts(found) == [(row["prompt"], row["caption"]) for row in rows] and problems == []
    (folder / "broken.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match="is not a Parquet file"):
        read_rows(config(folder / "broken.parquet"))


def test_all_that_is_wrong_is_told_at_once_with_its_row(clips, tmp_path, capsys):
    folder, rows = clips
    short = make_clips(tmp_path, 1, frames=3)[0]["video"]
    small = make_clips(tmp_path / "small", 1, height=16, width=16)[0]["video"]
    whole = (folder / rows[0]["video"]).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "text.mp4").write_bytes(b"no video at all")
    (tmp_path / "good.mp4").write_bytes(whole)
    good = {"video": "good.mp4", "prompt": "a red box", "caption": "a red box moves left ."}
    lines = [
        good,
        {**good, "video": "nowhere.mp4"},
        {**good, "video": "cut.mp4"},
        {**good, "video": "text.mp4"},
        {**good, "video": short},
        {**good, "video": f"small/{small}"},
        {**good, "prompt": " "},
        {**good, "caption": "", "prompt": "a " * 9},
        {**good, "caption": "a " * 30},
        {**good, "caption": "a box"},
        {"clip": "good.mp4"},
        {**good, "prompt": 3},
        {**good, "start": "soon"},
    ]
    manifest = write_manifest(tmp_path / "bad.jsonl", lines)
    manifest.write_text(manifest.read_text() + "{half a line\n")
    report = check(config(manifest), tiny_tokenizer())
    assert [row.where for row, _ in report.rows] == ["line 1"]
    expected = {
        "line 2": "nowhere.mp4 is missing",
        "line 3": "cut short",
        "line 4": "cannot be read as a video",
        "line 5": "too few frames: 3 at 8 per second, and the shortest of data.sizes needs 5",
        "line 6": "too small: 16x16, and the smallest of data.sizes is 32x32",
        "line 7": "no prompt",
        "line 8": "the prompt is too long: 10 tokens, over 8; no caption",
        "line 9": "the caption is too long: 31 tokens, over 16",
        "line 10": "the caption is too short: 3 tokens, under 4",
        "line 11": "no 'video'; it has clip",
        "line 12": "'prompt' is 3, which is no text",
        "line 13": "'start' must be a second of the clip, not 'soon'",
        "line 14": "not a JSON object",
    }
    told = dict(problem.split(": ", 1) for problem in report.problems)
    assert told.keys() == expected.keys()
    for where, text in expected.items():
        assert text in told[where]
    report.print("bad.jsonl")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(expected) + 4 and printed[-1] == "bad.jsonl: 1 of 14 rows are right, 13 are not."


def test_recall_needs_no_caption(clips, tmp_path):
    folder, rows = clips
    manifest = write_manifest(folder / "prompts.jsonl", [{"video": r["video"], "prompt": r["prompt"]} for r in rows])
    assert check(config(manifest), tiny_tokenizer(), needs=("prompt",)).problems == []
    assert len(check(config(manifest), tiny_tokenizer()).problems) == len(rows)


def test_a_clip_gets_the_longest_size_it_fills_and_of_those_the_nearest_shape():
    sizes = [(81, 480, 832), (81, 832, 480), (33, 480, 832), (81, 240, 416), (33, 624, 624)]
    settings = DataConfig(sizes=sizes, fps=16.0)

    def chosen(seconds, height, width, fps=24.0, **changes):
        info = VideoInfo(seconds, fps, width, height, round(seconds * fps), 0)
        return choose_size(info, DataConfig(**{**vars(settings), **changes}))

    assert chosen(6, 1080, 1920) == Size(81, 480, 832)
    assert chosen(6, 1920, 1080) == Size(81, 832, 480)
    assert chosen(5.04, 480, 832) == Size(81, 480, 832)  # 80.6 frames: a rounded duration
    assert chosen(3, 480, 832) == Size(33, 480, 832)
    assert chosen(3, 700, 720) == Size(33, 624, 624)
    assert chosen(6, 300, 500) == Size(81, 240, 416)
    with pytest.raises(ValueError, match="too few frames: 16 at 16 per second"):
        chosen(1, 480, 832)
    with pytest.raises(ValueError, match=r"too small: 100x100.*data.enlarge=true"):
        chosen(6, 100, 100)
    assert chosen(6, 100, 180, enlarge=True) == Size(81, 480, 832)
    assert chosen(2.1, 480, 832, fps=60.0) == Size(33, 480, 832)


def test_without_a_rate_all_frames_count():
    info = VideoInfo(1.4, 60.0, 832, 480, 84, 0)
    assert choose_size(info, DataConfig(fps=None)) == Size(81, 480, 832)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "data.source is empty"),
        ("nowhere", "There is no 'nowhere'; data.source takes a .jsonl"),
        ("no-*.tar", "No shard fits 'no-\\*.tar'"),
        ("hub:someone/something", "Hub datasets need the package datasets|cannot be read"),
    ],
)
def test_a_source_that_is_none_is_one_sentence(source, message):
    with pytest.raises(ValueError, match=message) as error:
        read_rows(DataConfig(source=source))
    assert "\n" not in str(error.value)


def test_empty_folders_manifests_and_broken_shards_are_told(tmp_path):
    with pytest.raises(ValueError, match="holds no clips"):
        read_rows(DataConfig(source=str(tmp_path)))
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no clips"):
        read_rows(DataConfig(source=str(tmp_path / "none.jsonl")))
    (tmp_path / "s.tar").write_bytes(b"no archive")
    assert "not a whole tar file" in read_rows(DataConfig(source=str(tmp_path / "s.tar")))[1][0]
    make_clips(tmp_path / "alone", 1)
    assert "no .txt or .json beside it" in read_rows(DataConfig(source=str(tmp_path / "alone")))[1][0]
    with pytest.raises(ValueError, match="4k \\+ 1 frames"):
        check(config(tmp_path / "alone", sizes=[(8, 32, 32)]), tiny_tokenizer())
