"""How long 50 people wait who search one served index at once, each with texts of their own.

python benchmarks/serve_load.py INDEX --users 50 --searches 4
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote
from urllib.request import urlopen

import numpy as np
import torch

from itemizedclip.search.index import open_searcher
from itemizedclip.search.recall import BUILT_IN_QUERIES
from itemizedclip.search.serve import SearchServer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("index", type=Path)
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--searches", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    index = open_searcher(options.index, device="cpu")
    with SearchServer(index) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        def one_user(number: int) -> list[tuple[float, float]]:
            waits = []
            for turn in range(options.searches):
                text = f"{BUILT_IN_QUERIES[(number + turn) % len(BUILT_IN_QUERIES)]}, {number} {turn}"
                started = time.perf_counter()
                with urlopen(f"{server.url}search?q={quote(text)}&k=24", timeout=600) as answer:
                    hits = json.load(answer)["hits"]
                searched = time.perf_counter()
                for hit in hits:
                    urlopen(f"{server.url}{hit['picture']}", timeout=600).read()
                waits.append((searched - started, time.perf_counter() - started))
            return waits

        one_user(10_000)  # everything is loaded
        for users in (1, options.users):
            started, cpu = time.perf_counter(), time.process_time()
            with ThreadPoolExecutor(users) as pool:
                waits = np.array([wait for each in pool.map(one_user, range(users)) for wait in each])
            seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu
            print(json.dumps({
                "images": len(index), "users": users, "searches": len(waits),
                "search_ms_median": round(1e3 * float(np.median(waits[:, 0])), 1),
                "search_ms_p95": round(1e3 * float(np.quantile(waits[:, 0], 0.95)), 1),
                "with_24_pictures_ms_median": round(1e3 * float(np.median(waits[:, 1])), 1),
                "with_24_pictures_ms_p95": round(1e3 * float(np.quantile(waits[:, 1], 0.95)), 1),
                "searches_per_s": round(len(waits) / seconds, 1),
                "cpu_ms_per_search": round(1e3 * cpu_s / len(waits), 1),
            }), flush=True)  # fmt: skip
        server.shutdown()
        thread.join()


if __name__ == "__main__":
    main()
