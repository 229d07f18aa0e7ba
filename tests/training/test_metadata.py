import json

import pytest
from training_runs import CAPTIONS, tiny_config

from diffusers_fvg.training import metadata
from diffusers_fvg.training.metadata import read_examples


def written(folder, name: str, content: str | bytes):
    """The config of a folder with this table or these files, and a file `0.mp4` beside them."""
    folder.mkdir(exist_ok=True)
    for number in range(3):
        (folder / f"{number}.mp4").write_bytes(b"")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return tiny_config(folder / "model", folder, folder / "out")


def captions(folder, name: str, content: str | bytes) -> list[str]:
    return [example.caption for example in read_examples(written(folder, name, content))]


def test_tables_and_text_files_are_read_alike(tmp_path):
    rows = [json.dumps({"file_name": f"{number}.mp4", "text": text}) for number, text in enumerate(CAPTIONS)]
    from_jsonl = read_examples(written(tmp_path, "metadata.jsonl", "\n".join(rows)))
    assert [(example.path, example.caption) for example in from_jsonl] == [
        (tmp_path / f"{number}.mp4", text) for number, text in enumerate(CAPTIONS)
    ]
    (tmp_path / "metadata.jsonl").unlink()
    rows = [f'{number}.mp4,"{text}"' for number, text in enumerate(CAPTIONS)]
    assert read_examples(written(tmp_path, "metadata.csv", "file_name,text\n" + "\n".join(rows))) == from_jsonl
    (tmp_path / "metadata.csv").unlink()
    for number, text in enumerate(CAPTIONS):
        config = written(tmp_path, f"{number}.txt", f"\ufeff {text}\n")
    assert read_examples(config) == from_jsonl


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("metadata.csv", 'file_name,text\n0.mp4, "a red circle, moving right"\n', "a red circle, moving right"),
        ("metadata.csv", 'file_name,text\r\n0.mp4,"a ""red"" circle"\r\n\r\n', 'a "red" circle'),
        ("metadata.csv", '\ufefffile_name,text\n0.mp4,"two\nlines"\n', "two\nlines"),
        ("metadata.csv", 'text,seed,file_name\na 5" disk\u2028turns,7,0.mp4\n', 'a 5" disk\u2028turns'),
        ("metadata.jsonl", '\ufeff{"file_name": "0.mp4", "text": "a\u2028b\u0085c\u000bd"}\r\n\n', None),
    ],
    ids=["space before a quote", "quotes", "lines and mark", "line separator", "jsonl"],
)
def test_captions_are_read_whole(tmp_path, name, content, expected):
    if expected is None:
        # A tab of the vertical kind is written with a backslash in JSON.
        content, expected = content.replace("\u000b", "\\u000b"), "a\u2028b\u0085c\u000bd"
    assert captions(tmp_path, name, content) == [expected]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "has no rows"),
        ('{"file_name": "0.mp4"', "line 1 is not JSON"),
        (
            '\n{"file_name": "0.mp4", "caption": "a"}',
            r"line 2 has no `text`, or an empty one; its columns are \['caption', 'file_name'\]",
        ),
        ('{"file_name": "0.mp4", "text": "  "}', "line 1` is empty"),
        ('["0.mp4", "a dog"]', "line 1 must be an object, {...}, but is list"),
        ('"0.mp4"', "line 1 must be an object, {...}, but is str"),
        ('{"file_name": 7, "text": "a dog"}', "line 1: `file_name` must be a text in quotes, but is 7"),
        ('{"file_name": "0.mp4", "text": ["a", "b"]}', "line 1: `text` must be a text in quotes"),
        ('{"file_name": "0.mp4", "text": "a", "text": "b"}', "line 1 is not JSON: a key occurs twice"),
        ("{'file_name': '0.mp4'}".encode("utf-16"), "line 1 is no UTF-8"),
        ('\n{"file_name": "0.mp4", "text": "caf\u00e9"}'.encode("latin-1"), r"line 2 is no UTF-8 \(byte 0xe9\)"),
        ('{"file_name": "0.mp4", "text": "caf\ufffd"}', r"line 1 holds U\+FFFD, which stands for lost characters"),
    ],
)
def test_rows_of_jsonl_that_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=f"metadata.jsonl.*{message}" if rows else message):
        captions(tmp_path, "metadata.jsonl", rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            "0.mp4,a red circle, moving right, slowly",
            "line 2 has 4 columns, and the header 2: put a caption with commas",
        ),
        ("0.mp4,,a red circle", "line 2 has 3 columns"),
        ("0.mp4,a dog\n1.mp4", "line 3 has 1 columns"),
        ("0.mp4,", "line 2 has no `text`"),
        ('0.mp4,a dog\n1.mp4,"a red circle\n2.mp4,a star', "line 3: the row that begins there cannot be read"),
        ('0.mp4,"a red circle\n1.mp4,"a blue square"', "line 2: the row that begins there cannot be read"),
        (
            '0.mp4,"a red circle\n1.mp4,a blue square"',
            "line 2: a quote is not closed, so the row extends into that of 1.mp4",
        ),
        ('0.mp4,"a" red circle', "line 2: the row that begins there cannot be read"),
        ("0.mp4," + "a" * 140_000, r"line 2: .*field larger than field limit"),
        ("0.mp4," + "a" * 20_000, "line 2` has 20000 characters"),
        ("0.mp4,caf\u00e9".encode("latin-1"), r"line 2 is no UTF-8 \(byte 0xe9\)"),
        ("0.mp4,a dog".encode("utf-16-le"), r"line 2 holds U\+0000, which UTF-16 is full of"),
    ],
)
def test_rows_of_csv_that_are_refused(tmp_path, rows, message):
    content = b"file_name,text\n" + (rows if isinstance(rows, bytes) else rows.encode())
    with pytest.raises(ValueError, match=f"metadata.csv.*{message}"):
        captions(tmp_path, "metadata.csv", content)


def test_a_column_named_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="line 1 names a column twice"):
        captions(tmp_path, "metadata.csv", "file_name,text,text\n0.mp4,a dog,a cat\n")


def test_folders_that_are_refused(tmp_path):
    config = written(tmp_path / "both", "metadata.csv", "")
    written(tmp_path / "both", "metadata.jsonl", "")
    with pytest.raises(ValueError, match="keep one of them"):
        read_examples(config)
    with pytest.raises(ValueError, match=r"2 of its 3 files lack a text file .*: 1\.mp4, 2\.mp4"):
        captions(tmp_path / "bare", "0.txt", "a dog")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has neither metadata.jsonl nor metadata.csv, nor videos"):
        read_examples(tiny_config(tmp_path, tmp_path / "empty", tmp_path / "out"))


def test_a_data_set_on_the_hub_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(metadata.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="is not a folder; .* `pip install datasets`"):
        read_examples(tiny_config(tmp_path, tmp_path / "nowhere", tmp_path / "out"))
