"""Flickr30k Entities and DIOR-RSVG from small files in their formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import fails
from itemizedclip_2d.grounded_images import read_annotation, read_dior_rsvg, read_entities, read_flickr_entities
from PIL import Image

from itemizedclip.commands.evaluate import main as evaluate
from itemizedclip.models.factory import create_model
from itemizedclip.runtime.errors import MissingFileError, UserError

ENTITIES = """<annotation>
  <filename>101.jpg</filename>
  <size><width>80</width><height>60</height><depth>3</depth></size>
  <object><name>11</name><name>12</name>
    <bndbox><xmin>1</xmin><ymin>1</ymin><xmax>40</xmax><ymax>30</ymax></bndbox></object>
  <object><name>11</name><bndbox><xmin>51</xmin><ymin>41</ymin><xmax>80</xmax><ymax>60</ymax></bndbox></object>
  <object><name>13</name><nobndbox>1</nobndbox><scene>1</scene></object>
</annotation>"""
SENTENCES = """[/EN#11/people Two  boys] play with [/EN#12/other/bodyparts a ball] in [/EN#13/scene a park] .
[/EN#11/people Two boys] and [/EN#0/notvisual it] .
"""
DIOR = """<annotation><folder>DIOR</folder><filename>{name}.jpg</filename>
<size><width>64</width><height>64</height><depth>3</depth></size>{objects}</annotation>"""
OBJECT = """<object><name>ship</name><bndbox><xmin>{x}</xmin><ymin>5</ymin><xmax>{to}</xmax><ymax>20</ymax></bndbox>
<description>{text}</description></object>"""


@pytest.fixture
def entities(tmp_path) -> Path:
    tmp_path = tmp_path / "entities"
    tmp_path.mkdir()
    for folder, name, content in (("Annotations", "101.xml", ENTITIES), ("Sentences", "101.txt", SENTENCES)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(content)
    (tmp_path / "test.txt").write_text("101\n")
    (tmp_path / "flickr30k-images").mkdir()
    Image.new("RGB", (80, 60), (90, 120, 30)).save(tmp_path / "flickr30k-images" / "101.jpg")
    return tmp_path


@pytest.fixture
def dior(tmp_path) -> Path:
    tmp_path = tmp_path / "dior"
    tmp_path.mkdir()
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "JPEGImages").mkdir()
    for number, texts in enumerate((["a ship", "a ship on the left"], ["the lower ship"])):
        objects = "".join(OBJECT.format(x=3 + 9 * n, to=20 + 9 * n, text=text) for n, text in enumerate(texts))
        (tmp_path / "Annotations" / f"0000{number}.xml").write_text(DIOR.format(name=f"0000{number}", objects=objects))
        Image.new("RGB", (64, 64), (10, 20, 80)).save(tmp_path / "JPEGImages" / f"0000{number}.jpg")
    (tmp_path / "test.txt").write_text("1\n2\n")
    (tmp_path / "train.txt").write_text("0\n")
    return tmp_path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = create_model("ViT-scenes-ItemizedCLIP")
    path = tmp_path_factory.mktemp("checkpoint") / "epoch_1.pt"
    torch.save({"state_dict": model.state_dict(), "model_config": model.config}, path)
    return path


def test_phrases_with_boxes_are_items(entities):
    (entry,) = read_flickr_entities(entities, entities / "flickr30k-images", "test")
    assert entry.items == ("Two boys", "a ball")
    assert entry.boxes == (((0, 0, 30, 40), (40, 50, 60, 80)), ((0, 0, 30, 40),))
    assert read_entities(entities / "Annotations/101.xml", entities / "Sentences/101.txt") == {
        ("11", "Two boys"): entry.boxes[0], ("12", "a ball"): entry.boxes[1],
    }  # fmt: skip


def test_expressions_are_counted_over_all_files(dior):
    first, second = read_dior_rsvg(dior, "test")
    assert (first.items, second.items) == (("a ship on the left",), ("the lower ship",))
    assert first.boxes == (((4, 11, 20, 29),),)
    assert [entry.items for entry in read_dior_rsvg(dior, "train")] == [("a ship",)]
    (dior / "test.txt").write_text("3\n")
    with pytest.raises(UserError, match=r"no image of this split|has object 3; the annotations have 3, counted from 0"):
        read_dior_rsvg(dior, "test")


def test_one_command_each(entities, dior, checkpoint, tmp_path, capsys):
    common = ["--checkpoint", str(checkpoint), "--workers", "0", "--device", "cpu"]
    there = ["--data-dir", str(entities)]
    out = ["--output", str(tmp_path / "entities.json"), "--bootstrap", "50"]
    found = evaluate(["flickr30k-entities", *there, *common, *out])
    for name in ("pointing_game", "miou", "dice", "box_accuracy", "chance_pointing", "ceiling_dice"):
        assert 0 <= found[name] <= 1
    assert found["chance_pointing"] == pytest.approx(((1200 + 600) / 4800 + 1200 / 4800) / 2)
    said = capsys.readouterr().out
    assert "1 images, 2 phrases" in said
    assert "patch grid allows" in said
    common += ["--data-dir", str(dior)]
    evaluate(["dior-rsvg", *common, "--split", "train", "--output", str(tmp_path / "train.json")])
    chosen = json.loads((tmp_path / "train.json").read_text())["metrics"]["threshold_best"]
    evaluate(["dior-rsvg", *common, "--threshold-from", str(tmp_path / "train.json"), "--output",
              str(tmp_path / "test.json")])  # fmt: skip
    facts = json.loads((tmp_path / "test.json").read_text())["facts"]
    assert facts["threshold"] == chosen
    assert facts["intervals"]["num_patients"] == 2
    assert "dice" in facts["intervals"]["of"]


def test_what_is_wrong_is_said(entities, checkpoint, capsys):
    path = entities / "Annotations" / "101.xml"
    for content, message in (
        ("<annotation>", "no XML"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "expected a plain annotation"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_annotation(path)
    for change, message in (
        (("<xmin>1<", "<xmin>x<"), "xmin is 'x'; expected a whole number"),
        (("<xmin>1<", "<xmin>41<"), "is empty; expected xmin < xmax"),
        (("<width>80<", "<width>40<"), "outside the picture of 60 × 40"),
    ):
        path.write_text(ENTITIES.replace(*change))
        with pytest.raises(UserError, match=message):
            read_flickr_entities(entities, entities / "flickr30k-images", "test")
    path.write_text(ENTITIES)
    with pytest.raises(MissingFileError, match=r"elsewhere/101.jpg: no such file; 1 of 1 images"):
        read_flickr_entities(entities, entities / "elsewhere", "test")
    common = ["--data-dir", str(entities), "--checkpoint", str(checkpoint), "--workers", "0"]
    said = fails(capsys, evaluate, ["flickr30k-entities", *common, "--split", "val"])
    assert "val.txt" in said
    assert "--threshold is 0.52" in fails(capsys, evaluate, ["flickr30k-entities", *common, "--threshold", "0.52"])
