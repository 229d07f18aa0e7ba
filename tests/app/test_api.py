import base64
import io
import time

import numpy as np
import PIL.Image
import pytest
from quick import embedded_at

from diffusers_fvg import load_embedded
from diffusers_fvg.app.limits import Limits
from diffusers_fvg.app.worker import Worker
from diffusers_fvg.media import read_video_metadata


pytest.importorskip("fastapi")
from fastapi.testclient import TestClient  # noqa: E402

from diffusers_fvg.app.api import make_api, require_login  # noqa: E402


PROMPT = "A red circle moves to the right"
QUICK = {"prompt": PROMPT, "mode": "direct", "num_inference_steps": 1, "num_frames": 5}


@pytest.fixture(scope="module")
def worker(quick_folder):
    with embedded_at(quick_folder):
        pipe = load_embedded()
    worker = Worker(pipe, Limits(queue=2, waiting=2))
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def client(worker):
    with TestClient(make_api(worker)) as client:
        yield client


def finished(client, job):
    for _ in range(1200):
        told = client.get(f"/api/jobs/{job['id']}").json()
        if told["state"] not in ("waiting", "running"):
            return told
        time.sleep(0.05)
    raise AssertionError(told)


def png(side=64):
    file = io.BytesIO()
    PIL.Image.new("RGB", (side, side), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_a_video_is_asked_for_waited_for_and_fetched(client, tmp_path):
    asked = client.post("/api/jobs", json=QUICK | {"mode": "factorized", "seed": 3, "anchors": [{"image": png()}]})
    assert asked.status_code == 202
    told = finished(client, asked.json())
    assert told["state"] == "done" and told["record"]["seeds"]["video"] == 3
    video = client.get(told["video"])
    assert video.headers["content-type"] == "video/mp4"
    (tmp_path / "video.mp4").write_bytes(video.content)
    assert read_video_metadata(tmp_path / "video.mp4") == told["record"]
    assert client.get("/api/jobs").json()[0]["id"] == told["id"]
    kinds = {"gif": "image/gif", "webp": "image/webp", "frames": "application/zip", "strip": "image/png"}
    for form, kind in kinds.items():
        made = client.get(told["video"], params={"format": form})
        assert made.headers["content-type"] == kind and "attachment" in made.headers["content-disposition"]
        assert len(made.content) > 1000
    for form in ("avi", "", "MP4", "../video", "3"):
        bad = client.get(told["video"], params={"format": form})
        assert bad.status_code == 422 and bad.json()["detail"].startswith("`format` is not valid")
    assert client.get(f"/api/jobs/{told['id']}/preview").status_code == 404 and told["preview"] is None
    written = finished(client, client.post("/api/jobs", json={"prompt": PROMPT, "stage": "rewrite"}).json())
    assert "red circle" in written["first_frame_prompt"] and written["video"] is None
    drawn = {"prompt": PROMPT, "stage": "compose", "first_frame_prompt": "A red circle on the left", "anchor_seed": 1}
    (picture,) = finished(client, client.post("/api/jobs", json=drawn).json())["pictures"]
    image = PIL.Image.open(io.BytesIO(client.get(picture["url"]).content))
    assert picture["seed"] == 1 and image.size == (64, 64) and np.asarray(image).std() > 0
    assert client.get("/api/model").json()["num_frames"] == 17


def test_a_job_is_cancelled_and_a_full_queue_says_so(client):
    jobs = [client.post("/api/jobs", json=QUICK | {"num_inference_steps": 100}) for _ in range(2)]
    full = client.post("/api/jobs", json=QUICK)
    assert full.status_code == 429 and "wait" in full.json()["detail"]
    for job in jobs[::-1]:
        assert client.delete(f"/api/jobs/{job.json()['id']}").status_code == 200
    assert [finished(client, job.json())["state"] for job in jobs] == ["cancelled", "cancelled"]
    assert finished(client, client.post("/api/jobs", json=QUICK).json())["state"] == "done"
    assert client.get(f"/api/jobs/{jobs[0].json()['id']}/video").status_code == 404
    assert client.delete("/api/jobs/none").status_code == 404


def bad_values(schema, document):
    """Five values that the document says are none of a field's."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
    (kind,) = kinds
    if "$ref" in kind:
        kind = document["components"]["schemas"][kind["$ref"].rsplit("/", 1)[1]]
    name = kind["type"]
    if name in ("integer", "number"):
        ends = [kind["minimum"] - 1] if "minimum" in kind else [kind["exclusiveMinimum"]]
        ends += [kind["maximum"] + 1] if "maximum" in kind else [kind["exclusiveMaximum"]]
        return [*ends, "3", True, []]
    if name == "string":
        long = ["x" * (kind["maxLength"] + 1)] if "maxLength" in kind else ["nothing of it"]
        return [*long, 3, True, [], {}]
    if name == "array":
        return [[], "a", 3, {"image": "a"}, [{"unknown": 1}]]
    assert name == "object"
    return [[], "a", 3, True, {"unknown": 1}]


def fields(document, name="JobInput", path=()):
    for field, schema in document["components"]["schemas"][name]["properties"].items():
        yield (*path, field), schema
        kinds = schema.get("anyOf", [schema])
        item = next((kind["items"]["$ref"] for kind in kinds if "$ref" in kind.get("items", {})), None)
        if item:
            yield from fields(document, item.rsplit("/", 1)[1], (*path, field))


def test_five_bad_values_of_every_field_are_told_of_in_a_sentence(client):
    document, tried = client.get("/openapi.json").json(), 0
    assert document["openapi"].startswith("3.1")
    whole = {"anchors": {"image": png()}, "storyboard": {"caption": "A red circle", "time": 0.0}}
    for path, schema in fields(document):
        values = bad_values(schema, document)
        assert len(values) == 5, path
        for value in values:
            body = {"prompt": PROMPT} | (
                {path[0]: value} if len(path) == 1 else {path[0]: [whole[path[0]] | {path[1]: value}]}
            )
            answer = client.post("/api/jobs", json=body)
            assert 400 <= answer.status_code < 500, (path, value, answer.text)
            detail = answer.json()["detail"]
            assert isinstance(detail, str) and detail[0] in "`ATY" and detail[-1] in ".)" and path[-1] in detail, (
                detail
            )
            tried += 1
    assert tried >= 100 and client.get("/api/jobs").status_code == 200


@pytest.mark.parametrize("body", [b"{bad", b"\xff\xfe", b"", b"[]", b"null"])
def test_a_body_that_is_none_is_told_of_in_a_sentence(client, body):
    answer = client.post("/api/jobs", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and answer.json()["detail"].startswith(
        ("The body is not JSON", "`body` is not valid")
    )


def test_bad_places_are_told_of_in_a_sentence(client):
    """Parameters of the paths and queries, by the document: five bad values each."""
    document, tried = client.get("/openapi.json").json(), 0
    video = finished(client, client.post("/api/jobs", json=QUICK).json())["id"]
    bad = {"string": ["none", "..", "%00", "x" * 500, video + "x"], "integer": ["x", "1.5", "-1", "7", "1e9"]}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for parameter in operation.get("parameters", ()):
                # With one bad, the others are good.
                values, good = bad[parameter["schema"]["type"]], {"id": video, "number": "0"}
                assert len(values) == 5
                for value in values:
                    place = path.format(**(good | {parameter["name"]: value}))
                    query = {parameter["name"]: value} if parameter["in"] == "query" else None
                    answer = client.request(method, place, params=query)
                    assert 400 <= answer.status_code < 500, (method, place, answer.text)
                    assert isinstance(answer.json()["detail"], str)
                    tried += 1
    assert tried >= 30


def test_the_document_is_valid(client):
    validator = pytest.importorskip("openapi_spec_validator")
    document = client.get("/openapi.json").json()
    validator.validate(document)
    del document["paths"]["/api/jobs"]["post"]["responses"]["202"]["description"]
    with pytest.raises(Exception, match="description"):
        validator.validate(document)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"anchors": [{"image": base64.b64encode(b"none").decode()}]}, "cannot be used"),
        ({"prompt": "A red circle\x07"}, "control character"),
        ({"num_frames": 16}, "nearest: 13 and 17"),
        ({"height": 512, "width": 512}, "this server allows at most"),
        ({"mode": "direct", "first_frame_prompt": "A red circle"}, "leave one of them out"),
    ],
)
def test_what_the_model_cannot_do_is_a_sentence(client, change, told):
    answer = client.post("/api/jobs", json={"prompt": PROMPT} | change)
    assert 400 <= answer.status_code < 500 and told in answer.json()["detail"], answer.text


def test_a_login_is_asked_for_everywhere(worker):
    api = make_api(worker)
    require_login(api, ("ann", "sécret"))
    with TestClient(api) as client:
        for path in ("/api/model", "/openapi.json", "/docs"):
            assert client.get(path).status_code == 401
            assert client.get(path, auth=("ann", "secret")).status_code == 401
            assert client.get(path, headers={"Authorization": "Basic %"}).status_code == 401
            good = base64.b64encode("ann:sécret".encode()).decode()
            assert client.get(path, headers={"Authorization": f"Basic {good}"}).status_code == 200
