"""Nothing a run finds is trusted, nothing it has is lost: damaged files, claimed folders, full disks, retention."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import torch
from test_checkpoint import exact_curve, make_checkpoint, named
from test_engine import curve
from toy import ToyRun, toy_options, toy_train

from itemizedclip.models.archive import DamagedError, save_archive, unusable_tensor, verify_archive
from itemizedclip.models.factory import load_pretrained
from itemizedclip.models.weights import CheckpointError, read_checkpoint
from itemizedclip.runtime import claims, files
from itemizedclip.runtime.claims import ClaimedError, claimed, is_gone, this_process
from itemizedclip.runtime.errors import NoSpaceError, UserError
from itemizedclip.runtime.files import remove_leftovers
from itemizedclip.runtime.liveness import _Watch
from itemizedclip.runtime.processes import SetupError, Stopped, StopRequest
from itemizedclip.training import folder as run_folder
from itemizedclip.training.checkpoint import find_resume, load_checkpoint, newest_checkpoint, set_aside_later
from itemizedclip.training.folder import TrackingError, check_space, choose_run_folder, explain_failed_write
from itemizedclip.training.run import launch_run
from itemizedclip.training.tracking import drop_lines_after


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run of two epochs."""
    return toy_train(named(toy_options(tmp_path_factory.mktemp("finished")), "a")).folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it, as run "a" below tmp_path."""
    subprocess.run(["cp", "-r", str(finished), str(tmp_path / "a")], check=True)
    return tmp_path / "a"


def flip(path: Path, position: int, count: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[position : position + count] = bytes(byte ^ 0x10 for byte in content[position : position + count])
    path.write_bytes(content)


def inside_weights(path: Path) -> int:
    """A position within the largest tensor of a file."""
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size)
        return entry.header_offset + 200 + entry.file_size // 2


# --- files that tell whether they are as they were written ----------------------------------------------------------


def test_a_checksum_changes_nothing_for_other_readers(finished):
    path = finished / "checkpoints/epoch_2.pt"
    assert verify_archive(path) == "sha256"
    plain = torch.load(path, weights_only=True)
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert all(torch.equal(value, mapped["state_dict"][name]) for name, value in plain["state_dict"].items())
    assert zipfile.ZipFile(path).testzip() is None


def test_every_flipped_byte_is_noticed(tmp_path):
    """But those of the comment's own mark, without which the archive's CRCs are compared."""
    path = tmp_path / "x.pt"
    save_archive({"state_dict": {"a": torch.arange(5.0)}, "step": 3}, path)
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            contents = read_checkpoint(path)
        except CheckpointError:
            continue
        assert position >= len(whole) - 86, position
        assert torch.equal(contents["state_dict"]["a"], torch.arange(5.0))


@pytest.mark.parametrize("saved_by", ["us", "torch"])
@pytest.mark.parametrize("damage", ["bit", "noise", "cut", "half a page of zeros", "empty", "text"])
def test_damaged_files_are_refused(run, tmp_path, saved_by, damage):
    path = run / "checkpoints/epoch_2.pt"
    if saved_by == "torch":
        torch.save(torch.load(path, weights_only=True), path)
        assert verify_archive(path) == "crc"
    position, size = inside_weights(path), path.stat().st_size
    if damage in ("bit", "noise"):
        flip(path, position, 1 if damage == "bit" else 300)
    elif damage == "cut":
        os.truncate(path, size // 2)
    elif damage == "half a page of zeros":
        flip(path, size - 2048, 1024)
    else:
        path.write_bytes(b"" if damage == "empty" else b"<html>404</html>")
    with pytest.raises(CheckpointError, match=str(path)):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match=str(path)):
        load_pretrained(path)


def test_archives_that_pytorch_does_not_write_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    with pytest.raises(DamagedError, match="compressed"):
        verify_archive(tmp_path / "bomb.pt")


def test_files_saved_without_crcs_are_still_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"state_dict": {"a": torch.ones(3)}}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert verify_archive(tmp_path / "x.pt") == "none"
    assert read_checkpoint(tmp_path / "x.pt")["state_dict"].keys() == {"a"}
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert verify_archive(tmp_path / "old.pt") == "none"
    assert read_checkpoint(tmp_path / "old.pt")["state_dict"].keys() == {"a"}


def test_tensors_that_no_model_can_use_are_named():
    assert unusable_tensor({"a": torch.ones(3), "b": torch.full((4,), 60000.0, dtype=torch.float16)}) is None
    for value, said in {
        torch.tensor([1.0, float("nan")]): "1 of the 2 values of w are not finite",
        torch.tensor([float("inf"), float("-inf")]): "2 of the 2 values of w",
        torch.ones(1).expand(10**6): "larger than the 4 bytes it has",
        torch.ones(3, device="meta"): "w is no plain tensor",
        torch.ones(3).to_sparse(): "w is no plain tensor",
    }.items():
        assert said in str(unusable_tensor({"w": value}))


@pytest.mark.parametrize("where", ["state_dict", "optimizer"])
def test_values_that_are_not_finite_are_refused(run, where):
    path = run / "checkpoints/epoch_2.pt"
    contents = torch.load(path, weights_only=True)
    if where == "state_dict":
        contents["state_dict"]["text.out.weight"][0, 0] = float("nan")
    else:
        contents["optimizer"]["state"][0]["exp_avg"].flatten()[0] = float("inf")
    save_archive(contents, path)
    with pytest.raises(CheckpointError, match=r"values of .* are not finite"):
        load_checkpoint(path)
    assert newest_checkpoint(run) == run / "checkpoints/epoch_1.pt"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", "x"), ("step", -5), ("step", 2.0), ("step", True), ("step", 10**30), ("step", 21), ("options", None),
        ("options", {}), ("options", {"loading": {"batch_size": 0}}), ("total_steps", 0), ("total_steps", 1),
        ("format", "x"), ("format", 0), ("format", None), ("epoch", 3), ("epoch", None), ("step_in_epoch", -1),
        ("samples_seen", "many"), ("run_id", 7), ("model_config", []), ("transform", None), ("data_fingerprint", 0),
        ("world_size", 0), ("metrics", {"a": "b"}), ("metrics", 3), ("tracking", {"a": 1}), ("scaler", {"scale": -1.0}),
        ("scaler", {"scale": float("nan")}), ("optimizer", {}), ("optimizer", {"state": {0: 1}, "param_groups": []}),
        ("state_dict", {"a": 1}),
    ],
)  # fmt: skip
def test_fields_that_cannot_be_are_named(run, field, value):
    path = run / "checkpoints/epoch_2.pt"
    save_archive(torch.load(path, weights_only=True) | {field: value}, path)
    with pytest.raises(CheckpointError, match=rf"{path}: its field {field} is .*; expected "):
        load_checkpoint(path)
    assert newest_checkpoint(run) == run / "checkpoints/epoch_1.pt"


def test_options_nested_without_end_are_refused(run):
    path = run / "checkpoints/epoch_2.pt"
    contents = torch.load(path, weights_only=True)
    deep: dict = {}
    for _ in range(100):
        deep = {"a": deep}
    save_archive(contents | {"transform": deep}, path)
    with pytest.raises(CheckpointError, match="its field transform is a dict of another form"):
        load_checkpoint(path)


def test_moments_of_another_shape_are_refused(run, tmp_path):
    path = run / "checkpoints/epoch_1.pt"
    contents = torch.load(path, weights_only=True)
    contents["optimizer"]["state"][0]["exp_avg"] = torch.zeros(2)
    save_archive(contents, path)
    with pytest.raises(CheckpointError, match=r"epoch_1.pt: its optimizer trained another set"):
        toy_train(named(toy_options(tmp_path), "a", resume=str(path)))


# --- going on from the newest good one -------------------------------------------------------------------------------


def test_latest_falls_back_and_the_curve_stays_one(run, finished, tmp_path, caplog):
    flip(run / "checkpoints/epoch_2.pt", inside_weights(run / "checkpoints/epoch_2.pt"))
    again = toy_train(named(toy_options(tmp_path), "a", resume="latest"))
    assert "epoch_2.pt: is damaged (its SHA-256 is not the one it was written with)" in caplog.text
    assert exact_curve(again.folder) == exact_curve(finished)
    assert [line["epoch"] for line in curve(run, "eval")] == [1, 2]
    assert verify_archive(run / "checkpoints/epoch_2.pt") == "sha256"
    assert (run / "checkpoints/superseded/epoch_2.pt").is_file()


def test_when_all_are_damaged_nothing_is_touched(run, tmp_path):
    for path in (run / "checkpoints").iterdir():
        flip(path, inside_weights(path))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "log.txt"}
    with pytest.raises(CheckpointError, match=r"every one of its 2 checkpoints is damaged .* left as they are"):
        toy_train(named(toy_options(tmp_path), "a", resume="latest"))
    with pytest.raises(CheckpointError, match="every one of its 2 checkpoints"):
        find_resume("latest", tmp_path, "a")
    with pytest.raises(TrackingError, match="a run of this name exists"):
        toy_train(named(toy_options(tmp_path), "a"))
    assert {path: path.read_bytes() for path in before} == before
    assert not (run / ".claim").exists()


def test_a_damaged_file_named_by_path_is_refused(run, tmp_path):
    path = run / "checkpoints/epoch_2.pt"
    flip(path, inside_weights(path))
    with pytest.raises(CheckpointError, match="is damaged"):
        toy_train(named(toy_options(tmp_path), "b", resume=str(path)))
    assert not (tmp_path / "b").exists()


def test_only_what_is_later_is_set_aside(tmp_path):
    folder = tmp_path / "a"
    for epoch in (1, 2, 3):
        make_checkpoint(folder / f"checkpoints/epoch_{epoch}.pt", 10 * epoch)
    (folder / "checkpoints/epoch_1.pt").write_bytes(b"damaged")
    (folder / "checkpoints/superseded").mkdir()
    (folder / "checkpoints/superseded/epoch_3.pt").write_bytes(b"of an earlier branch")
    moved = set_aside_later(folder, folder / "checkpoints/epoch_2.pt", 20, 2)
    assert [path.name for path in moved] == ["epoch_3-2.pt"]
    assert (folder / "checkpoints/epoch_1.pt").read_bytes() == b"damaged"
    assert (folder / "checkpoints/superseded/epoch_3.pt").read_bytes() == b"of an earlier branch"


def test_a_checkpoint_from_elsewhere_never_goes_on_in_the_folder_of_another_run(run, tmp_path):
    toy_train(named(toy_options(tmp_path), "b"))
    with pytest.raises(TrackingError, match="holds checkpoints of its own"):
        toy_train(named(toy_options(tmp_path), "b", resume=str(run / "checkpoints/epoch_1.pt")))


# --- whose folder ----------------------------------------------------------------------------------------------------


def test_a_claim_is_exclusive_and_ends(tmp_path):
    with claimed(tmp_path) as claim:
        assert json.loads((tmp_path / ".claim").read_text())["pid"] == os.getpid()
        with pytest.raises(ClaimedError, match=rf"another run is at work here \(process {os.getpid()} on "):
            claims._acquire(tmp_path, this_process())
        assert claim.check()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="x"), claimed(tmp_path):
        raise RuntimeError("x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("attempt", range(20))
def test_of_many_newcomers_at_once_one_gets_a_stale_claim(tmp_path, attempt):
    dead = replace(this_process(), pid=2**22 + 1, nonce="dead")
    claims._create(tmp_path / ".claim", dead)
    winners, refused, start = [], [], threading.Barrier(8)

    def newcomer() -> None:
        start.wait()
        try:
            here = this_process()
            claims._acquire(tmp_path, here)
            winners.append(here)
        except ClaimedError:
            refused.append(1)

    threads = [threading.Thread(target=newcomer) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 7
    assert claims._read(tmp_path / ".claim")[0] == winners[0]
    assert [path.name for path in tmp_path.iterdir()] == [".claim"]


def test_who_is_gone():
    here = this_process()
    assert not is_gone(here, here)
    assert is_gone(replace(here, pid=2**22 + 1), here)
    assert is_gone(replace(here, started="1"), here)  # the number went to another process
    elsewhere = replace(here, host="node9", pid=2**22 + 1)
    assert not is_gone(elsewhere, here)
    assert not is_gone(replace(here, boot="another container", pid=2**22 + 1), here)
    # Slurm puts a job back into the queue only after it ended.
    assert is_gone(replace(elsewhere, job="77/0"), replace(here, job="77/1"))
    assert not is_gone(replace(elsewhere, job="77/0"), replace(here, job="77/0"))
    assert not is_gone(replace(elsewhere, job="76/0"), replace(here, job="77/1"))
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    time.sleep(0.1)
    zombie = replace(here, pid=child.pid, started=claims.start_time(child.pid) or "x")
    child.wait()
    assert is_gone(zombie, here)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b'{"pid": 1}', b"\xff\xfe", b"null"])
def test_a_claim_that_cannot_be_read_is_held_until_it_is_old(tmp_path, monkeypatch, content):
    (tmp_path / ".claim").write_bytes(content)
    monkeypatch.setattr(claims, "STALE_S", 0.3)
    started = time.monotonic()
    with claimed(tmp_path):
        assert time.monotonic() - started >= 0.2


@pytest.mark.parametrize("clock", [0, 3600])
def test_a_holder_elsewhere_is_waited_for_by_its_beat(tmp_path, monkeypatch, clock):
    """Also when its clock, or ours, went an hour back."""
    monkeypatch.setattr(claims, "STALE_S", 1.0)
    path = tmp_path / ".claim"
    claims._create(path, replace(this_process(), host="node9", nonce="elsewhere"))
    os.utime(path, (time.time() + clock, time.time() + clock))
    started = time.monotonic()
    with claimed(tmp_path) as claim:
        assert 0.5 < time.monotonic() - started < 10
        assert claim.is_ours()
    claims._create(path, replace(this_process(), host="node9", nonce="elsewhere"))
    os.utime(path, (time.time() - 60, time.time() - 60))
    with claimed(tmp_path):
        pass
    claims._create(path, replace(this_process(), host="node9", nonce="elsewhere"))
    monkeypatch.setattr(claims, "STALE_S", 60.0)
    beat = threading.Timer(0.5, os.utime, [path])
    beat.start()
    with pytest.raises(ClaimedError, match=r"on node9, since "), claimed(tmp_path):
        pass


def test_a_holder_that_was_thought_dead_finds_out(tmp_path, monkeypatch):
    with claimed(tmp_path) as claim:
        (tmp_path / ".claim").unlink()
        assert not claim.check()
        claim.renew()
        assert claim.check()
        (tmp_path / ".claim").unlink()
        claims._create(tmp_path / ".claim", replace(this_process(), host="node9"))
        with pytest.raises(ClaimedError, match=r"taken over by another run .* on node9"):
            claim.check()
    assert (tmp_path / ".claim").exists()  # it is not ours to remove


def test_a_run_that_lost_its_folder_writes_nothing_more(tmp_path):
    class Thief:
        name = "thief"

        def run(self, model):
            (tmp_path / "a/.claim").unlink()
            claims._create(tmp_path / "a/.claim", replace(this_process(), host="node9"))
            return {"x": 1.0}

    with pytest.raises(ClaimedError, match="taken over by another run"):
        toy_train(named(toy_options(tmp_path), "a"), evaluators=[Thief()])
    assert [path.name for path in (tmp_path / "a/checkpoints").iterdir()] == ["latest.pt"]


def test_automatic_names_never_collide(tmp_path):
    settings, now = toy_options(tmp_path).run, datetime(2026, 5, 6, 7, 8, 9)
    names = [choose_run_folder(settings, None, now).name for _ in range(3)]
    assert names == ["toy-20260506-070809", "toy-20260506-070809-2", "toy-20260506-070809-3"]
    make_checkpoint(tmp_path / names[2] / "checkpoints/latest.pt", 1)
    assert find_resume("latest", tmp_path, "", recipe="toy") == tmp_path / names[2] / "checkpoints/latest.pt"


def test_what_killed_writers_left_is_removed(tmp_path):
    host, dead = files.socket.gethostname(), 2**22 + 1
    names = {
        f".latest.pt.{host}.{dead}.0123abcd.part": (0, True),
        f".latest.pt.{host}.{os.getpid()}.0123abcd.part": (0, False),
        f".latest.pt.node9.{dead}.0123abcd.part": (0, False),
        f".epoch_1.pt.node9.{dead}.0123abcd.part": (90_000, True),
        f".latest.pt.{dead}.tmp": (4000, True),
        f".epoch_2.pt.{dead}.tmp": (10, False),
        ".hidden": (10**6, False),
        "epoch_1.pt": (10**6, False),
    }
    for name, (age, _) in names.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    removed = {path.name for path in remove_leftovers(tmp_path)}
    assert removed == {name for name, (_, goes) in names.items() if goes}
    assert {path.name for path in tmp_path.iterdir()} == names.keys() - removed


# --- stopped ---------------------------------------------------------------------------------------------------------


def test_a_signal_in_an_evaluation_leaves_at_once_and_it_is_done_again(tmp_path):
    class Slow:
        name = "slow"

        def run(self, model):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    options = named(toy_options(tmp_path), "a")
    with pytest.raises(Stopped) as stopped:
        toy_train(options, evaluators=[Slow()])
    assert (stopped.value.code, stopped.value.result.interrupted, stopped.value.result.step) == (75, True, 10)
    assert not (tmp_path / "a/.claim").exists()
    toy_train(named(options, "a", resume="latest"))
    assert [line["epoch"] for line in curve(tmp_path / "a", "eval")] == [1, 2]
    assert [line["step"] for line in curve(tmp_path / "a")] == list(range(1, 21))


def test_before_the_first_step_there_is_nothing_to_save(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), launch_run(toy_options(tmp_path)):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    assert list(tmp_path.iterdir()) == []


def test_what_nohup_ignores_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest.listening() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.signal is None
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_rank_that_gives_no_sign_is_named_and_one_that_is_done_is_not():
    store = torch.distributed.HashStore()
    watch = _Watch(store, rank=0, world_size=3, timeout_s=180.0)
    store.set("itemizedclip/alive/1", "1|process 7 on node1")
    store.set("itemizedclip/alive/2", "1|process 8 on node2")
    assert watch.look(0.0) is None
    store.set("itemizedclip/alive/1", "done|process 7 on node1")
    assert watch.look(100.0) is None
    told = watch.look(181.0)
    assert told is not None
    assert told.startswith("rank 2 (process 8 on node2) has given no sign of life for 180 s (--rank-timeout)")
    store.set("itemizedclip/alive/2", "2|process 8 on node2")
    assert watch.look(182.0) is None
    assert watch.look(10_000.0) is not None


# --- room ------------------------------------------------------------------------------------------------------------


def test_two_checkpoints_must_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 3_000_000_000}))
    check_space(tmp_path, 1_400_000_000, is_resumed=False)
    with pytest.raises(NoSpaceError, match=r"two checkpoints take 3.2 GB .* 3 GB are free; make room, or .* --logs"):
        check_space(tmp_path, 1_600_000_000, is_resumed=False)
    check_space(tmp_path, 1_600_000_000, is_resumed=True)
    assert NoSpaceError.exit_code == 74


def test_a_refused_write_names_need_room_and_the_last_good_one(tmp_path):
    error = OSError(errno.ENOSPC, "No space left on device")
    told = explain_failed_write(error, tmp_path / "latest.pt", tmp_path / "epoch_1.pt", 2_000_000_000)
    assert isinstance(told, NoSpaceError)
    assert "the disk is full: 2 GB are needed" in str(told)
    assert f"the last good checkpoint is {tmp_path / 'epoch_1.pt'}; --resume latest goes on from it" in str(told)
    told = explain_failed_write(OSError(errno.EIO, "Input/output error"), tmp_path / "x.pt", None)
    assert not isinstance(told, NoSpaceError)
    assert isinstance(told, UserError)
    assert "cannot be written (Input/output error); no checkpoint yet" in str(told)


# --- one curve -------------------------------------------------------------------------------------------------------


def test_lines_that_are_none_do_not_end_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = b'{"kind": "train", "step": 1, "samples": 4, "loss": "nan"}\n'
    bad = [b'\xff\xfe{"samples": 4}\n', b'{"samples": 1e999}\n', b"[" * 100_000 + b"\n", b'{"samples": NaN}\n',
           b'{"samples": true}\n', b'{"samples": 4.0}\n', b'{"step": 1}\n', b"null\n", b"\n", b'{"samples": "4"}\n',
           b'{"samples": 4, "samples": 4}\n', b"\0" * 4096 + b"\n", b'{"samples": 4, "x']  # fmt: skip
    path.write_bytes(good + good.join(bad))
    assert drop_lines_after(path, 8) == len(bad)
    assert path.read_bytes() == good * len(bad)


def test_an_evaluation_that_will_be_repeated_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"kind": "train", "samples": 40}', '{"kind": "eval", "samples": 40}', '{"kind": "train", "samples": 44}']
    path.write_text("\n".join(lines) + "\n")
    assert drop_lines_after(path, 40, evaluation_is_due=False) == 1
    assert drop_lines_after(path, 40, evaluation_is_due=True) == 1
    assert path.read_text() == lines[0] + "\n"


# --- which checkpoints stay ------------------------------------------------------------------------------------------


class Scripted:
    """An evaluator whose values are given."""

    name = "val"

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def run(self, model) -> dict[str, float]:
        return {"auc": self.values.pop(0)}


def kept(tmp_path: Path, values: tuple[float, ...], **settings: object) -> list[str]:
    options = named(toy_options(tmp_path), "a", **settings)
    options = replace(options, optimizer=replace(options.optimizer, epochs=5))
    toy_train(options, evaluators=[Scripted(*values)])
    return sorted(path.name for path in (tmp_path / "a/checkpoints").iterdir())


VALUES = (0.5, 0.9, 0.7, 0.9, 0.6)


@pytest.mark.parametrize(
    ("settings", "epochs"),
    [
        ({"keep_last": 2}, [4, 5]),
        ({"keep_last": 1, "keep_best": "val/auc"}, [2, 5]),
        ({"keep_last": 1, "keep_best": "val/auc:min"}, [1, 5]),
        ({"save_frequency": 5, "keep_best": "val/auc"}, [1, 2, 5]),
        ({"save_frequency": 5, "keep_best": "val/auc", "keep_last": 1}, [2, 5]),
        ({"keep_best": "val/auc"}, [1, 2, 3, 4, 5]),
    ],
)
def test_retention(tmp_path, settings, epochs):
    assert kept(tmp_path, VALUES, **settings) == [f"epoch_{epoch}.pt" for epoch in epochs]


def test_a_measure_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(SetupError, match=r"--keep-best test/auc names no evaluator of this run; there are: val"):
        kept(tmp_path, VALUES, keep_best="test/auc")
    with pytest.raises(SetupError, match=r"--keep-best names val/acc; this run measures val/auc"):
        kept(tmp_path, VALUES, keep_best="val/acc")


def test_saving_by_the_clock(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    options: ToyRun = named(toy_options(tmp_path), "a", save_every_minutes=1e-6)
    toy_train(replace(options, optimizer=replace(options.optimizer, epochs=1)))
    assert caplog.text.count("latest.pt at step") >= 10
