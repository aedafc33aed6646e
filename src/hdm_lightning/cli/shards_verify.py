"""hdm-shards verify."""

import argparse

from hdm_lightning.cli.counts import at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("folder", help="local folder with shards and index.json")
    parser.add_argument("--decode", action="store_true", help="decode every sample and read its caption, too")
    parser.add_argument("--allow-missing", action="store_true", help="samples without a caption are good")
    parser.add_argument(
        "--mark", action="store_true", help="leave bad samples and missing shards out of the index (changes the order)"
    )
    parser.add_argument("--jobs", type=at_least(1), default=1, help="processes that read side by side (default 1)")


def run(arguments: argparse.Namespace) -> int:
    """Verify, print one line a problem; status 1 where there is one."""
    from hdm_lightning.data.captions import CaptionRules  # noqa: PLC0415 (as above)
    from hdm_lightning.data.index import load_index  # noqa: PLC0415 (loads torch)
    from hdm_lightning.data.parallel import progress_bar  # noqa: PLC0415 (for --help's sake)
    from hdm_lightning.data.scanning import leave_out, verify  # noqa: PLC0415 (as above)

    before = load_index(arguments.folder)
    with progress_bar("shards", len(before.shards)) as show:
        problems = verify(
            arguments.folder,
            decode=arguments.decode or arguments.mark,
            captions=CaptionRules(allow_missing=arguments.allow_missing),
            jobs=arguments.jobs,
            progress=show,
        )
    for problem in problems:
        print(problem)
    if arguments.mark:
        index = leave_out(arguments.folder, problems)
        print(f"{before.samples - index.samples} samples left out, {index.samples} remain")
    print(f"{len(problems)} problems")
    return 1 if problems else 0
