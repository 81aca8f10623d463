"""Large indices: merged tokens and what they lose, the Lance table, filters, pages, versions, appends."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from test_index import TEXTS, World, index, paths_below, refused, save_model, write_picture, write_pictures

from itemizedclip.commands.cli import main as cli
from itemizedclip.evaluation.tcsim_folded import scorer_of_stored_tokens
from itemizedclip.models.dual_encoder import ImageFeatures
from itemizedclip.models.factory import create_model
from itemizedclip.runtime.errors import UserError
from itemizedclip.search.compressed import MergedTokens, bytes_per_image, merge_tokens
from itemizedclip.search.index import open_index, open_searcher
from itemizedclip.search.lance import FEWEST_FOR_INDEX, LARGE_FILE, LargeImageIndex, create_large, open_large

pytest.importorskip("lancedb")


# --- merged tokens ---------------------------------------------------------------------------------------------------


def tokens(B: int = 3, L: int = 49, D: int = 32) -> torch.Tensor:
    """Tokens around a few directions, as patches of one thing look alike."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(B, 6, D, generator=generator)
    which = torch.randint(6, (B, L), generator=generator)
    noise = 0.3 * torch.randn(B, L, D, generator=generator)
    return 5 * (centres.gather(1, which[..., None].expand(-1, -1, D)) + noise) + 1


def test_every_token_kept_is_right_to_8_bits():
    given = tokens()
    merged = merge_tokens(given, 49)
    expected = F.layer_norm(given, (32,))
    assert (merged.unpacked() - expected).abs().max() <= float(merged.scales_Bm.max()) * 0.51
    more = merge_tokens(given, 60)
    assert more.codes_BmD.shape == (3, 60, 32)
    assert torch.equal(more.unpacked(), merged.unpacked())


def test_centroids_are_the_means_of_their_tokens():
    given = F.layer_norm(tokens(), (32,))
    merged = merge_tokens(tokens(), 6, rounds=30)
    unpacked = merged.unpacked()
    for image, places, shown in zip(given, merged.places_BL, unpacked):
        for centroid in places.unique().tolist():
            inside = places == centroid
            assert torch.allclose(shown[inside][0], image[inside].mean(0), atol=0.03)
    errors = [float((merge_tokens(tokens(), m).unpacked() - given).square().mean()) for m in (1, 3, 6, 20)]
    assert errors == sorted(errors, reverse=True)


def test_rows_are_bytes_of_the_promised_length():
    merged = merge_tokens(tokens(), 8)
    rows = merged.rows()
    assert {len(row) for row in rows} == {bytes_per_image(49, 32, 8)} == {2 * 8 + 49 + 8 * 32}
    again = MergedTokens.from_rows(rows, num_tokens=49, width=32, num_centroids=8)
    assert torch.equal(again.unpacked(), merged.unpacked())
    with pytest.raises(UserError, match="the table is damaged"):
        MergedTokens.from_rows([rows[0][:-1]], num_tokens=49, width=32, num_centroids=8)
    broken = bytearray(rows[0])
    broken[16] = 9
    with pytest.raises(UserError, match="name a centroid that is not there"):
        MergedTokens.from_rows([bytes(broken)], num_tokens=49, width=32, num_centroids=8)
    with pytest.raises(UserError, match="expected 1 to 256"):
        merge_tokens(tokens(), 257)


def test_scores_come_near_as_centroids_are_added():
    torch.manual_seed(0)
    model = create_model(
        {
            "name": "tiny", "embed_dim": 32, "head_heads": 4,
            "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1},
            "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        }
    )  # fmt: skip
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    given = tokens()
    scorer = scorer_of_stored_tokens(model.head, torch.randn(5, 32), normalise_tokens=False)

    def scores(shown: torch.Tensor) -> torch.Tensor:
        return scorer.score(ImageFeatures(torch.zeros(3, 32), shown, (7, 7)))

    exact = scores(given)
    losses = [float((scores(merge_tokens(given, m).unpacked()) - exact).abs().max()) for m in (2, 8, 49)]
    assert losses[2] < 0.02
    assert losses[2] < losses[1] < losses[0]


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    root = tmp_path_factory.mktemp("large")
    made = World(write_pictures(root / "photos"), save_model(root / "tiny.pt"), root / "photos.index")
    rows = [f"{path},{number % 3},{'north' if number % 2 else 'south'}" for number, path in
            enumerate(paths_below(made.images))]  # fmt: skip
    (root / "facts.csv").write_text("path,year,side\n" + "\n".join(rows) + "\n")
    index(
        made.images, "--checkpoint", made.checkpoint, "--engine", "lance", "--stored-tokens", 16,
        "--metadata", root / "facts.csv",
    )  # fmt: skip
    return made


def large_of(world: World) -> LargeImageIndex:
    searcher = open_searcher(world.images.with_name("photos.lance"), device="cpu")
    assert isinstance(searcher, LargeImageIndex)
    return searcher


def test_a_large_index_finds_what_the_embedded_one_finds(world):
    """16 of 16 tokens kept, in 8 bits: scores differ in the third digit, images hardly."""
    large, embedded = large_of(world), open_index(world.index, device="cpu")
    assert len(large) == len(embedded) == 23
    for text in TEXTS:
        ours, exact = large.page(text, 23).hits, embedded.search([text], 23, exact=True)[0].hits
        by_path = {hit.image.path: hit for hit in exact}
        assert sorted(by_path) == sorted(hit.image.path for hit in ours)
        for hit in ours:
            other = by_path[hit.image.path]
            assert hit.score == pytest.approx(other.score, abs=0.02)
            assert (hit.image.size, hit.image.height, hit.file) == (other.image.size, other.image.height, other.file)
            assert torch.allclose(hit.maps.weights.float(), other.maps.weights.float(), atol=0.05)
        assert [hit.score for hit in ours] == sorted((hit.score for hit in ours), reverse=True)
        pages = [hit.image.path for skip in (0, 5, 10, 15, 20) for hit in large.page(text, 5, skip=skip).hits]
        assert pages == [hit.image.path for hit in ours]
        assert [hit.rank for hit in large.page(text, 5, skip=10).hits] == [11, 12, 13, 14, 15]


def test_filters(world):
    large = large_of(world)
    paths = paths_below(world.images)
    found = large.page("a lake", 23, where="year = 1 AND side = 'north'").hits
    assert sorted(hit.image.path for hit in found) == [p for n, p in enumerate(paths) if n % 3 == 1 and n % 2]
    tall = large.page("a lake", 23, where="height > width").hits
    assert tall
    assert all(hit.image.height > hit.image.width for hit in tall)
    assert large.page("a lake", where="year = 99").hits == []
    with pytest.raises(UserError, match=r"--where 'colour = 1' is not understood .* expected SQL over path, size"):
        large.page("a lake", where="colour = 1")


def test_commands(world, capfd, tmp_path):
    table = world.images.with_name("photos.lance")
    cli(["search", *TEXTS, "--index", str(table), "--top", "3", "--where", "year = 1", "--json", "--device", "cpu"])
    said = json.loads(capfd.readouterr().out)
    assert [len(one["hits"]) for one in said["queries"]] == [3, 3, 3]
    assert said["num_images"] == 23
    assert "--exact and --measure-recall read every token" in refused(capfd, "search", "x", "--index", table, "--exact")
    assert "--where filters a large index" in refused(capfd, "search", "x", "--index", world.index, "--where", "a = 1")
    assert "has no version 99" in refused(capfd, "search", "x", "--index", table, "--version", 99)
    assert "columns are a, b; expected path" in metadata_refused(world, capfd, tmp_path, "a,b\n1,2\n")
    assert "line 2 has 1 cells; expected 2" in metadata_refused(world, capfd, tmp_path, "path,b\n1\n")
    assert "stands in two rows" in metadata_refused(world, capfd, tmp_path, "path,b\n1,2\n1,3\n")


def metadata_refused(world: World, capfd, folder, text: str) -> str:
    (folder / "bad.csv").write_text(text)
    return refused(
        capfd, "index", world.images, "--checkpoint", world.checkpoint, "--engine", "lance", "--table", folder / "t",
        "--metadata", folder / "bad.csv", "--device", "cpu", "--workers", 0,
    )  # fmt: skip


def test_appends_are_versions_and_happen_once(tmp_path):
    images, checkpoint = write_pictures(tmp_path / "photos", 9), save_model(tmp_path / "tiny.pt")
    flags = [images, "--checkpoint", checkpoint, "--engine", "lance", "--stored-tokens", 8, "--recall-queries", "none"]
    index(*flags)
    large = open_large(tmp_path / "photos.lance")
    first = large.version
    assert len(large) == 9
    index(*flags)
    assert open_large(tmp_path / "photos.lance").version == first
    for number in range(100, 104):
        write_picture(images / f"new{number}.png", number)
    write_picture(images / "00.png", 500)  # another picture under an old name
    index(*flags)
    large = open_large(tmp_path / "photos.lance")
    assert len(large) == 13
    assert large.version > first
    searcher = open_searcher(tmp_path / "photos.lance", device="cpu")
    exact = {hit.image.path: hit.score for hit in open_index(tmp_path / "photos.index", device="cpu").search(
        ["a lake"], 13, exact=True)[0].hits}  # fmt: skip
    ours = {hit.image.path: hit.score for hit in searcher.page("a lake", 20).hits}
    assert ours.keys() == exact.keys()
    assert ours["00.png"] == pytest.approx(exact["00.png"], abs=0.2)
    before = open_searcher(tmp_path / "photos.lance", device="cpu", version=first)
    assert len(before) == 9


def test_a_table_of_another_model_is_refused(world, tmp_path, capfd):
    checkpoint = save_model(tmp_path / "other.pt", seed=7)
    said = refused(
        capfd, "index", world.images, "--checkpoint", checkpoint, "--output", tmp_path / "i", "--engine", "lance",
        "--table", world.images.with_name("photos.lance"), "--device", "cpu", "--workers", 0,
        "--recall-queries", "none",
    )  # fmt: skip
    assert "was made with another checkpoint sha256 than the table" in said
    (tmp_path / "empty").mkdir()
    assert "no index here" in refused(capfd, "search", "x", "--index", tmp_path / "empty")
    (tmp_path / "empty" / LARGE_FILE).write_text("{}")
    assert "large.json" in refused(capfd, "search", "x", "--index", tmp_path / "empty")


def test_ivf_pq_keeps_most_of_the_nearest(world, tmp_path):
    """More images than are compared one by one: the engine's own index is made, and finds most of the exact ten."""
    import pyarrow as pa

    large = create_large(tmp_path / "many", world.index, tokens=4)
    assert not large.build()
    N = FEWEST_FOR_INDEX + 1000
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(60, 32, generator=generator), dim=-1)
    vectors = centres[torch.randint(60, (N,), generator=generator)] + 0.15 * torch.randn(N, 32, generator=generator)
    blank = bytes(bytes_per_image(math.prod(large.facts.grid), 32, 4))
    rows = [
        {"path": f"{n}", "size": n, "mtime_ns": 0, "height": 9, "width": 9, "shard": "", "vector": v, "tokens": blank}
        for n, v in enumerate(vectors.numpy())
    ]
    large._table.add(pa.Table.from_pylist(rows, schema=large._table.schema))
    assert large.build(partitions=20, sub_vectors=8)
    found = 0
    for query in centres[:10] + 0.05 * torch.randn(10, 32, generator=generator):
        exact = set(F.cosine_similarity(vectors, query[None]).topk(10).indices.tolist())
        found += len(exact & set(large.candidates(query, 200, probes=10).column("size").to_pylist()))
    assert found >= 90
