"""`plan`: print a forecast as a table."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping

from weightsmith.core.escape import escaped
from weightsmith.core.values import Json
from weightsmith.evaluating.build_record import CandidateRecord
from weightsmith.serving.memory import human
from weightsmith.serving.plan import ServingPlan, summary
from weightsmith.steps.step import HERE

_NUMBERS = frozenset({"reads", "writes", "memory", "time"})


def table(result: Mapping[str, Json]) -> str:
    """Return a forecast as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = Text(escaped(f"{result['name']} {result['version']}"))
    rows = Table(title=title, title_justify="left")
    timed = ("time",) if "layer_time" in result else ()
    for heading in ("stage", "target", "state", "reads", "writes", "memory", *timed):
        rows.add_column(heading, justify="right" if heading in _NUMBERS else "left")
    for row in result["stages"]:
        if row["cached"]:
            state = f"cached {'' if row['where'] == HERE else 'in '}{row['where']}"
        else:
            state = f"to do: {row['why']}"
        takes = ""
        if timed and (seconds := row["seconds"]) is not None:
            takes = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
        numbers = (row["read_bytes"], row["write_bytes"], row["peak_memory_bytes"])
        shown = ("" if row["cached"] else human(int(n)) if n else "" for n in numbers)
        # Plain text, never markup: names come from the user.
        cells = (Text(escaped(text)) for text in (row["stage"], row["target"], state))
        rows.add_row(*cells, *shown, *(takes for _ in timed))
    text = io.StringIO()
    console = Console(file=text, width=110, highlight=False)
    console.print(rows)
    for name, plan in result["serving"].items():
        console.print(Text(summary(name, ServingPlan.from_json(plan))), soft_wrap=True)
    for name, sharing in result["sharing"].items():
        shared, own = (human(sharing[f"{what}_bytes"]) for what in ("shared", "own"))
        said = f"{name}: {own} of weights are its own, {shared} are in every image of this base"
        console.print(Text(escaped(said)), soft_wrap=True)
    for name, platforms in result["platforms"].items():
        for platform, said in platforms.items() if len(platforms) > 1 else ():
            console.print(Text(escaped(f"{name}: the image for {platform} is {said}")))
    text.write("".join(_choice(result.get("auto"))))
    if advice := result["advice"]:
        what = {True: "merge", False: "serve the adapters unmerged", None: "use the base unchanged"}
        said = f"advice: {what[advice['merge']]}: {'; '.join(advice['why'])}"
        console.print(Text(escaped(said)))
    if layer_time := result.get("layer_time"):
        (few, many), (fast, slow) = layer_time["counts"], layer_time["layer"]
        said = (
            f"times: one of {layer_time['layers']} layers took {fast:.2g} s for {few} tokens and "
            f"{slow:.2g} s for {many}, with random weights in memory; starting, "
            "and a disk that is slower than this, come on top"
        )
        console.print(Text(said), soft_wrap=True)
    if result["serving"]:
        memory, disk = (human(int(result[f"peak_{what}_bytes"])) for what in ("memory", "disk"))
        console.print(f"at most {memory} of memory and {disk} of disk")
    else:
        console.print("sizes will be known when the sources are on this machine")
    return text.getvalue().rstrip()


def _choice(auto: Mapping[str, Json] | None) -> Iterator[str]:
    """Yield what `auto` would try, a line for each candidate."""
    if not auto:
        return
    yield f"auto: the first of these that is proven; the questions can test {auto['tests']}\n"
    for row in map(CandidateRecord.from_json, auto["candidates"]):
        size = f", {human(row.price)}" if row.price else ""
        size += f", {row.fast}" if row.fast else ""
        why = f": not tried: {row.left}" if row.left else ""
        yield f"  {escaped(row.name + size + why)}\n"
