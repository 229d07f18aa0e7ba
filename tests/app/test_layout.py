"""The controls of the page, without a browser."""

import pytest


pytest.importorskip("gradio")


def test_a_label_that_is_shown_is_one_of_the_page():
    """gradio shows a name of its own where a control has none and is not told to show none."""
    from diffusers_fvg import load_embedded
    from diffusers_fvg.app.page import make_page
    from diffusers_fvg.app.worker import Worker

    worker = Worker(load_embedded())
    try:
        controls = [control["props"] for control in make_page(worker).get_config_file()["components"]]
    finally:
        worker.close()
    labels = [props.get("label") for props in controls if props.get("show_label")]
    assert len(labels) > 10 and all(labels), labels
