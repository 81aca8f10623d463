"""--precision: what auto becomes on this processor, on an older one, on several ranks, and after a resume."""

from __future__ import annotations

import logging
import platform
import sys
from dataclasses import replace

import pytest
import torch
from commands import ROOT, run
from PIL import Image
from toy import toy_options, toy_train

from itemizedclip.commands.demo import RECIPES
from itemizedclip.data.scenes import ScenesDataset
from itemizedclip.models.factory import LoadedModel, create_model, create_tokenizer
from itemizedclip.models.weights import read_checkpoint
from itemizedclip.runtime import precision as module
from itemizedclip.runtime.precision import CpuBfloat16, cpu_bfloat16, resolve_precision
from itemizedclip.viewer.explanation import Explainer
from itemizedclip.viewer.inputs import photograph_input

CPU = torch.device("cpu")
FAST, SLOW = CpuBfloat16(True, 0.3), CpuBfloat16(False, 13.0)

# A processor with AVX2 alone, as PyTorch, oneDNN and MKL then see it.
OLDER = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}

needs_x86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="the variables are those of x86 processors"
)


def pretend(monkeypatch, found: CpuBfloat16) -> None:
    monkeypatch.setattr(module, "cpu_bfloat16", lambda: found)


# --- the choice ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("has_units", "ratio", "name"),
    [
        (True, 0.3, "amp_bf16"),
        (True, 1.3, "fp32"),  # AVX-512 without the units, which oneDNN calls supported
        (False, 0.3, "fp32"),
        (False, 13.0, "fp32"),
        (None, 0.5, "amp_bf16"),
        (None, 4.0, "fp32"),
    ],
)
def test_auto_needs_units_that_are_faster(monkeypatch, caplog, has_units, ratio, name):
    pretend(monkeypatch, CpuBfloat16(has_units, ratio))
    with caplog.at_level(logging.INFO):
        precision = resolve_precision("auto", CPU)
    assert precision.name == name
    assert precision.autocast_dtype == (torch.bfloat16 if name == "amp_bf16" else None)
    (said,) = caplog.messages
    assert said.startswith(f"precision {name}: this CPU")
    assert f"{ratio:.2g} times as long as in float32" in said


@pytest.mark.parametrize("name", ["amp_bf16", "bf16"])
def test_bfloat16_that_is_emulated_is_warned_of_with_its_price(monkeypatch, caplog, name):
    pretend(monkeypatch, SLOW)
    precision = resolve_precision(name, CPU)
    assert (precision.name, precision.autocast_dtype) == (name, torch.bfloat16)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith(f"--precision {name}: this CPU has no bfloat16 units")
    assert "13 times as long" in record.message
    assert "--precision fp32" in record.message
    caplog.clear()
    pretend(monkeypatch, FAST)
    resolve_precision(name, CPU)
    assert not caplog.records


def test_fp32_asks_nobody(monkeypatch, caplog):
    monkeypatch.setattr(module, "cpu_bfloat16", lambda: pytest.fail("measured for nothing"))
    with caplog.at_level(logging.INFO):
        assert resolve_precision("fp32", CPU).autocast_dtype is None
    assert not caplog.records


def test_all_ranks_take_what_the_slowest_can(monkeypatch):
    pretend(monkeypatch, FAST)
    monkeypatch.setattr(module, "gather_objects", lambda own: [own, SLOW])
    precision = resolve_precision("auto", CPU)
    assert precision.name == "fp32"
    assert precision.reason == SLOW.sentence


def test_gpus_without_bfloat16_on_one_rank_take_float16_on_all(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    gpu = torch.device("cuda", 0)
    assert resolve_precision("auto", gpu).name == "amp_bf16"
    monkeypatch.setattr(module, "gather_objects", lambda own: [own, False])
    assert resolve_precision("auto", gpu).name == "amp"


def test_recipes_of_scenes_ask_auto():
    assert {recipe().model.precision for recipe in RECIPES.values()} == {"auto"}


# --- asking and measuring --------------------------------------------------------------------------------------------


def test_both_libraries_must_report_units(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    answers = {}
    for onednn in (True, False):
        for pytorch in (True, False):
            monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda a=onednn: a, raising=False)
            monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda a=pytorch: a, raising=False)
            answers[onednn, pytorch] = module._reported_units()
    assert answers == {(True, True): True, (True, False): False, (False, True): False, (False, False): False}
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert module._reported_units() is None


def test_measuring_leaves_generator_and_threads_as_they_were():
    torch.manual_seed(3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    assert module._measured_ratio() > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert cpu_bfloat16() is cpu_bfloat16()


RESOLVE = """
import logging, torch
from itemizedclip.runtime.precision import cpu_bfloat16, resolve_precision
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
cpu = torch.device("cpu")
print(resolve_precision("auto", cpu).name, resolve_precision("amp_bf16", cpu).name, cpu_bfloat16().ratio)
"""


@needs_x86
def test_an_older_processor_computes_in_float32():
    """The real libraries, told to see AVX2 alone."""
    ended = run(sys.executable, "-c", RESOLVE, **OLDER)
    assert ended.returncode == 0, ended.stderr
    auto, explicit, ratio = ended.stdout.split()
    assert (auto, explicit) == ("fp32", "amp_bf16")
    assert float(ratio) > 2
    assert "INFO precision fp32: this CPU has no bfloat16 units" in ended.stderr
    assert "WARNING --precision amp_bf16: this CPU has no bfloat16 units" in ended.stderr


def test_this_processor_computes_in_what_it_measured():
    ended = run(sys.executable, "-c", RESOLVE, ONEDNN_MAX_CPU_ISA="DEFAULT")
    assert ended.returncode == 0, ended.stderr
    auto, _, ratio = ended.stdout.split()
    assert (auto == "amp_bf16") == ("INFO precision amp_bf16: this CPU" in ended.stderr)
    if auto == "amp_bf16":
        assert float(ratio) <= module.WORTHWHILE_RATIO
        assert "WARNING" not in ended.stderr


@needs_x86
def test_ranks_of_different_processors_agree(tmp_path):
    """Rank 1 sees an older processor; both then train in float32."""
    program = tmp_path / "ranks.py"
    variables = "".join(f"    os.environ[{name!r}] = {value!r}\n" for name, value in OLDER.items())
    program.write_text(
        "import os\n"
        f"if os.environ['RANK'] == '1':\n{variables}"
        "import torch\n"
        "from itemizedclip.runtime.processes import launch\n"
        "from itemizedclip.runtime.precision import resolve_precision\n"
        "with launch() as ranks:\n"
        "    name = resolve_precision('auto', torch.device('cpu')).name\n"
        f"    open({str(tmp_path)!r} + f'/{{ranks.rank}}', 'w').write(name)\n"
    )
    ended = run(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--", str(program),
        cwd=ROOT, CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["fp32", "fp32"]


# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores_in_bfloat16_are_near_those_in_float32():
    """The tolerance that docs/training.md names; maps and scores come in float32 all the same."""
    torch.manual_seed(0)
    model = create_model("ViT-scenes-ItemizedCLIP").eval()
    loaded = LoadedModel(model, model.config, create_tokenizer(model.config))
    scene = ScenesDataset(split="test", num_scenes=1).scene(0)
    source = photograph_input("scene", Image.fromarray(scene.image), loaded)
    exact, near = (
        Explainer(loaded, source, autocast_dtype=dtype).explain(scene.items).maps for dtype in (None, torch.bfloat16)
    )
    assert near.scores.dtype == near.weights.dtype == torch.float32
    assert not torch.equal(near.scores, exact.scores)
    torch.testing.assert_close(near.scores, exact.scores, rtol=0, atol=0.01)


# --- resuming --------------------------------------------------------------------------------------------------------


def test_a_run_resumed_on_another_processor_says_that_its_precision_changed(tmp_path, monkeypatch):
    options = toy_options(tmp_path)
    options = replace(options, run=replace(options.run, name="moved"), model=replace(options.model, precision="auto"))
    pretend(monkeypatch, FAST)
    first = toy_train(options)
    assert read_checkpoint(first.checkpoint)["options"]["model"]["precision"] == "amp_bf16"
    log = first.folder / "log.txt"
    assert "precision amp_bf16: this CPU has bfloat16 units" in log.read_text()

    resume = replace(options, run=replace(options.run, resume=str(first.folder / "checkpoints/epoch_1.pt")))
    toy_train(resume)
    assert "changed since" not in log.read_text()
    pretend(monkeypatch, SLOW)
    toy_train(replace(resume, run=replace(resume.run, resume=str(first.folder / "checkpoints/epoch_1.pt"))))
    assert "changed since epoch_1.pt: model.precision: amp_bf16 → fp32" in log.read_text()
