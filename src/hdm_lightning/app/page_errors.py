"""What goes wrong behind the page, as messages on it: never a stack trace, and never as HTML of somebody else's."""

import html
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import gradio as gr

from hdm_lightning.errors import UserError

LOG = logging.getLogger("hdm-app")
MESSAGE_S = 30.0


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, a generator's too, with its errors as gradio's, whose texts are shown as text.

    What is not a `UserError` is a defect: the page says so without details, the terminal has them.
    """
    if inspect.isgeneratorfunction(function):

        @wraps(function)
        def through(*arguments: Any) -> Iterator[Any]:
            with _as_messages():
                yield from function(*arguments)

        return through

    @wraps(function)
    def once(*arguments: Any) -> Any:
        with _as_messages():
            return function(*arguments)

    return once


@contextmanager
def _as_messages() -> Iterator[None]:
    try:
        yield
    except (gr.Error, GeneratorExit):
        raise
    except UserError as error:
        raise message(str(error)) from None
    except Exception as error:
        LOG.exception("unexpected")
        raise message(f"this went wrong unexpectedly ({type(error).__name__}); the terminal says more") from None


def message(text: str) -> gr.Error:
    """An error with a text of any origin; gradio itself would take it for HTML."""
    shown = html.escape(text).replace("\n", "<br>")
    return gr.Error(shown, duration=MESSAGE_S, print_exception=False)
