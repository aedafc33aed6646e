"""Build shards from a dataset on the Hub, or a folder laid out like one, streamed by the package `datasets`."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hdm_lightning.datasets.rows import Columns, Table, TableRow, add_row_arguments, build_as_asked, state_of
from hdm_lightning.errors import UserError, did_you_mean, first_line, import_optional


class HubTable(Table):
    """The rows of one split of a dataset, streamed in order.

    A dataset on the Hub is read at the commit that its revision names now; a build resumed at another commit starts
    again. Code in a dataset is never run: `datasets` itself refuses such datasets.

    Args:
        name: OWNER/NAME, or a folder.
        columns: the columns to use.
        config: which configuration, if there are several.
        split: such as `train`.
        revision: branch, tag or commit.

    Raises:
        UserError: `datasets` is missing, or there is no such dataset, configuration, split or column.
    """

    def __init__(
        self, name: str, columns: Columns, *, config: str | None = None, split: str = "train", revision: str = "main"
    ) -> None:
        datasets = import_optional("datasets", "tables", where="hub")
        self.place, self.columns, self.rows = name, columns, None
        folder = Path(name).expanduser()
        place, pinned = name, {}
        if folder.is_dir():
            files = sorted(each for each in folder.rglob("*") if each.is_file())
            place, self.state = str(folder), state_of((str(each.relative_to(folder)), each) for each in files)
        else:
            self.state = pinned["revision"] = _commit(name, revision)
        self.options = {"hub": name, "config": config, "split": split, "revision": revision}
        try:
            found = datasets.load_dataset(place, config, streaming=True, **pinned)
        except Exception as error:  # from the client, its HTTP library or pyarrow
            raise _refused(name, error) from error
        if split not in found:
            raise UserError(f"there is no split {split!r}", where="--split", hint=did_you_mean(split, list(found)))
        self._stream = self._prepared(found[split], datasets)

    def read(self, first: int) -> Iterator[TableRow]:
        """Yield the rows from `first` on."""
        try:
            for number, values in enumerate(self._stream.skip(first), start=first):
                yield TableRow(f"{self.place}#{number}", values)
        except UserError:
            raise
        except Exception as error:  # as above: files are fetched and read as the rows are asked for
            raise _refused(self.place, error) from error

    def _prepared(self, stream: Any, datasets: Any) -> Any:
        """Return the stream with images as encoded bytes, and without other images, audio or video."""
        features = stream.features or stream._resolve_features().features
        self.columns.require_in(list(features), self.place)
        image = features[self.columns.image]
        if isinstance(image, datasets.Image):
            stream = stream.cast_column(self.columns.image, datasets.Image(decode=False))
        else:
            _require_images(self.columns.image, image, self.place)
        heavy = (datasets.Image, datasets.Audio, datasets.Video)
        others = [name for name, each in features.items() if isinstance(each, heavy) and name != self.columns.image]
        return stream.remove_columns(others) if others else stream


def _require_images(name: str, feature: Any, place: str) -> None:
    """Raise UserError if a column cannot hold the bytes of images."""
    kind = getattr(feature, "dtype", None) or ("struct" if isinstance(feature, dict) and "bytes" in feature else None)
    if kind in ("binary", "large_binary", "struct"):
        return
    what = f"the column {name!r} holds {kind or type(feature).__name__}, not images"
    hint = (
        f"name a column of images or bytes; for URLs, run `hf download --repo-type dataset {place}`, then img2dataset "
        f"with --input_format parquet --url_col {name}, then `hdm-shards build img2dataset` on its output"
    )
    raise UserError(what, where=place, hint=hint)


def _commit(name: str, revision: str) -> str:
    """Return the commit that a revision of a dataset names now."""
    from huggingface_hub import HfApi  # noqa: PLC0415  (slow import, not needed for folders)

    if name.count("/") != 1 or name[:1] in "./~":
        what, hint = "there is no such folder", "name a dataset on the Hub as OWNER/NAME, or a folder"
        raise UserError(what, where=name, hint=hint)
    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:  # as above
        raise _refused(name, error) from error


def _refused(name: str, error: Exception) -> UserError:
    hint = f"check the name; offline, run `hf download --repo-type dataset {name}` elsewhere and pass the folder; "
    hint += "for a gated dataset, run `hf auth login`; if there are several configurations, choose one with --config"
    return UserError(f"cannot be read ({type(error).__name__}: {first_line(error)})", where=name, hint=hint)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hdm-shards build hub`."""
    parser.add_argument("name", metavar="OWNER/NAME", help="a dataset on the Hub, or a folder laid out like one")
    parser.add_argument("--config", help="which configuration, if there are several")
    parser.add_argument("--split", default="train", help="(default %(default)s)")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (default %(default)s)")
    add_row_arguments(parser, image="image")


def run(arguments: argparse.Namespace) -> int:
    """Build from the arguments and print a summary."""
    table = HubTable(
        arguments.name,
        Columns.of(arguments),
        config=arguments.config,
        split=arguments.split,
        revision=arguments.revision,
    )
    return build_as_asked(table, arguments)
