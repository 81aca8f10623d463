"""A large index of random but clustered global features: build time, bytes, latency and recall@10.

LANCE_CPU_THREADS=1 python benchmarks/large_search.py --vectors 300000 --output DIR
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import IvfPq

D = 512


def blocks(count: int, seed: int = 0, block: int = 50_000) -> Iterator[np.ndarray]:
    """Unit vectors around 5,000 centres, as features of photographs gather around subjects."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((5000, D), dtype=np.float32)
    while count:
        n = min(block, count)
        vectors = centres[rng.integers(0, 5000, n)] + 0.9 * rng.standard_normal((n, D), dtype=np.float32)
        yield vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        count -= n


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    N = options.vectors
    shutil.rmtree(options.output, ignore_errors=True)
    said: dict[str, object] = {"vectors": N, "width": D}
    started, cpu = time.perf_counter(), time.process_time()
    schema = pa.schema([("id", pa.int64()), ("camera", pa.int32()), ("vector", pa.list_(pa.float32(), D))])
    table = lancedb.connect(str(options.output)).create_table("images", schema=schema)
    first = 0
    for vectors in blocks(N):
        ids = np.arange(first, first + len(vectors))
        first += len(vectors)
        values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), D)
        table.add(pa.table([pa.array(ids), pa.array((ids % 100).astype(np.int32)), values], schema=schema))
    said["write_s"], said["write_cpu_s"] = time.perf_counter() - started, time.process_time() - cpu
    said["bytes_of_vectors"] = size_of(options.output)
    print(json.dumps(said), flush=True)

    started, cpu = time.perf_counter(), time.process_time()
    partitions = max(1, round(math.sqrt(N)))
    table.create_index("vector", config=IvfPq(distance_type="cosine", num_partitions=partitions, num_sub_vectors=64))
    said["partitions"] = partitions
    said["index_s"], said["index_cpu_s"] = time.perf_counter() - started, time.process_time() - cpu
    said["bytes_of_index"] = size_of(options.output) - int(str(said["bytes_of_vectors"]))
    print(json.dumps(said), flush=True)

    # Queries near what is there, as texts are near what they tell of.
    rng = np.random.default_rng(1)
    near = next(blocks(options.queries, seed=0))
    queries = near + 0.5 * rng.standard_normal(near.shape, dtype=np.float32) / math.sqrt(D)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    best = [[(-2.0, -1)] for _ in range(options.queries)]
    first = 0
    for vectors in blocks(N):
        scores = queries @ vectors.T
        top = np.argpartition(-scores, 10, axis=1)[:, :10]
        for row in range(options.queries):
            found = [(float(scores[row, i]), first + int(i)) for i in top[row]]
            best[row] = sorted(best[row] + found, reverse=True)[:10]
        first += len(vectors)
    exact = [{number for _, number in row} for row in best]

    for candidates, probes in ((10, 20), (100, 20), (500, 20), (500, 50), (2000, 50)):
        latencies, kept = [], []
        for query, wanted in zip(queries, exact):
            started = time.perf_counter()
            found = (
                table.search(query).distance_type("cosine").nprobes(probes).limit(candidates).select(["id"]).to_arrow()
            )
            latencies.append(1e3 * (time.perf_counter() - started))
            kept.append(len(wanted & set(found["id"].to_pylist())) / 10)
        print(json.dumps({
            "candidates": candidates, "probes": probes, "recall_at_10": round(float(np.mean(kept)), 4),
            "ms_median": round(float(np.median(latencies)), 1), "ms_p95": round(float(np.quantile(latencies, 0.95)), 1),
        }), flush=True)  # fmt: skip
    started = time.perf_counter()
    for query in queries[:20]:
        table.search(query).distance_type("cosine").nprobes(50).where("camera = 7", prefilter=True).limit(
            100
        ).to_arrow()
    print(json.dumps({"filtered_ms": 1e3 * (time.perf_counter() - started) / 20}))


if __name__ == "__main__":
    main()
