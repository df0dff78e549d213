"""Pattern files: MInference's published form in, ours out, and one line for whatever is wrong."""

import json
import os

import pytest

from retrieval_attn.attention.pattern_files import ABSENT, check_savable, load_patterns, save_patterns
from retrieval_attn.kernels import HeadPattern

# As in the published files: scores are ints or floats, all on one line, heads in any order.
PUBLISHED = (
    '[{"1": ["vertical_and_slash", 30, 800, 24857.0], "0": ["vertical_and_slash", 1000, 6096, 336], '
    '"2": ["stream_llm", 128, 3968, 0.25]}, {"3": ["block_sparse", 100, 0, -1]}, {}]'
)

DEFAULT = HeadPattern("vertical_slash", 1000, 6096)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "patterns.json"


def test_a_published_file(path):
    path.write_text(PUBLISHED)
    assert load_patterns(path, 3, 4) == [
        [DEFAULT, HeadPattern("vertical_slash", 30, 800), HeadPattern("a_shape", 128, 3968), DEFAULT],
        [DEFAULT, DEFAULT, DEFAULT, HeadPattern("block_sparse", 100, 0)],
        [DEFAULT] * 4,
    ]
    assert ABSENT == DEFAULT


def test_what_is_saved_is_loaded_and_has_the_published_form(path):
    patterns = [
        [HeadPattern("a_shape", 1024, 4096), HeadPattern("vertical_slash", 500, 700)],
        [HeadPattern("block_sparse", 80), HeadPattern("dense")],
    ]
    save_patterns(str(path), patterns, [[0.98765432109, 1], [-0.5, 0.0]])
    assert load_patterns(str(path), 2, 2) == patterns
    assert json.loads(path.read_text()) == [
        {"0": ["stream_llm", 1024, 4096, 0.987654], "1": ["vertical_and_slash", 500, 700, 1]},
        {"0": ["block_sparse", 80, 0, -0.5], "1": ["dense", 0, 0, 0.0]},
    ]
    assert len(path.read_text().splitlines()) == 2 + len(patterns)


def head(entry):
    return json.dumps([{"0": ["stream_llm", 1, 2, 3]}, {"1": entry}])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not a pattern file, because it is not JSON"),
        ("[{]", "is not a pattern file, because it is not JSON"),
        ("[" * 100_000, "is not a pattern file, because it is not JSON"),
        ('{"0": 1}', "must hold a list over layers, got {'0': 1}"),
        ("[{}]", "has 1 layers, the model 2: it is for another model"),
        ("[{}, {}, {}]", "has 3 layers, the model 2: it is for another model"),
        ("[{}, []]", r"layer 1: must map head numbers to \[type, vertical, slash, score\], got \[\]"),
        ('[{"4": ["dense", 0, 0, 1]}, {}]', "layer 0, head 4: the model has 4 heads: it is for another model"),
        ('[{"-1": ["dense", 0, 0, 1]}, {}]', "layer 0: heads must be numbered from 0, got '-1'"),
        ('[{"01": ["dense", 0, 0, 1]}, {}]', "layer 0: heads must be numbered from 0, got '01'"),
        ('[{"a": ["dense", 0, 0, 1]}, {}]', "layer 0: heads must be numbered from 0, got 'a'"),
        ('[{"%s": ["dense", 0, 0, 1]}, {}]' % ("9" * 5000), "layer 0: heads must be numbered from 0"),
        (head({}), r"layer 1, head 1: must be \[type, vertical, slash, score\], got {}"),
        (head(["stream_llm", 1, 2]), r"layer 1, head 1: must be \[type, vertical, slash, score\], got \['str"),
        (head(["flash", 1, 2, 3]), "layer 1, head 1: type must be one of vertical_and_slash, .*, dense, got 'flash'"),
        (head([["x"], 1, 2, 3]), r"layer 1, head 1: type must be one of .* got \['x'\]"),
        (head(["stream_llm", -1, 2, 3]), "layer 1, head 1: sizes must be integers from 0 to 2147483647, got -1"),
        (head(["stream_llm", 1, 2.0, 3]), "layer 1, head 1: sizes must be integers .* got 2.0"),
        (head(["stream_llm", True, 2, 3]), "layer 1, head 1: sizes must be integers .* got True"),
        (head(["stream_llm", 1 << 31, 2, 3]), "layer 1, head 1: sizes must be integers .* got 2147483648"),
        (head(["stream_llm", 1, 2, float("nan")]), "layer 1, head 1: score must be a number, got nan"),
        (head(["stream_llm", 1, 2, "3"]), "layer 1, head 1: score must be a number, got '3'"),
        (head(["stream_llm", 1, 2, None]), "layer 1, head 1: score must be a number, got None"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(path, text, reason):
    path.write_text(text)
    with pytest.raises(ValueError, match=reason) as raised:
        load_patterns(path, 2, 4)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read(path):
    with pytest.raises(FileNotFoundError, match=f"there is no pattern file {path}"):
        load_patterns(path, 2, 4)
    path.write_bytes(b"\xff\xfe[]")
    with pytest.raises(ValueError, match="is not JSON"):
        load_patterns(path, 2, 4)
    with pytest.raises(IsADirectoryError):
        load_patterns(path.parent, 2, 4)


@pytest.mark.parametrize(
    ("pattern", "score", "reason"),
    [
        (HeadPattern("flash"), 1.0, "kind must be one of"),
        (HeadPattern("a_shape", -1), 1.0, "sizes must be at least 0"),
        (HeadPattern("a_shape", 1, 2), float("nan"), "not JSON compliant"),
    ],
)
def test_an_old_file_survives_patterns_that_are_none(path, pattern, score, reason):
    path.write_text(PUBLISHED)
    with pytest.raises(ValueError, match=reason):
        save_patterns(path, [[pattern]], [[score]])
    assert path.read_text() == PUBLISHED
    assert os.listdir(path.parent) == [path.name]


def test_an_old_file_survives_an_interruption(path, monkeypatch):
    path.write_text(PUBLISHED)

    def interrupt(*files):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_patterns(path, [[ABSENT]], [[1.0]])
    assert path.read_text() == PUBLISHED
    assert os.listdir(path.parent) == [path.name]


def test_a_link_stays_a_link(path, tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(path)
    save_patterns(link, [[ABSENT]], [[1.0]])
    assert link.is_symlink()
    assert load_patterns(path, 1, 1) == [[ABSENT]]


def test_where_nothing_can_be_saved_is_known_before(path, tmp_path, monkeypatch):
    check_savable(path)
    assert not path.exists()
    (tmp_path / "folder.json").mkdir()
    for bad, reason in (
        (tmp_path / "folder.json", "must be a file, got the folder or device"),
        (tmp_path / "none" / "a.json", "must lie in a folder that exists"),
        (tmp_path / "a.txt", "must end in .json"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_savable(bad)
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)
    with pytest.raises(ValueError, match="must be writable"):
        check_savable(path)
