"""Data order, policies for bad samples, and the checks before the first step."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader
from toy import ToyDataset, toy_tokenizer

from itemizedclip.data.batch import BadSampleError, ItemCollator, ItemSample
from itemizedclip.data.preflight import PreflightError, check_dataset, duplicate_items, duplicate_warning
from itemizedclip.data.sampler import BadSampleCounter, CheckedCollator, CheckedDataset, EpochSampler, EvalShard
from itemizedclip.runtime.processes import stable_seed


def keys(num_samples: int, epoch: int = 0, start_step: int = 0, **changes: int) -> list[tuple[int, int]]:
    sampler = EpochSampler(num_samples, **{"batch_size": 4, "seed": 3, **changes})
    sampler.set_epoch(epoch, start_step)
    assert len(sampler) == len(list(sampler))
    return list(sampler)


def test_ranks_share_each_epoch_without_overlap_in_equal_parts():
    shards = [keys(53, 2, rank=r, world_size=3) for r in range(3)]
    assert [len(shard) for shard in shards] == [16, 16, 16]  # 53 // 12 = 4 steps of 4
    indices = [index for shard in shards for _, index in shard]
    assert len(set(indices)) == 48
    assert set(indices) <= set(range(53))
    assert {epoch for shard in shards for epoch, _ in shard} == {2}


def test_a_step_holds_the_same_samples_whatever_the_number_of_ranks():
    alone = keys(48, batch_size=12)
    together = [keys(48, batch_size=4, rank=r, world_size=3) for r in range(3)]
    for step in range(4):
        assert alone[12 * step : 12 * step + 12] == [k for shard in together for k in shard[4 * step : 4 * step + 4]]


def test_order_depends_on_seed_and_epoch_alone_and_can_be_entered_anywhere():
    assert keys(40, 1) == keys(40, 1)
    assert [i for _, i in keys(40, 0)] != [i for _, i in keys(40, 1)]
    assert keys(40, 1) != keys(40, 1, seed=4)
    assert keys(40, 1, start_step=6) == keys(40, 1)[24:]
    assert keys(40, 1, start_step=10) == []
    assert [i for _, i in EpochSampler(10, batch_size=5, shuffle=False)] == list(range(10))


def test_too_few_samples_for_one_step_names_the_flags():
    with pytest.raises(ValueError, match=r"7 samples do not fill one step of 8 .*--batch-size"):
        EpochSampler(7, batch_size=4, world_size=2)


def test_evaluation_shards_cover_every_sample_once():
    shards = [list(EvalShard(11, rank=r, world_size=4)) for r in range(4)]
    assert sorted(i for shard in shards for i in shard) == list(range(11))
    assert {len(shard) for shard in shards} == {2, 3}
    assert list(EvalShard(1, rank=3, world_size=4)) == []


def test_stable_seed_separates_purposes_and_numbers():
    seeds = {stable_seed(p, *n) for p in ("a", "b") for n in ((0,), (1,), (0, 0), (0, 1), (1, 0))}
    assert len(seeds) == 10
    assert all(0 <= s < 2**63 for s in seeds)
    assert stable_seed("step", 0, 0, 1) == stable_seed("step", 0, 0, torch.tensor(1))


# --- bad samples ---------------------------------------------------------------------------------------------------


def test_stop_policy_names_the_file_and_the_way_out():
    dataset = CheckedDataset(ToyDataset(10, bad=[3]), seed=0, on_bad_sample="stop")
    with pytest.raises(BadSampleError, match=r"toy/3\.png: truncated image; copy it again.*--on-bad-sample skip"):
        dataset[(0, 3)]


def test_skip_policy_replaces_reproducibly_and_reports_every_message():
    dataset = CheckedDataset(ToyDataset(10, bad=range(5)), seed=0, on_bad_sample="skip")
    sample, messages = dataset[(2, 3)]
    assert int(sample.sample_id.removeprefix("toy-")) >= 5
    assert messages[0].startswith("toy/3.png")
    assert len(messages) >= 1
    again, _ = dataset[(2, 3)]
    assert again.sample_id == sample.sample_id
    assert torch.equal(again.image, sample.image)
    assert len({dataset[(epoch, 3)][0].sample_id for epoch in range(20)}) > 1
    good, none = dataset[(2, 7)]
    assert (good.sample_id, none) == ("toy-7", [])


def test_batches_keep_their_size_and_carry_the_messages():
    dataset = CheckedDataset(ToyDataset(12, bad=[0, 5]), seed=0, on_bad_sample="skip")
    sampler = EpochSampler(12, batch_size=4)
    loads = list(DataLoader(dataset, 4, sampler=sampler, collate_fn=CheckedCollator(ItemCollator(toy_tokenizer, 4))))
    assert [len(load.batch) for load in loads] == [4, 4, 4]
    assert sorted({m.split(":")[0] for load in loads for m in load.skipped}) == ["toy/0.png", "toy/5.png"]


def test_data_without_a_single_good_sample_ends():
    dataset = CheckedDataset(ToyDataset(10, bad=range(10)), seed=0, on_bad_sample="skip")
    with pytest.raises(BadSampleError, match="samples in a row cannot be used"):
        dataset[(0, 0)]


def test_a_sample_without_items_is_bad():
    class Empty(ToyDataset):
        def __getitem__(self, key):
            return ItemSample("empty", torch.zeros(3, 8, 8), [])

    with pytest.raises(BadSampleError, match="empty: no text item"):
        CheckedDataset(Empty(3), seed=0, on_bad_sample="stop")[(0, 0)]


def test_counter_stops_above_the_share_of_an_epoch():
    counter = BadSampleCounter(100, 0.02)
    counter.add(0, ["a", "b"])
    counter.add(1, ["c"])  # a new epoch counts afresh
    counter.add(1, ["d"])
    assert counter.total == 4
    with pytest.raises(BadSampleError, match=r"3 bad samples in epoch 2, more .*--max-bad-fraction .*\(2 of 100\)"):
        counter.add(1, ["e"])


# --- preflight -----------------------------------------------------------------------------------------------------


class OneSample:
    """A dataset of one repeated sample."""

    def __init__(self, sample: ItemSample, num_samples: int = 8) -> None:
        self.sample, self.num_samples = sample, num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, key) -> ItemSample:
        return self.sample


def check(dataset, collator=None, step_batch: int = 4, world_size: int = 2):
    collator = collator or ItemCollator(toy_tokenizer, 4)
    return check_dataset(dataset, collator, step_batch=step_batch, world_size=world_size)


def test_a_sound_dataset_passes_and_photographs_and_studies_are_known():
    assert check(ToyDataset(8)).item_tokens.shape[:2] == (1, 4)
    study = ItemSample("s", torch.zeros(2, 1, 4, 8, 8), ["red"], series_names=torch.zeros(2, 110, dtype=torch.int64))
    assert check(OneSample(study)).images.shape == (1, 2, 1, 4, 8, 8)
    assert check(ToyDataset(8, bad=[0, 1])).sample_ids == ["toy-2"]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (ToyDataset(0), "holds no sample"),
        (ToyDataset(7), r"holds 7 samples, one step needs 8 \(2 processes × 4 images\): lower --batch-size"),
        (iter([]), "has no length"),
        (ToyDataset(20, bad=range(20)), r"none of the first 10 samples can be used; the first: toy/0\.png"),
        (OneSample(ItemSample("x", torch.zeros(3, 8, 8), [])), "x: has no text item"),
        (OneSample(ItemSample("x", torch.zeros(1, 8, 8), ["a"])), r"x: image is \(1, 8, 8\); expected \(3, H, W\)"),
        (OneSample(ItemSample("x", torch.zeros(3, 8, 8, dtype=torch.uint8), ["a"])), "expected normalised floating"),
        (OneSample(ItemSample("x", torch.full((3, 8, 8), float("nan")), ["a"])), "not finite"),
    ],
)
def test_each_failure_is_a_sentence_with_its_remedy(dataset, message):
    with pytest.raises(PreflightError, match=message):
        check(dataset)


def test_collators_that_give_the_wrong_form_are_named():
    def no_items(samples):
        batch = ItemCollator(toy_tokenizer, 4)(samples)
        batch.item_mask[:] = False
        return batch

    def floats(samples):
        batch = ItemCollator(toy_tokenizer, 4)(samples)
        batch.item_tokens = batch.item_tokens.float()
        return batch

    with pytest.raises(PreflightError, match="every item slot is masked"):
        check(ToyDataset(8), no_items)
    with pytest.raises(PreflightError, match=r"item tokens of torch\.float32"):
        check(ToyDataset(8), floats)


def test_duplicate_texts_of_different_images_are_counted():
    image = torch.zeros(3, 8, 8)
    samples = [
        ItemSample("a", image, ["red", "small", "red"]),  # twice in one image is no false negative
        ItemSample("b", image, ["small", "green"], is_normal=True),
        ItemSample("c", image, ["green"], is_normal=True),
    ]
    batch = ItemCollator(toy_tokenizer, 4)(samples)
    assert duplicate_items(batch) == (4, 6)
    assert "4 of 6 items" in str(duplicate_warning(batch, normal_check=False))
    assert duplicate_warning(batch, normal_check=True) is None
    assert duplicate_warning(ItemCollator(toy_tokenizer, 4)(samples[1:]), normal_check=True) is None
