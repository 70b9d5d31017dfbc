"""Whether one process passes on what a GPU makes: 256 streams at the pace of vLLM on an H100, without the GPU.

    python -m benchmarks.http_pace
    python -m benchmarks.http_pace --tokens_per_s 30000 --tokens 1024     # as when all prompts are read

The engine without a model (benchmarks/stand_in.py) says 28.4 tokens a second to each of 256 clients who ask at once,
the 7,267 in all that vLLM makes of ChatGLM3-6B in bf16 there (BENCHMARKS.md); an answer has 128, its first two at once,
which makes 7,382. Once each token is a piece, once what is due is one, as in the vLLM engine. The rate is all tokens
over the time from the first request to the last answer's end, beside the one at which the engine makes them. CPU is
that of all processes that the answer passes through.
"""

import argparse
import asyncio

from benchmarks.serving_cost import PLACES, load, p50_p99

STREAMS = 256


def main() -> None:
    """Measure each place, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens_per_s", type=float, default=7267, help="of all streams (default: 7267)")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer (default: 128)")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=PLACES, help="(default: all)")
    chosen = parser.parse_args()
    tokens, each = chosen.tokens, chosen.tokens_per_s / STREAMS
    print("| | pieces | tokens/s | of the engine's | CPU a token, µs | first token, ms (p50 / p99) |")
    print("|---|---|--:|--:|--:|--:|")
    made = STREAMS * tokens / ((tokens - 2) / each)
    for name in chosen.places:
        for joins in (False, True):
            with PLACES[name](each, joins) as running:
                found = asyncio.run(load(running, STREAMS, STREAMS, tokens))
            seconds = max(one.ended for one in found.outcomes) - min(one.sent for one in found.outcomes)
            rate = STREAMS * tokens / seconds
            cells = [name, "joined" if joins else "single", f"{rate:,.0f}", f"{rate / made:.1%}"]
            cells += [f"{1e6 * found.cpu_s / (STREAMS * tokens):.0f}", p50_p99(found.first_tokens_ms())]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
