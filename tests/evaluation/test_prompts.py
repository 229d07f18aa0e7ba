import csv
import json

import pytest

from diffusers_fvg.evaluation.plan import derive_seed
from diffusers_fvg.evaluation.prompts import planned_videos, read_prompts


def written(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_all_formats_say_the_same(tmp_path):
    rows = [
        {"prompt": "A circle, then\na square", "image": "a.png", "seed": 3, "height": 64, "guidance_scale": 2.5},
        {"prompt": "Ünïcode", "mode": "direct", "kind": "b"},
    ]
    (tmp_path / "a.jsonl").write_text(
        "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    with open(tmp_path / "a.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "image", "seed", "height", "guidance_scale", "mode", "kind"])
        writer.writeheader()
        writer.writerows(rows)
    found = [list(read_prompts(tmp_path / name, ["kind"])) for name in ("a.jsonl", "a.csv")]
    first, second = found[0]
    assert first.prompt == rows[0]["prompt"] and first.seed == 3 and second.labels == {"kind": "b"}
    image = (tmp_path / "a.png").as_posix()
    assert first.arguments == {"image": image, "height": 64, "guidance_scale": 2.5} and second.arguments == {
        "mode": "direct"
    }
    without_place = [[vars(row) | {"place": ""} for row in rows] for rows in found]
    assert without_place[0] == without_place[1]
    assert first.place.endswith("a.jsonl, line 1") and second.place.endswith("a.jsonl, line 3")
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.Table.from_pylist(
            rows,
            schema=pyarrow.schema(
                [
                    ("prompt", "string"),
                    ("image", "string"),
                    ("seed", "int64"),
                    ("height", "int32"),
                    ("guidance_scale", "float64"),
                    ("mode", "string"),
                    ("kind", "string"),
                ]
            ),
        ),
        tmp_path / "a.parquet",
    )
    assert [vars(row) | {"place": ""} for row in read_prompts(tmp_path / "a.parquet", ["kind"])] == without_place[0]


def test_a_line_of_text_is_a_prompt_and_videos_have_names_and_seeds_of_their_own(tmp_path):
    path = written(tmp_path / "a.txt", "\ufeffA circle\r\n\n  A square\u2028moves \n")
    rows = list(read_prompts(path))
    assert [row.prompt for row in rows] == ["A circle", "A square\u2028moves"]
    videos = list(planned_videos(rows, 9, 2, {"mode": "direct"}))
    assert [video.path for video in videos] == [
        f"videos/00000{row}-{sample}.mp4" for row in (1, 2) for sample in (0, 1)
    ]
    assert [video.seed for video in videos] == [derive_seed(9, row, sample) for row in (0, 1) for sample in (0, 1)]
    assert videos[0].arguments == {"mode": "direct"} and videos[1].labels == {"prompt": "000001", "sample": "1"}
    path = written(tmp_path / "a.jsonl", '{"prompt": "a", "name": "kite/red", "seed": 5, "mode": "factorized"}')
    (video,) = planned_videos(read_prompts(path), 9, 1, {"mode": "direct"})
    assert (video.path, video.seed, video.arguments) == ("videos/kite/red.mp4", 5, {"mode": "factorized"})


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("a.doc", "a", "must end in one of .txt, .csv"),
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.csv", "prompt,seed\nA red circle, moving, slowly\n", "line 2: there are more fields than columns"),
        ("a.csv", "text\na\n", "line 1: the first line must name the columns"),
        ("a.csv", 'prompt\n"a\n', "line 2: unexpected end of data"),
        ("a.csv", f"prompt\n{'a' * 140_000}\n", "line 2: field larger than field limit"),
        ("a.csv", "prompt,colour\na,red\n", "line 2: unknown column `colour`"),
        ("a.csv", "prompt,seed\na,1\nb,x\n", "line 3: `seed` must be a whole number.*'x'"),
        ("a.csv", "prompt,seed\n,1\n", "line 2: `prompt` is empty"),
        ("a.csv", 'prompt,anchors\na,"[{""frame_index"": 1}]"\n', "line 2: `anchors` must be a list of objects"),
        ("a.jsonl", '{"prompt": "a"}\n["a"]\n', "line 2: the line must be an object"),
        ("a.jsonl", '{"prompt": "a"}\nprompt\n', "line 2: the line is not JSON"),
        ("a.jsonl", '{"prompt": "a", "anchors": ' + "[" * 100_000, "line 1: the line is not JSON"),
        ("a.csv", "prompt,anchors\na," + "[" * 100_000, "line 2: `anchors` must be a list of objects"),
        ("a.jsonl", '{"prompt": 3}\n', "line 1: `prompt` must be a text, but is 3"),
        ("a.jsonl", '{"prompt": "a", "height": 64.5}\n', "line 1: `height` must be a whole number"),
        ("a.jsonl", '{"prompt": "a", "generator": 1}\n', "line 1: unknown column `generator`"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_line(tmp_path, name, text, told):
    path = written(tmp_path / name, text)
    with pytest.raises(ValueError, match=told) as error:
        list(read_prompts(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding_is_told(tmp_path, encoding):
    path = written(tmp_path / "a.csv", "prompt\nRücken\n", encoding)
    with pytest.raises(ValueError, match="is not in UTF-8"):
        list(read_prompts(path))
