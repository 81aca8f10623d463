"""A dual encoder and a data set small enough to check evaluators by hand: 16-wide, images of 4 × 4 patches."""

import torch
import torch.nn.functional as F

from itemizedclip.data.batch import BadSampleError, ItemSample
from itemizedclip.models.dual_encoder import DualEncoder, ImageFeatures
from itemizedclip.models.item_attention import ItemAttention

D, PATCH, SIDE = 16, 2, 8
WORDS = ["red", "green", "blue", "small", "large", "one", "two", "three", "left", "right", "the", "a"]


def tokenize(texts):
    """int64 (N, 6): word numbers from 1, padded with 0."""
    rows = [[1 + WORDS.index(word) for word in text.split()][:6] for text in texts]
    return torch.tensor([row + [0] * (6 - len(row)) for row in rows])


class TinyModel(DualEncoder):
    head_name = "visual_attn"

    def __init__(self, seed=0):
        super().__init__({"embed_dim": D})
        torch.manual_seed(seed)
        self.patches = torch.nn.Linear(3 * PATCH**2, D)
        self.words = torch.nn.Embedding(len(WORDS) + 1, D, padding_idx=0)
        self.visual_attn = ItemAttention(D, 4)
        self.dropout = torch.nn.Dropout(0.5)  # shows an evaluator that forgets eval mode
        torch.nn.init.normal_(self.visual_attn.attn.in_proj_weight, std=0.5)
        self.init_logit_parameters()

    def encode_image(self, images, *, series_names=None):
        columns = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        tokens = self.dropout(self.patches(columns))
        return ImageFeatures(tokens.mean(1), tokens, (SIDE // PATCH, SIDE // PATCH))

    def encode_text(self, tokens_NC):
        return self.words(tokens_NC).cumsum(1).tanh().sum(1)


class TinyDataset:
    """Random images with one to four items, some of them shared between images, and a mask per item."""

    def __init__(self, count=7, seed=5):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(count, 3, SIDE, SIDE, generator=generator)
        colours, things = WORDS[:3], WORDS[5:8]
        self.texts = []
        for _ in range(count):
            drawn = torch.randperm(9, generator=generator)[: int(torch.randint(1, 5, (1,), generator=generator))]
            self.texts.append([f"{colours[i // 3]} {things[i % 3]}" for i in drawn.tolist()])
        self.item_masks = [torch.rand(len(own), SIDE, SIDE, generator=generator) < 0.2 for own in self.texts]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return ItemSample(f"image{index}", self.images[index], list(self.texts[index]))


class MaskedTinyDataset(TinyDataset):
    def masks(self, index):
        return self.item_masks[index]


class BrokenTinyDataset(MaskedTinyDataset):
    """Images of which some cannot be read; `lists_items` tells the items of those too."""

    def __init__(self, bad, *, lists_items=True):
        super().__init__()
        self.bad = set(bad)
        self.read = []
        if lists_items:
            self.items = lambda index: list(self.texts[index])

    def __getitem__(self, index):
        self.read.append(index)
        if index in self.bad:
            raise BadSampleError(f"image{index}.png: truncated; copy it again")
        return super().__getitem__(index)


class TinyDatasetOfParts(BrokenTinyDataset):
    """Images of one to three parts side by side, which therefore differ in width; of some a part cannot be used."""

    def __init__(self, bad=(), *, skipping=()):
        super().__init__(bad)
        self.skipping = skipping
        self.counts = [1 + index * 5 % 3 for index in range(len(self))]

    def sample_id(self, index):
        return f"image{index}"

    def parts(self, index):
        return [f"part{number}" for number in range(self.counts[index])]

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        sample.image = torch.cat([sample.image + number for number in range(self.counts[index])], dim=2)
        sample.skipped = [f"image{index}, part9: no tensor"] if index in self.skipping else []
        return sample
