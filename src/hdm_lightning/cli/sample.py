"""hdm-sample: generate images from prompts with a run, a trained model or a published file."""

import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from hdm_lightning.cli.arguments import Flags, IntermixedParser
from hdm_lightning.cli.command import collection_paused, progress_bars, run_command
from hdm_lightning.encoders.pretrained import require_there
from hdm_lightning.generation.sampling_settings import DrawingMachine, DrawingRequest, SamplingChanges
from hdm_lightning.printable import in_one_line

_DESCRIPTION = """Generate images from prompts.

MODEL is a run folder (its final/ is used; a LoRA run loads its base), a pipeline folder, a weights file inside one,
a hub name, or a published network: a single file (.safetensors, .ckpt) or a diffusers folder. Prompts come from the
command line, from --prompts FILE, or otherwise from standard input, one per line. Every PNG stores its settings;
--repeat generates it again."""

_EXAMPLES = """examples:
  hdm-sample runs/shapes "a large red circle" --count 4
  hdm-sample runs/shapes --prompts prompts.txt --size 512x512 --size 768x384
  hdm-sample --repeat samples/0000-a-large-red-circle-0.png --steps 50
  hdm-sample runs/shapes "a star" --lora runs/ink:0.7 --lora flat.safetensors:0.4
  hdm-sample runs/shapes "a star" --image sketch.png --strength 0.6 --size image --on-indivisible pad
"""

_REQUEST = Flags(
    DrawingRequest,
    {
        "model": "MODEL",
        "prompts": "PROMPT",
        "prompt_file": "--prompts FILE",
        "size": "--size WIDTHxHEIGHT",
        "repeat": "--repeat PNG",
        "image": "--image FILE",
        "out": "--out DIR",
    },
)
_OVERRIDES: Flags[Any] = Flags(
    SamplingChanges,
    {
        "guidance_scale": "--guidance",
        "routing_scale": "--routing-guidance",
        "conditional_rate": "--rate",
        "unconditional_rate": "--negative-rate",
        "negative_prompt": "--negative-prompt TEXT",
    },
)
_MACHINE = Flags(DrawingMachine, {"lora": "--lora NAME[:WEIGHT]"})


def parser() -> IntermixedParser:
    """Return the command's parser."""
    command = IntermixedParser(prog="hdm-sample", description=_DESCRIPTION, epilog=_EXAMPLES)
    _REQUEST.add(command, only=["model", "prompts"])
    drawn = [each.name for each in fields(DrawingRequest) if each.name not in ("model", "prompts")]
    _REQUEST.add(command.add_argument_group("what to generate"), only=drawn)
    _OVERRIDES.add(command.add_argument_group("sampling (defaults: the model's own)"))
    _MACHINE.add(command.add_argument_group("model and machine"))
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Generate images and return the exit status."""
    return run_command(lambda: _sample(argv))


def _sample(argv: Sequence[str] | None) -> None:
    command = parser()
    given = command.parse_args(argv)
    request, machine = _REQUEST.read(given), _MACHINE.read(given)
    overrides = {key: value for key, value in vars(_OVERRIDES.read(given)).items() if value is not None}
    if request.model is not None:  # before the imports, which take seconds
        require_there(str(request.model), "use a run's folder, a diffusers folder or a file")
    with collection_paused():
        from hdm_lightning.generation.drawing import draw_request  # noqa: PLC0415  (imports torch; keeps --help fast)
        from hdm_lightning.profiling.system import chosen_device  # noqa: PLC0415

    device = chosen_device(machine.device or "auto")
    with progress_bars() as progress:
        paths = draw_request(request, machine, overrides, device, warn=_warn, progress=progress)
    for path in paths:
        print(path)


def _warn(text: str) -> None:
    print(f"warning: {in_one_line(text)}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
