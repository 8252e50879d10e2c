"""How fast the block store is on this machine: blocks to a worker and from it, names, look-ups, memory.

    python bench/store.py [--quick] [--json FILE] [PART ...]

Real store nodes and the workers' own client. Each part measures against its limit or its peer in the same run,
interleaved; medians; ratios first, CPU seconds (of client and nodes together) for a GB beside each. Each part has
processes of its own.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import store_directory
import store_local
import store_lookup
import store_remote
from rich.console import Console
from rich.table import Table
from store_ground import Meaning

# Each part has `measure(quick)`, and FIGURES that tell what it gives.
PARTS = {"local": store_local, "lookup": store_lookup, "directory": store_directory, "remote": store_remote}
COST = ("gb_per_s", "cpu_s_per_gb")
NOTHING = Meaning("", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=f"of {', '.join(PARTS)}; all")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under 240 s on two cores")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--mooncake-python", type=Path, help="the interpreter that has mooncake, if this one has not")
    args = parser.parse_args()
    if args.mooncake_python and not args.mooncake_python.is_file():
        parser.error(f"--mooncake-python {args.mooncake_python} is no file")
    parts = args.parts or list(PARTS)
    figures: dict[str, float | None] = {}
    started = time.monotonic()
    more = {"remote": (args.mooncake_python,)}  # that a part is told
    for part in parts:
        print(f"measuring: {part}", file=sys.stderr, flush=True)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            figures |= process.submit(PARTS[part].measure, args.quick, *more.get(part, ())).result()
    show(figures, {name: meaning for part in parts for name, meaning in PARTS[part].FIGURES.items()})
    if args.json:
        machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine()}
        run = {"parts": parts, "quick": args.quick, "seconds": round(time.monotonic() - started), **machine}
        args.json.write_text(json.dumps({**figures, "run": run}, indent=2) + "\n")


def show(figures: dict[str, float | None], meanings: dict[str, Meaning]) -> None:
    """A table of the ratios, with what we took beside and what the limit or peer did ("its"), and one of the rest."""

    def told(name: str) -> str:
        if name not in figures:
            return ""
        return "none" if (value := figures[name]) is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"

    rest = dict(figures)
    ratios = Table("ratio", "value", "target", "GB/s", "CPU s/GB", "its GB/s", "its CPU s/GB", "what")
    others = Table("figure", "value", "target", "what")
    for name in figures:
        ours, over, theirs = name.partition("_over_")
        target, what = meanings.get(name, NOTHING)
        if over:
            costs = [f"{side}_{cost}" for side in (ours, f"{ours}_{theirs}") for cost in COST]
            ratios.add_row(name, told(name), target, *map(told, costs), what)
            rest = {other: value for other, value in rest.items() if other not in (name, *costs)}
    for name in rest:
        target, what = meanings.get(name, NOTHING)
        others.add_row(name, told(name), target, what)
    console = Console(width=160)
    for table in (ratios, others):
        if table.row_count:
            console.print(table)


if __name__ == "__main__":
    main()
