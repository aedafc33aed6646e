"""Show errors as messages on the page: never a stack trace, and never text from others as HTML."""

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
    """Wrap a function or generator so that its errors are raised as gradio's, with their texts shown as text.

    An error that is not a `UserError` is a bug: the page reports it without details, which are in the terminal.
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
        raise message(f"unexpected error ({type(error).__name__}); see the terminal for details") from None


def message(text: str) -> gr.Error:
    """Return an error with a text of any origin, which gradio itself would take for HTML."""
    shown = html.escape(text).replace("\n", "<br>")
    return gr.Error(shown, duration=MESSAGE_S, print_exception=False)
