"""Write the tables of README.md from the forecasts beside it: python experiments/plans/table.py."""

import json
from pathlib import Path
from typing import Any

from hdm_lightning.profiling.duration import PAPER_HOURS

HERE = Path(__file__).parent
MACHINES = ("4x5090", "4x4090", "4x3090", "1x4090")
MONEY = ("kwh", "rent_usd", "electricity_usd")
CARDS = ("1x4080", "1x3090", "1x4090", "1x5090", "1xh100", "4x4090", "4x5090", "4xh100", "8x5090")
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
GIB = 2**30


def read(name: str) -> dict[str, Any]:
    """Read a forecast that hdm-plan wrote."""
    content: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    return content


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table in which all columns but the first are numbers."""
    marks = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, marks, *rows))


def against_the_paper(plan: dict[str, Any]) -> str:
    """Return the table of forecast and reported hours of each stage."""
    rows = []
    for stage in plan["stages"]:
        reported = PAPER_HOURS[stage["stage"]["resolution"]]
        off = 100 * (stage["hours"] / reported - 1)
        rows.append([stage["stage"]["name"], f"{reported:.0f}", f"{stage['hours']:.0f}", f"{off:+.0f}%"])
    total, reported = plan["total"]["hours"], sum(PAPER_HOURS.values())
    rows.append(["all", f"{reported:.0f}", f"{total:.0f}", f"{100 * (total / reported - 1):+.0f}%"])
    return table(["stage", "paper, h", "forecast, h", "off by"], rows)


def stages(name: str, plan: dict[str, Any]) -> list[list[str]]:
    """Return a row for each stage of a forecast, and their sum."""
    rows = []
    for stage in plan["stages"]:
        wanted = stage["stage"]
        taken = f"{stage['micro_batch']} of {wanted['micro_batch_size']}"
        rows.append(
            [
                f"{name} {wanted['name']}",
                f"{stage['hours']:.0f}",
                f"{stage['images_per_s']:.1f}",
                f"{stage['memory']['total'] / GIB:.0f}" + ("" if stage["fits"] else " !"),
                taken,
                f"{stage['largest_plain']} / {stage['largest_checkpointed']}",
                f"{stage['kwh']:.0f}",
                f"{stage['rent_usd']:.0f}",
                f"{stage['electricity_usd']:.0f}",
                stage["binds"],
            ]
        )
    sums, rent = plan["total"], plan["total"]["rent_usd"]
    dollars = f"**{rent['expected']:.0f}** ({rent['low']:.0f} … {rent['high']:.0f})"
    sums_of = [f"**{sums['kwh']:.0f}**", dollars, f"**{sums['electricity_usd']:.0f}**"]
    return [*rows, [f"**{name}, all**", f"**{sums['hours']:.0f}**", "", "", "", "", *sums_of, ""]]


def encodings(plan: dict[str, Any]) -> list[list[str]]:
    """Return a row for each set of latents, and for the text states, that are encoded before the first stage."""
    found = []
    for each in plan["encodings"]:
        what = "captions" if each["resolution"] is None else f"{each['resolution']} px"
        name, power = f"encoding, {what}", [f"{each[key]:.0f}" for key in MONEY]
        found.append([name, f"{each['hours']:.0f}", f"{each['images_per_s']:.1f}", "", "", "", *power, each["binds"]])
    return found


def read_cards(name: str) -> dict[str, dict[str, Any]]:
    """Read the forecasts of one training on several machines, by machine."""
    plans = read(f"cards_{name}")["plans"]
    return {f"{plan['machine']['count']}x{plan['machine']['gpu']['name']}": plan for plan in plans}


def hours_and_rent(plan: dict[str, Any] | None) -> str:
    """Format both sums of a forecast, with days if there are many hours."""
    if plan is None:
        return ""
    hours, rent = plan["total"]["hours"], plan["total"]["rent_usd"]["expected"]
    time = f"{60 * hours:.0f} min" if hours < 1 else f"{hours:.0f} h" if hours < 100 else f"{hours / 24:.0f} days"
    return f"{time}, ${rent:.2f}" if rent < 1 else f"{time}, ${rent:,.0f}"


def cards() -> str:
    """Return the table of what the presets take on cards of several sizes."""
    evening, weekend, paper = map(read_cards, ("evening", "weekend", "paper"))
    rows = []
    for name in CARDS:
        plan = paper[name]
        speed, memory = plan["stages"][0]["images_per_s"], plan["machine"]["gpu"]["memory_gib"]
        cells = (hours_and_rent(each.get(name)) for each in (evening, weekend, paper))
        fits = "yes" if all(stage["fits"] for stage in plan["stages"]) else "with smaller micro-batches"
        rows.append([name, f"{memory:g} GB", *cells, f"{speed:.0f}", fits])
    header = ["cards", "memory each", "evening_gpu", "weekend_24gb", "paper", "images/s at 256 px", "paper fits"]
    return table(header, rows)


def tables() -> str:
    """Return all tables of the README."""
    plans = {name: read(f"paper_{name}") for name in MACHINES}
    header = ["", "hours", "images/s", "memory, GiB", "micro-batch", "largest", "kWh", "rent $", "power $", "binds"]
    rows = [row for name, plan in plans.items() for row in stages(name, plan)]
    budget, cached = read("budget_600_4x5090"), read("paper_cached_4x5090")
    bought = f"`budget_usd=600` on 4x5090 buys {100 * budget['share']:.0f}% of the paper's samples:"
    return "\n\n".join(
        [
            "### Against the paper's own times, four RTX 5090",
            against_the_paper(plans["4x5090"]),
            "### The paper's schedule on four machines",
            table(header, rows),
            "### The same samples with the least operations: `experiment=paper_cached`, captions of 64 tokens",
            table(header, encodings(cached) + stages("4x5090", cached)),
            "### The presets by card",
            cards(),
            "### What $600 buys",
            bought,
            table(header, stages("$600", budget)),
        ]
    )


def main() -> None:
    """Write the tables into README.md."""
    file = HERE / "README.md"
    before, _, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    file.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
