"""Files that are whole or absent."""

from __future__ import annotations

import os

import pytest

from lace_lightning.whole_file import whole_file, write_text


def test_a_file_has_its_old_text_until_the_new_one_is_whole_and_on_the_disk(tmp_path, monkeypatch):
    path, order = tmp_path / "a.json", []
    write_text(path, "old")
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (order.append(("sync", path.read_text())), sync(number)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append(("replace", path.read_text())), replace(*paths)))
    write_text(path, "new\r\n")
    assert order == [("sync", "old"), ("replace", "old")]
    assert path.read_bytes() == b"new\r\n" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.json"
    write_text(path, "old")
    with pytest.raises(type(error)), whole_file(path) as unfinished:
        unfinished.write_text("ne")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
