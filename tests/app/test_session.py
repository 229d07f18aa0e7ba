import threading
import zipfile
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from quick import embedded_at

from diffusers_fvg import load_embedded
from diffusers_fvg.app.limits import Limits
from diffusers_fvg.app.orders import Order, moments_text, read_moments
from diffusers_fvg.app.outputs import video_file
from diffusers_fvg.app.pictures import Upload
from diffusers_fvg.app.previews import SHARE, Previews
from diffusers_fvg.app.session import Session
from diffusers_fvg.app.worker import QueueFull, Worker
from diffusers_fvg.media import read_video, read_video_metadata
from diffusers_fvg.pipelines.seeds import anchor_seed
from diffusers_fvg.schedules.flow import noise_levels


BRIEF = {"num_inference_steps": 2, "num_frames": 5}
PROMPT = "A red circle moves to the right"
CAPTION = "A red circle on the left on a plain background"


@pytest.fixture(scope="module")
def pipe(quick_folder):
    with embedded_at(quick_folder):
        return load_embedded()


@pytest.fixture
def worker(pipe):
    worker = Worker(pipe, Limits(queue=3, waiting=3, kept=2))
    yield worker
    worker.close()


@pytest.fixture
def session(worker):
    return Session(worker, "ann", PROMPT, settings=dict(BRIEF), seed=3, anchor_seed=5, num_candidates=2)


def ended(session, job):
    assert job.ended.wait(120)
    session.take(job)
    return job


@pytest.fixture
def held(worker, monkeypatch):
    """The worker's first job waits in stage 3's first step until the event is set."""
    go, there, run = threading.Event(), threading.Event(), Order.run

    def held_run(order, pipe, report, *others):
        def slow(*place):
            there.set()
            assert go.wait(60)
            report(*place)

        return run(order, pipe, slow, *others)

    monkeypatch.setattr(Order, "run", held_run)
    yield go, there
    go.set()


def test_stages_follow_each_other_and_each_is_done_again(session, pipe):
    assert ended(session, session.rewrite()).state == "done"
    assert "red circle" in session.caption and "moves" not in session.caption
    session.caption = CAPTION
    with pytest.raises(ValueError, match="no picture to animate"):
        session.animate()
    ended(session, session.compose())
    assert len(session.pictures) == 2 and session.pictures[0].seed == 5
    session.chosen = 1
    first = ended(session, session.animate())
    video, kept = read_video(first.result.video)[0], session.pictures[1]
    # What the pipeline itself makes of the same caption and seeds.
    with anchor_seed(kept.seed):
        out = pipe(
            PROMPT,
            first_frame_prompt=CAPTION,
            composer_num_candidates=1,
            **BRIEF,
            generator=torch.Generator().manual_seed(3),
        )
    assert np.array_equal(np.asarray(out.anchor_images[0]), np.asarray(kept.image))
    record = read_video_metadata(first.result.video)
    assert record == first.result.record == out.records[0]
    # In the same order, so that files are the same bytes.
    assert list(record) == list(out.records[0])
    assert np.abs(video[:, ::6, ::6][:, :64] / 255 - out.frames[0]).mean() < 0.02
    with zipfile.ZipFile(video_file(first, "frames")) as archive:
        frames = [np.asarray(PIL.Image.open(archive.open(name))) for name in archive.namelist()]
    assert np.array_equal(frames, np.round(out.frames[0] * 255).astype(np.uint8))
    with PIL.Image.open(video_file(first, "gif")) as gif, PIL.Image.open(video_file(first, "webp")) as webp:
        assert gif.n_frames == webp.n_frames == 5 and gif.size == webp.size == (384, 384)
    assert PIL.Image.open(video_file(first, "strip")).width > 1000
    # A changed caption asks for its picture; another seed makes another video of the same picture.
    session.caption = CAPTION.replace("red", "blue")
    with pytest.raises(ValueError, match="caption was changed"):
        session.animate()
    session.caption, session.seed = CAPTION, 4
    again = ended(session, session.animate())
    assert again.result.record["seeds"] == {"video": 4, "anchor": kept.seed}
    assert [job.id for job in session.worker.history("ann")][:2] == [again.id, first.id]
    # The recipe comes back from the file.
    other = Session(session.worker, "bob")
    assert "stage 2" in other.take_recipe(again.result.video)
    ended(other, other.compose())
    made = ended(other, other.animate())
    assert made.result.record == again.result.record
    assert np.array_equal(read_video(made.result.video)[0], read_video(again.result.video)[0])


def test_a_job_is_cancelled_within_a_run_and_the_next_one_runs(session, worker, held):
    go, there = held
    session.mode = "direct"
    job, waiting = session.animate(), session.animate()
    assert there.wait(60) and job.state == "running" and worker.position(waiting) == 1
    worker.cancel("ann", waiting.id)
    assert waiting.state == "cancelled"
    worker.cancel("ann", job.id)
    go.set()
    assert job.ended.wait(60) and job.state == "cancelled" and job.result is None
    assert not (worker.folder / job.id).exists()
    done = ended(session, session.animate())
    assert done.state == "done" and done.result.video.is_file() and done.result.record["mode"] == "direct"


def test_a_run_that_fails_because_it_was_cancelled_is_cancelled(session, worker, monkeypatch):
    def interrupted_run(*_):
        worker.cancel("ann", worker._running.id)
        return [][0]

    monkeypatch.setattr(Order, "run", interrupted_run)
    job = session.rewrite()
    assert job.ended.wait(60) and job.state == "cancelled" and job.error is None


def test_a_job_is_cancelled_between_two_blocks_of_a_step(session, worker):
    go, there, later = threading.Event(), threading.Event(), []
    session.mode = "direct"
    whole = ended(session, session.animate())
    first, second = worker.pipe.transformer.blocks[:2]

    def wait(*_):
        there.set()
        assert go.wait(60)

    handles = [first.register_forward_hook(wait), second.register_forward_hook(lambda *_: later.append(1))]
    try:
        job = session.animate()
        assert there.wait(60)
        worker.cancel("ann", job.id)
        go.set()
        assert job.ended.wait(60) and job.state == "cancelled"
        # Neither the second block nor the step came to its end.
        assert later == [] and job.stage == "encode"
    finally:
        for handle in handles:
            handle.remove()
    # The run that was left in the middle leaves nothing behind.
    again = ended(session, session.animate())
    assert np.array_equal(read_video(again.result.video)[0], read_video(whole.result.video)[0])
    worker.close()
    assert not any(block._forward_pre_hooks for block in worker.pipe.transformer.blocks)


def test_previews_are_of_the_clean_video_and_take_a_bounded_share(pipe, monkeypatch):
    now, seen, taken = [0.0], [], []
    monkeypatch.setattr("diffusers_fvg.app.previews.time", SimpleNamespace(monotonic=lambda: now[0]))
    previews, steps, cost = Previews(pipe), 50, 0.1

    def show(latents):
        now[0] += cost
        seen.append(latents)
        return np.zeros((5, 32, 32, 3), np.uint8)

    previews.show = show
    call = {"prompt": PROMPT, "mode": "direct", "num_inference_steps": steps}
    on_step_end = previews.callback(pipe, call, lambda content: taken.append((now[0], content)))
    sigmas = noise_levels(pipe.presets["anchored-15"].make_scheduler(steps, "cpu"))
    clean, noise = torch.randn(2, 1, 16, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        now[0] += 1.0
        latents = (1 - sigmas[step + 1]) * clean + sigmas[step + 1] * noise
        assert on_step_end(pipe, step, None, {"latents": latents}) == {}
    assert len(taken) > 8 and all(content[8:12] == b"WEBP" for _, content in taken)
    for latents in seen:
        assert torch.allclose(latents, clean, atol=1e-3)
    for (before, _), (after, _) in zip(taken, taken[1:]):
        assert cost / (after - before) <= SHARE
    assert Previews(SimpleNamespace()).callback(pipe, call, taken.append) is None


def test_what_is_one_persons_is_not_the_others(session, worker, held):
    go, there = held
    session.mode = "direct"
    mine = session.animate()
    assert there.wait(60)
    other = Session(worker, "bob", "A blue square moves upwards", "direct", settings=BRIEF)
    theirs = other.animate()
    for call in (worker.job, worker.cancel):
        with pytest.raises(KeyError):
            call("bob", mine.id)
    session.animate(), session.animate()
    with pytest.raises(QueueFull, match="unfinished jobs, the most at a time"):
        session.animate()
    with pytest.raises(QueueFull, match="on this server"):
        other.animate()
    go.set()
    ended(session, mine), ended(other, theirs)
    assert theirs.result.record["prompt"] == other.prompt and mine.result.record["prompt"] == PROMPT
    assert [job.id for job in worker.history("bob")] == [theirs.id]


def test_old_jobs_are_forgotten_with_their_files(session, worker):
    session.mode = "direct"
    jobs = [ended(session, session.animate()) for _ in range(4)]
    assert [job.id for job in worker.history("ann")] == [job.id for job in jobs[:0:-1]]
    assert not jobs[0].result.video.exists() and jobs[3].result.video.exists()


def test_progress_tells_the_stages_and_the_time_left(session, worker, monkeypatch):
    seen, previews, run = [], set(), Order.run

    def told_run(order, pipe, report, *others):
        def tell(*place):
            report(*place)
            job = worker._running
            seen.append((job.stage, job.step, job.steps, job.seconds_left))
            previews.add(job.preview)

        return run(order, pipe, tell, *others)

    monkeypatch.setattr(Order, "run", told_run)
    session.settings = {"num_inference_steps": 3, "num_frames": 5}
    for _ in range(2):
        job = ended(session, session.generate())
        assert job.preview is None
    assert any(content and content[8:12] == b"WEBP" for content in previews)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    stages = list(dict.fromkeys(place[0] for place in second))
    assert stages[0] == "rewrite" and stages[-2:] == ["denoise", "decode"]
    assert [place[1:3] for place in second if place[0] == "denoise"] == [(1, 3), (2, 3), (3, 3)]
    # Nothing is known of what never ran; the second time all of it is.
    assert first[0][3] is None and None not in [place[3] for place in second]
    assert second[0][3] > second[-1][3] == 0


def test_pictures_of_ones_own_are_upright_cropped_and_checked(session, tmp_path):
    photo = np.zeros((80, 160, 3), np.uint8)
    photo[:, :80] = (255, 0, 0)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # Shown turned by a quarter clockwise: what is left becomes the top.
    PIL.Image.fromarray(photo).save(tmp_path / "photo.png", exif=exif)
    seen = np.asarray(session.upload(tmp_path / "photo.png"))
    assert seen.shape == (64, 64, 3)
    assert (seen[:28] == (255, 0, 0)).all() and (seen[36:] == 0).all()
    session.upload(tmp_path / "photo.png", 4)
    # The same frame of 5, counted from the end.
    session.upload(tmp_path / "photo.png", -1, 0.5)
    job = ended(session, session.animate())
    anchors = job.result.record["anchors"]
    assert [(each["frame_index"], each["strength"]) for each in anchors] == [(0, 1.0), (-1, 0.5)]
    assert "upload them again" in Session(session.worker, "bob").take_recipe(job.result.video)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"The file 'bad.png' cannot be used") as error:
        session.upload(tmp_path / "bad.png")
    assert str(tmp_path) not in str(error.value) and "Errno" not in str(error.value)


def test_a_storyboard_is_edited_as_lines(session):
    session.prompt, session.mode, session.num_candidates = (
        "A red circle gradually turns into a square",
        "storyboard",
        1,
    )
    ended(session, session.rewrite())
    text = moments_text(session.moments)
    assert text.startswith("0% ") and "\n100% " in text and read_moments(text) == session.moments
    session.moments = read_moments(text.replace("red square", "blue square"))
    ended(session, session.compose())
    job = ended(session, session.animate())
    assert "blue square" in job.result.record["storyboard"][1]["caption"] and len(job.result.anchors) == 2
    with pytest.raises(ValueError, match="must begin with a time"):
        read_moments("A red circle")


@pytest.mark.parametrize(
    "order, told",
    [
        (Order("paint", PROMPT), "`stage='paint'`"),
        (Order("generate", PROMPT, "quick"), "`mode='quick'`"),
        (Order("generate", " "), "`prompt` is empty"),
        (Order("generate", PROMPT, num_frames=16), "nearest: 13 and 17"),
        (Order("generate", PROMPT, num_frames=101), "must be at most 65 on this server"),
        (Order("generate", PROMPT, height=160, width=160), "are 25600"),
        (Order("generate", PROMPT, num_inference_steps=101), "must be at most 100 on this server"),
        (Order("generate", PROMPT, preset="none"), "Unknown preset"),
        (Order("generate", PROMPT, seed=-1), r"`seed=-1` must be a whole number from 0 to 2\*\*63 - 1"),
        (Order("generate", PROMPT, anchor_seed=2**63), "`anchor_seed=9223372036854775808` must"),
        (Order("compose", PROMPT), "`first_frame_prompt` is missing"),
        (Order("rewrite", PROMPT, "direct"), "skips stage `rewrite`"),
        (Order("compose", PROMPT, first_frame_prompt=CAPTION, num_candidates=9), "from 1 to 8"),
        (Order("animate", PROMPT, num_candidates=2), "`num_candidates=2`: stage `animate` does not choose"),
        (Order("generate", PROMPT, "direct", num_candidates=2), "no picture is drawn with `mode='direct'`"),
        (Order("generate", PROMPT, anchors=[Upload(None)], num_candidates=2), "no picture is drawn with `anchors`"),
        (Order("generate", PROMPT, anchors=[Upload(None, 17)]), "lies outside the video of 17 frames"),
    ],
)
def test_what_cannot_be_is_refused_before_it_waits(worker, order, told):
    with pytest.raises(ValueError, match=told):
        worker.submit("ann", order)
    assert worker.history("ann") == []


def test_a_failure_is_a_sentence_and_the_next_job_runs(session, worker, monkeypatch):
    def fail(*_):
        raise KeyError("/home/secret")

    monkeypatch.setattr(type(worker.pipe), "_animate", fail)
    session.mode = "direct"
    job = ended(session, session.animate())
    assert job.state == "failed" and "KeyError" in job.error and "secret" not in job.error
    monkeypatch.undo()
    assert ended(session, session.animate()).state == "done"
    told = session.memory_text()
    assert told.startswith("5 frames, 0.6 s · peak memory ") and told.endswith(" s here")
