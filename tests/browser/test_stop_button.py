"""Stop and Draw of one page in every order, without a browser: what is asked to stop is not drawn on."""

from contextlib import suppress
from types import SimpleNamespace

import pytest

from hdm_lightning.errors import UserError

PAGE, OTHER = SimpleNamespace(session_hash="page"), SimpleNamespace(session_hash="other")


class Steps:
    """Draws nothing, in three steps; what is in `between` happens after the first one."""

    def __init__(self):
        self.between, self.steps = [], 0

    def draw(self, wanted, warn, progress):
        for step in range(3):
            progress("images", step, 3)
            self.steps += 1
            for each in self.between[:]:
                each()
            self.between.clear()
        yield ()


@pytest.fixture
def tab(tmp_path, monkeypatch):
    from hdm_lightning.app.draw_tab import DrawTab  # needs gradio

    monkeypatch.setattr(DrawTab, "_wanted", lambda self, form: None)
    monkeypatch.setattr(DrawTab, "_shown", lambda self, drawn, notes: {})
    return DrawTab(Steps(), tmp_path)


def drawn(tab, page=PAGE):
    """How many steps a call takes before it ends or is stopped."""
    before = tab.studio.steps
    with suppress(UserError):
        list(tab.draw({}, page, lambda *_, **__: None))
    return tab.studio.steps - before


def test_draw_clicked_after_stop_does_not_call_the_stop_off(tab):
    tab.begin(PAGE)
    tab.studio.between = [lambda: tab.ask_to_stop(PAGE), lambda: tab.begin(PAGE)]
    assert drawn(tab) == 1
    tab.begin(PAGE)  # that click drew nothing, as the page was drawing; the next one does
    assert drawn(tab) == 3


def test_a_stop_in_the_queue_stays_one_and_is_of_its_own_page(tab):
    for page in (PAGE, OTHER):
        tab.begin(page)
    tab.ask_to_stop(PAGE)
    tab.begin(PAGE)
    assert (drawn(tab), drawn(tab, OTHER)) == (0, 3)
    tab.begin(PAGE)
    assert drawn(tab) == 3
