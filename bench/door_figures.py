"""What bench/door.py makes of what it saw: figures, and a table of them."""

from statistics import median

from rich.console import Console
from rich.table import Table

STREAMS = (1, 64, 1000)  # that are open at a time


def summarise(seen: dict[str, list[float]]) -> dict[str, float]:
    def ratio(over: list[float], under: list[float]) -> float:
        """Median of the rounds' own ratios: both sides of a round saw the same machine."""
        return median(a / b for a, b in zip(over, under, strict=True))

    middle = {name: median(values) for name, values in seen.items()}
    few, some, many = STREAMS
    own = {streams: (middle[f"request_{streams}"] - middle["tokenising"]) * 1e3 for streams in STREAMS}
    token = {streams: middle[f"router_token_{streams}"] * 1e6 for streams in STREAMS}
    added = {streams: middle[f"added_{streams}"] * 1e3 for streams in STREAMS}
    idle_kib = (middle[f"memory_{many}"] - middle["memory_0"]) / many * 1024
    figures = {
        "request_over_relay": ratio(seen["ids_request"], seen["relay_request"]),
        "short_request_over_relay": ratio(seen["router_short"], seen["relay_short"]),
        "token_over_relay": ratio(seen[f"router_token_{some}"], seen[f"relay_token_{some}"]),
        "requests_per_s_over_relay": ratio(seen["router_per_s"], seen["relay_per_s"]),
        "request_growth": own[many] / own[few],
        "token_growth": token[many] / token[few],
        "added_growth": added[many] / added[few],
        "memory_growth": middle[f"memory_{many}"] / middle["memory_0"],
        "memory_kept": middle["memory_again"] / middle[f"memory_{many}"],
        "router_cpu_ms_per_request": own[few],
        "tokenising_ms": middle["tokenising"] * 1e3,
        "router_cpu_ms_per_request_of_ids": middle["ids_request"] * 1e3,
        "router_cpu_ms_per_short_request": middle["router_short"] * 1e3,
        "router_cpu_us_per_token": token[some],
        "requests_per_s": middle["router_per_s"],
        "router_p50_added_ms": added[few],
        "direct_p50_ms": middle[f"direct_{few}"] * 1e3,
        "router_mib": middle["memory_0"],
        "idle_stream_kib": idle_kib,
        "relay_cpu_ms_per_request": middle["relay_request"] * 1e3,
        "relay_cpu_ms_per_short_request": middle["relay_short"] * 1e3,
        "relay_cpu_us_per_token": middle[f"relay_token_{some}"] * 1e6,
        "relay_requests_per_s": middle["relay_per_s"],
    }
    for streams in STREAMS:
        figures |= {
            f"request_ms_{streams}": own[streams],
            f"token_us_{streams}": token[streams],
            f"added_ms_{streams}": added[streams],
            f"memory_mib_{streams}": middle[f"memory_{streams}"],
        }
    return figures


TARGETS = {"router_cpu_ms_per_request": "at most 1", "router_cpu_us_per_token": "at most 50"}
MEANING = {
    "request_over_relay": "CPU time of a request of token ids, against HTTP and gRPC with nothing between",
    "short_request_over_relay": "CPU time of a short request, against the same",
    "token_over_relay": f"CPU time of a token at {STREAMS[1]} streams, against the same",
    "requests_per_s_over_relay": "short requests a second, against the same",
    "request_growth": f"CPU time of a request beside {STREAMS[-1]} open streams, against beside one",
    "token_growth": f"CPU time of a token at {STREAMS[-1]} streams, against at one",
    "added_growth": f"time added to the first token beside {STREAMS[-1]} open streams, against beside one",
    "memory_growth": f"memory with {STREAMS[-1]} idle streams, against none",
    "memory_kept": "the same at the end of the run, against its beginning",
    "router_cpu_ms_per_request": "handed over, answered with 2 tokens; beyond tokenising",
    "tokenising_ms": "tokenising such a prompt",
    "router_cpu_ms_per_request_of_ids": "a prompt as long, of token ids",
    "router_cpu_ms_per_short_request": "32 tokens, decode alone, answered with 1 token; 64 at once",
    "router_cpu_us_per_token": f"{STREAMS[1]} streams, a step every 50 ms",
    "requests_per_s": "of these short requests, on the cores that client and workers use too",
    "router_p50_added_ms": "first token of a short prompt, through HTTP less gRPC to decode",
    "direct_p50_ms": "that of gRPC to decode",
    "router_mib": "resident, no stream open",
    "idle_stream_kib": f"each of {STREAMS[-1]} streams that get nothing",
    "relay_cpu_ms_per_request": "the limit of router_cpu_ms_per_request",
    "relay_cpu_ms_per_short_request": "the limit of router_cpu_ms_per_short_request",
    "relay_cpu_us_per_token": "the limit of router_cpu_us_per_token",
    "relay_requests_per_s": "the limit of requests_per_s",
}
GROWTH = {
    "request_ms": "CPU ms a request, beside so many open streams",
    "token_us": "CPU us a token, of so many streams",
    "added_ms": "ms added to the first token, beside so many",
    "memory_mib": "MiB resident",
}


def show(figures: dict[str, float], length: int, rounds: int) -> None:
    table = Table(title=f"the router: {length} prompt tokens, medians of {rounds} rounds", title_justify="left")
    for name, justify in (("figure", "left"), ("value", "right"), ("target", "left"), ("what", "left")):
        table.add_column(name, justify=justify)
    for name, meaning in MEANING.items():
        table.add_row(name, f"{figures[name]:.3g}", TARGETS.get(name, ""), meaning)
    growth = Table(title="from one stream to many", title_justify="left")
    growth.add_column("figure")
    for streams in STREAMS:
        growth.add_column(str(streams), justify="right")
    growth.add_column("what")
    for name, meaning in GROWTH.items():
        growth.add_row(name, *[f"{figures[f'{name}_{streams}']:.3g}" for streams in STREAMS], meaning)
    console = Console(width=130)
    console.print(table)
    console.print(growth)
