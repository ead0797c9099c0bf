"""What several processes have made together, on disk: appended line by line, replaced file by file, always whole.

A process may end at any moment, by any signal, and what it had finished stays. This file knows nothing of what is made.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any


class Ledger:
    """What one phase has finished: a folder with its settings and one append-only part of JSON lines per process.

    A line without a line feed was being written in a crash and counts as never written.
    """

    def __init__(self, folder: Path, index: int, valid: Callable[[dict[str, Any]], bool] = lambda record: True):
        self.folder, self.index, self.valid = folder, index, valid
        self.part = folder / f"part-{index:05d}.jsonl"
        self.partial = folder / f"part-{index:05d}.partial"  # where a file grows until it is whole

    def begin(self, settings: dict[str, Any]) -> None:
        """Store the settings that everything in this folder is made with, or check that they are the same."""
        settings = json.loads(json.dumps(settings))
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / ".lock", wait=True):
            earlier = self.settings()
            if earlier is None:
                with replacing(self.folder / "settings.json", self.partial) as partial:
                    partial.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            elif earlier != settings:
                keys = [key for key in {**earlier, **settings} if earlier.get(key) != settings.get(key)]
                changes = ", ".join(
                    f"{k} ({_short(earlier.get(k))} there, {_short(settings.get(k))} now)" for k in keys
                )
                raise ValueError(
                    f"'{self.folder}' was made with other settings: {changes}; choose another output folder, or move "
                    f"this one away to make it anew."
                )

    def settings(self) -> dict[str, Any] | None:
        path = self.folder / "settings.json"
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        except ValueError:
            raise ValueError(f"'{path}' is damaged: it is not JSON.") from None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Append to this process's part; no other process may do so at the same time."""
        with locked(self.part, wait=False) as self.file:
            self.partial.unlink(missing_ok=True)
            self.file.seek(0)
            written = self.file.read()
            if not written.endswith(b"\n"):
                self.file.truncate(written.rfind(b"\n") + 1)
            yield

    def append(self, record: dict[str, Any]) -> None:
        with writing(self.part):
            line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
            while line:  # an unbuffered file may take less at a time
                line = line[self.file.write(line) :]
            os.fsync(self.file.fileno())

    def read(self) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        """What all processes have made, and what has failed and was not made later, by id."""
        done, failed = {}, {}
        for part in sorted(self.folder.glob("part-*.jsonl")):
            *lines, _ = part.read_bytes().split(b"\n")
            for number, line in enumerate(lines, 1):
                try:
                    record = json.loads(line)
                except ValueError:
                    raise ValueError(
                        f"Line {number} of '{part}' is damaged: remove it to make its item anew."
                    ) from None
                if "reason" not in record:
                    if self.valid(record):
                        done.setdefault(record["id"], record)
                elif record["attempts"] >= failed.get(record["id"], record)["attempts"]:
                    failed[record["id"]] = record
        return done, {key: record for key, record in failed.items() if key not in done}


@contextmanager
def replacing(target: Path, partial: Path) -> Iterator[Path]:
    """Write `partial`, which becomes `target` at one stroke, or vanishes if anything goes wrong."""
    try:
        with writing(target):
            target.parent.mkdir(exist_ok=True)
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[FileIO]:
    """Hold a file open that no other process may hold; the lock ends with the process, however it ends."""
    with writing(path):
        file = path.open("a+b", buffering=0)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ValueError(
                f"Another process is at work on '{path}'; wait for it, or give each its own shard."
            ) from None
        yield file


@contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"'{path}' cannot be written: {error.strerror or error}.") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def shard_of(text: str) -> tuple[int, int]:
    """i/n as (i, n): the i-th of n launches that share a work."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(f"A shard is i/n with i from 0 to n - 1, such as 0/4, not {text!r}.")
    return int(match[1]), int(match[2])
